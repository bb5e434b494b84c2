// What has been sent and not yet acknowledged. An entry keeps its message_id however often it is
// sent, so that im-logic recognises it, and survives a reload of the page. One entry is outstanding
// at a time: so the order holds even when the gateway refuses one in between.

const LIMIT = 200; // entries; beyond it add refuses
const ACK_MS = 12_000; // a little more than the gateway's own deadline of 10 s
const RETRY_FIRST_MS = 500;
const RETRY_MAX_MS = 15_000;

// Refusals that sending again does not mend.
const FINAL = new Set(["INVALID_MESSAGE", "MESSAGE_TOO_LARGE"]);

// Events: "acked" and "failed" with detail {frame, ack}.
export class Outbox extends EventTarget {
  #connection;
  #entries = []; // {frame, attempts, keep}
  #outstanding = false;
  #timer = 0;
  #key = "";
  #counter = 0;
  #prefix;

  constructor(connection) {
    super();
    this.#connection = connection;
    const random = crypto.getRandomValues(new Uint8Array(8)); // randomUUID needs https
    this.#prefix = Array.from(random, (b) => b.toString(16).padStart(2, "0")).join("");
    connection.addEventListener("state", () => {
      this.#outstanding = false;
      clearTimeout(this.#timer);
      this.#pump();
    });
    connection.addEventListener("frame", ({ detail }) => {
      if (detail.type === "message-ack") this.#answered(detail.data);
    });
  }

  // open takes up what this user left in this tab, and returns those frames.
  open(user) {
    this.#key = "im-outbox-" + user;
    const frames = JSON.parse(sessionStorage.getItem(this.#key) ?? "[]");
    this.#entries = frames.map((frame) => ({ frame, attempts: 0, keep: true }));
    return frames;
  }

  // close empties it. forget: also what open would take up.
  close(forget) {
    clearTimeout(this.#timer);
    this.#entries = [];
    this.#outstanding = false;
    if (forget) sessionStorage.removeItem(this.#key);
  }

  newId() {
    return `${this.#prefix}-${++this.#counter}`;
  }

  // add queues a frame under a new message_id and returns the frame; null: the outbox is full.
  // keep: it is not to be lost by a reload.
  add(type, data, keep = true) {
    if (this.#entries.length >= LIMIT) return null;
    const frame = { type, message_id: this.newId(), data, timestamp: Date.now() };
    this.#entries.push({ frame, attempts: 0, keep });
    this.#save();
    this.#pump();
    return frame;
  }

  get size() { return this.#entries.length; }

  #save() {
    try {
      sessionStorage.setItem(this.#key, JSON.stringify(this.#entries.filter((e) => e.keep).map((e) => e.frame)));
    } catch { /* the storage is full: then a reload loses them */ }
  }

  #pump() {
    const entry = this.#entries[0];
    if (!entry || this.#outstanding || !this.#connection.send(entry.frame)) return;
    this.#outstanding = true;
    entry.attempts++;
    this.#again(ACK_MS);
  }

  #again(ms) {
    clearTimeout(this.#timer);
    this.#timer = setTimeout(() => { this.#outstanding = false; this.#pump(); }, ms);
  }

  #answered(ack) {
    const at = this.#entries.findIndex((e) => e.frame.message_id === ack.client_msg_id);
    if (at < 0) return; // settled before: a late success after a retry
    const entry = this.#entries[at];
    const final = ack.status === "success" || FINAL.has(ack.code);
    if (!final) {
      // Not before the gateway allows; a little later each time.
      const bound = Math.min(RETRY_MAX_MS, RETRY_FIRST_MS * 2 ** (entry.attempts - 1));
      this.#again((ack.retry_after_ms ?? 0) + bound * (0.5 + Math.random() / 2));
      return;
    }
    this.#entries.splice(at, 1);
    this.#save();
    this.dispatchEvent(new CustomEvent(ack.status === "success" ? "acked" : "failed", { detail: { frame: entry.frame, ack } }));
    if (at > 0) return; // a late answer; the first entry is still outstanding
    this.#outstanding = false;
    clearTimeout(this.#timer);
    this.#pump();
  }
}
