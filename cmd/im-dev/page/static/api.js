// The gateway's HTTP API and the session that it gave us. The session is kept per tab, so that two
// tabs can be two people.

const KEY = "im-session";

// Refusal is an answer of the gateway other than success.
export class Refusal extends Error {
  constructor(status, code, message) {
    super(message);
    this.status = status;
    this.code = code;
  }
}

export class Api {
  #gateways; // base URLs, http://host:port
  #first = 0; // the one that answered last
  #refreshing = null;

  constructor(gateways) {
    this.#gateways = gateways;
    this.session = JSON.parse(sessionStorage.getItem(KEY) ?? "null"); // {token, refreshToken, expiresAt, user}
  }

  async #post(path, body) {
    let last;
    for (let i = 0; i < this.#gateways.length; i++) {
      const at = (this.#first + i) % this.#gateways.length;
      let answer;
      try {
        answer = await fetch(this.#gateways[at] + path, {
          method: "POST",
          headers: { "Content-Type": "application/json" },
          body: JSON.stringify(body),
          signal: AbortSignal.timeout(10_000),
        });
      } catch (e) {
        last = new Error("The gateway cannot be reached.", { cause: e });
        continue;
      }
      this.#first = at;
      const json = await answer.json().catch(() => ({}));
      if (!answer.ok || !json.success) {
        throw new Refusal(answer.status, json.code ?? "", json.message ?? `The gateway answered ${answer.status}.`);
      }
      return json.data;
    }
    throw last;
  }

  #keep(session) {
    this.session = session;
    if (session) sessionStorage.setItem(KEY, JSON.stringify(session));
    else sessionStorage.removeItem(KEY);
    return session;
  }

  register(username, password) {
    return this.#post("/api/auth/register", { username, password });
  }

  async login(username, password) {
    return this.#keep(await this.#post("/api/auth/login", { username, password }));
  }

  async guest(guestName) {
    return this.#keep(await this.#post("/api/auth/guest", { guestName }));
  }

  // refresh gets new tokens. A refresh token is good for one use, so callers share one request.
  refresh() {
    this.#refreshing ??= this.#post("/api/auth/refresh", { refreshToken: this.session.refreshToken })
      .then((session) => (this.session ? this.#keep(session) : session)) // not if logged out meanwhile
      .finally(() => { this.#refreshing = null; });
    return this.#refreshing;
  }

  async logout() {
    const { refreshToken } = this.session ?? {};
    this.#keep(null);
    if (refreshToken) await this.#post("/api/auth/logout", { refreshToken }).catch(() => {});
  }
}
