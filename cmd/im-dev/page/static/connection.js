// One WebSocket after the other, to whichever gateway answers.
//
// States: idle; connecting; online (the gateway said `connected`); waiting (reconnects at retryAt);
// stopped (does not reconnect by itself; reason says why).
//
// Events: "state"; "frame" with detail = a frame of the gateway's.

const BACKOFF_FIRST_MS = 400;
const BACKOFF_MAX_MS = 20_000;
const HANDSHAKE_MS = 10_000; // from dialling to `connected`
const STEADY_MS = 5_000; // online for so long, the next loss begins with the first back-off again
const RENEW_EARLY_MS = 60_000; // an access token is renewed so long before it expires

// Codes of 45xx say: do not reconnect, or only with a new token.
const REPLACED = 4500, KICKED = 4501, TOKEN_EXPIRED = 4502, TOKEN_REFUSED = 4503;

export class Connection extends EventTarget {
  state = "idle";
  reason = ""; // of stopped: "replaced", "kicked" or "auth"
  retryAt = 0;
  sessionId = "";
  gatewayId = "";

  #gateways;
  #api;
  // Each tab is a device of its own, as long as it is not loaded anew.
  #device = Array.from(crypto.getRandomValues(new Uint8Array(8)), (b) => b.toString(16).padStart(2, "0")).join("");
  #at = 0; // index of the gateway to dial
  #failures = 0;
  #refused = 0; // tokens refused in a row
  #socket = null;
  #timers = new Map();
  #heard = 0;
  #drainUntil = 0;
  #attempt = 0; // tells a stale attempt to end

  constructor(gateways, api) {
    super();
    this.#gateways = gateways;
    this.#api = api;
    // The network is back, or the laptop woke up: do not sit out the back-off.
    addEventListener("online", () => this.state === "waiting" && this.start());
    addEventListener("offline", () => this.#socket && this.#probe());
    document.addEventListener("visibilitychange", () => {
      if (document.visibilityState === "visible" && this.state === "online") this.#probe();
    });
  }

  // start connects now.
  start() {
    this.#drop();
    this.#dial();
  }

  // stop closes for good.
  stop(reason = "") {
    this.#drop();
    this.#become("idle", reason);
  }

  // send reports whether the frame was handed to the socket; it may still be lost with it.
  send(frame) {
    if (this.state !== "online") return false;
    this.#socket.send(JSON.stringify(frame));
    return true;
  }

  #become(state, reason = "") {
    this.state = state;
    this.reason = reason;
    this.dispatchEvent(new Event("state"));
  }

  #after(name, ms, f) {
    clearTimeout(this.#timers.get(name));
    // Beyond 2^31 ms a timer would fire at once.
    this.#timers.set(name, setTimeout(f, Math.min(ms, 2 ** 31 - 1)));
  }

  // #drop forgets the socket at once: close() alone may take minutes on a dead network.
  #drop() {
    this.#attempt++;
    for (const t of this.#timers.values()) clearTimeout(t);
    this.#timers.clear();
    const socket = this.#socket;
    this.#socket = null;
    if (socket) {
      socket.onopen = socket.onmessage = socket.onclose = null;
      socket.close(1000);
    }
  }

  async #dial() {
    const attempt = this.#attempt;
    this.#become("connecting");
    let token;
    try {
      const { expiresAt } = this.#api.session;
      if (this.#refused > 0 || expiresAt - Date.now() < RENEW_EARLY_MS / 2) await this.#api.refresh();
      token = this.#api.session.token;
    } catch (e) {
      if (attempt !== this.#attempt) return;
      if (e.status === 401 || !this.#api.session) return this.#stopFor("auth");
      return this.#lost();
    }
    if (attempt !== this.#attempt) return;
    const url = new URL(`/ws?auth=close&device=web&device_id=${this.#device}`, this.#gateways[this.#at]);
    url.protocol = url.protocol.replace("http", "ws");
    const socket = new WebSocket(url, ["im.json.v1", "bearer." + token]);
    this.#socket = socket;
    this.#after("handshake", HANDSHAKE_MS, () => this.#lost());
    socket.onmessage = (e) => this.#frame(JSON.parse(e.data));
    socket.onclose = (e) => this.#closed(e.code);
  }

  #frame(frame) {
    this.#heard = Date.now();
    switch (frame.type) {
      case "connected":
        clearTimeout(this.#timers.get("handshake"));
        this.#refused = 0;
        this.#drainUntil = 0;
        this.sessionId = frame.data.session_id;
        this.gatewayId = frame.data.gateway_id;
        this.#after("steady", STEADY_MS, () => { this.#failures = 0; });
        this.#heartbeat(frame.data.heartbeat_ms ?? 30_000);
        this.#scheduleRenewal();
        this.#become("online");
        break;
      case "reconnect": { // draining: it serves us until then, and others after it
        const ms = frame.data.retry_after_ms ?? 0;
        this.#drainUntil = Date.now() + ms;
        this.#after("drain", ms, () => { this.#next(); this.start(); });
        break;
      }
    }
    this.dispatchEvent(new CustomEvent("frame", { detail: frame }));
  }

  // #heartbeat notices a dead network, which closes no socket: a page does not see the gateway's
  // pings, so it sends its own.
  #heartbeat(ms) {
    this.#after("heartbeat", ms, () => {
      this.#probe();
      this.#heartbeat(ms);
    });
  }

  #probe() {
    if (this.state !== "online") return;
    const asked = Date.now();
    this.send({ type: "ping" });
    this.#after("probe", 5_000, () => { if (this.#heard < asked) this.#lost(); });
  }

  #scheduleRenewal() {
    const left = this.#api.session.expiresAt - Date.now();
    this.#after("renew", Math.max(left - RENEW_EARLY_MS, left / 2, 1_000), async () => {
      try {
        const { token } = await this.#api.refresh();
        this.send({ type: "refresh-token", data: { token } });
        this.#scheduleRenewal();
      } catch (e) {
        if (e.status !== 401) this.#after("renew", 5_000, () => this.#scheduleRenewal());
        // Refused: the gateway closes when the token expires, and then it shows.
      }
    });
  }

  #closed(code) {
    this.#socket = null;
    switch (code) {
      case REPLACED: return this.#stopFor("replaced");
      case KICKED: return this.#stopFor("kicked");
      case TOKEN_EXPIRED: case TOKEN_REFUSED:
        if (++this.#refused > 2) return this.#stopFor("auth");
        return this.#lost();
    }
    if (code >= 4500 && code < 4600) return this.#stopFor("refused");
    this.#lost();
  }

  #stopFor(reason) {
    this.#drop();
    this.#become("stopped", reason);
  }

  // #lost schedules the next attempt: exponential with jitter, not before the gateway allows.
  #lost() {
    this.#drop();
    const bound = Math.min(BACKOFF_MAX_MS, BACKOFF_FIRST_MS * 2 ** this.#failures++);
    const allowed = Math.max(0, this.#drainUntil - Date.now());
    const ms = allowed + bound * (0.5 + Math.random() / 2);
    this.#next();
    this.retryAt = Date.now() + ms;
    this.#after("retry", ms, () => this.start());
    this.#become("waiting");
  }

  #next() {
    this.#at = (this.#at + 1) % this.#gateways.length;
  }
}
