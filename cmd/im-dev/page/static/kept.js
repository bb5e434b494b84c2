// What one user of this tab has sent and the gateway has not settled: kept over a reload, to be sent again
// under the same message_ids.

export class Kept {
  #key;
  #messages; // {id, type, data, at}

  constructor(user) {
    this.#key = "im-outbox-" + user;
    this.#messages = JSON.parse(sessionStorage.getItem(this.#key) ?? "[]");
  }

  get all() { return [...this.#messages]; }

  add(message) {
    this.#messages.push(message);
    this.#save();
  }

  settle(id) {
    this.#messages = this.#messages.filter((m) => m.id !== id);
    this.#save();
  }

  forget() {
    sessionStorage.removeItem(this.#key);
  }

  #save() {
    try {
      sessionStorage.setItem(this.#key, JSON.stringify(this.#messages));
    } catch { /* the storage is full: then a reload loses them */ }
  }
}
