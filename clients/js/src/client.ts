import { ClientError } from "./errors.js";
import { decode, encode, size, type ClientFrame, type Format, type Frame } from "./frames.js";
import { backoff, hint, Outbox, type Ack, type Receipt } from "./outbox.js";

/** What `connected` says. */
export interface Connected {
  gateway_id: string;
  session_id: string;
  heartbeat_ms: number;
  max_message_bytes: number;
  /** Messages from others may not arrive yet. */
  presence?: "degraded";
}

/** waiting: for the next attempt. stopped: by close(), or by a refusal that trying again does not mend. */
export type State = "idle" | "connecting" | "online" | "waiting" | "stopped";

/** Why a token is asked for: to connect, because the one in use is about to expire, or because it was refused. */
export type TokenReason = "connect" | "expiring" | "refused";

export interface Events {
  /** error says why it is waiting or stopped; retryAt (Unix ms) is the time of the next attempt. */
  state: { state: State; error?: ClientError; retryAt?: number };
  connected: Connected;
  /** A record. With ackDeliveries the gateway holds it until all listeners, also asynchronous ones, are done. */
  message: Frame;
  /** A frame that the gateway refused without naming it, a token callback or a listener that failed. */
  error: ClientError;
}

/** What the client needs of a WebSocket: the browsers' one, Node's and that of the package ws have it. */
export interface Socket {
  binaryType: string;
  readonly readyState: number;
  onmessage: ((event: any) => void) | null;
  onclose: ((event: any) => void) | null;
  onerror: ((event: any) => void) | null;
  send(data: any): void;
  close(code?: number): void;
}

export interface Options {
  /** ws:// or wss:// addresses of gateways, tried in turn. */
  urls: string | string[];
  /** Returns a token that is good now. Never called twice at once; it may take its time. */
  token: (reason: TokenReason) => string | Promise<string>;
  /** How the token travels. "header" needs a WebSocket that sends headers, as Node's does. Default: subprotocol. */
  tokenIn?: "subprotocol" | "query" | "header";
  /** Default: json. */
  format?: Format;
  /** The gateway holds each message until the listeners are done with it. Default: false. */
  ackDeliveries?: boolean;
  /** Names the device: 1 to 128 bytes without control characters. */
  deviceId?: string;
  /** The kind of device: 1 to 32 of a-z 0-9 _ -. */
  device?: string;
  /** Messages that may be unsettled; send() refuses more. Default: 200. */
  outbox?: number;
  /** Messages outstanding at a time. Default: 1, which keeps the order also across refusals. */
  window?: number;
  /** A message unanswered for so long means a dead connection. Default: 30,000. */
  ackTimeoutMs?: number;
  /** Makes a connection; headers are given with tokenIn "header" only. Default: the global WebSocket. */
  webSocket?: (url: string, protocols: string[], headers?: Record<string, string>) => Socket;
}

/** A message on its way, with the id by which im-logic recognises it. */
export type Sent = Promise<Receipt> & { readonly messageId: string };

type Timer = "retry" | "connect" | "steady" | "beat" | "probe" | "token" | "leave" | "acks";

const CONNECT_MS = 10_000; // from dialling to `connected`
const CLOSE_MS = 1_000; // from a WebSocket's error to its close
const STEADY_MS = 10_000; // a session that lasted so long starts the back-off anew
const BACKOFF_FIRST_MS = 250;
const BACKOFF_MAX_MS = 10_000;
const HEARTBEAT_MS = 30_000; // when the gateway names none that makes sense
const HEARTBEAT_MIN_MS = 100;
const WAKE_MS = 10_000; // for an answer when the device has woken up or changed its network
const LEAVE_MS = 2_000; // for outstanding answers, when moving to another gateway
const ACKS_MS = 20; // deliveries of so long are acknowledged together,
const ACKS = 64; // or so many: the gateway waits for the acks of 256
const HELD = 256; // records that listeners may be behind; the gateway waits for no more acks than that
const SEEN = 1_024; // message ids remembered
const TOKEN_TRIES = 2; // other tokens tried, in a row, after a refused one
const TIMER_MAX_MS = 2 ** 31 - 1;
const OWN = new Set(["", "ping", "refresh-token", "delivery-ack"]); // types that are no messages

export class Client {
  #o: Options;
  #format: Format;
  #urls: string[];
  #listeners = new Map<keyof Events, Set<(e: any) => unknown>>();
  #asked: Promise<string> | null = null; // a call of options.token

  #state: State = "idle";
  #at = 0; // index of the address to dial
  #failures = 0; // since the last steady session or stored message
  #refused = 0; // tokens since then
  #refusal: { token: string; error: ClientError } | null = null; // the last one, until a token is taken
  #notBefore = 0; // Unix ms; a gateway that drains asked for it
  #wake: AbortController | null = null;

  // Of the current connection; #drop ends them.
  #generation = 0; // what belongs to an older one is ignored
  #ws: Socket | null = null;
  #session: Connected | null = null;
  #ackId = 0; // the last delivery to acknowledge
  #acks = 0; // how many those are
  #timers: Partial<Record<Timer, ReturnType<typeof setTimeout>>> = {};

  #outbox: Outbox;
  #prefix: string;
  #counter = 0;

  #seen = new Set<string>();
  #handling: Promise<void> = Promise.resolve();
  #held = 0;
  #epoch = 0; // what was held when the client stopped is the gateway's again

  constructor(options: Options) {
    const o = (this.#o = options);
    this.#format = o.format ?? "json";
    this.#urls = [o.urls].flat();
    if (this.#urls.length === 0) throw new TypeError("urls is empty");
    for (const u of this.#urls) {
      if (!/^wss?:$/.test(new URL(u).protocol)) throw new TypeError(`${u} is no ws:// or wss:// address`);
    }
    if (!o.webSocket && typeof WebSocket === "undefined") throw new TypeError("there is no WebSocket here: give one as webSocket");
    const { deviceId = "d", device = "d", outbox = 200, window = 1, ackTimeoutMs = 30_000 } = o;
    if (!plain(deviceId)) throw new TypeError("deviceId must be 1 to 128 bytes without control characters");
    if (!/^[a-z0-9_-]{1,32}$/.test(device)) throw new TypeError("device must be 1 to 32 of a-z 0-9 _ -");
    for (const [name, n] of Object.entries({ outbox, window, ackTimeoutMs })) {
      if (!(n >= 1)) throw new TypeError(`${name} must be 1 at least`);
    }
    this.#outbox = new Outbox(outbox, window, ackTimeoutMs, (w) => this.#ws?.send(w),
      () => this.#lost(new ClientError("TIMEOUT", `a message was not answered for ${ackTimeoutMs} ms`)));
    const random = crypto.getRandomValues(new Uint8Array(8)); // randomUUID needs https
    this.#prefix = Array.from(random, (b) => b.toString(16).padStart(2, "0")).join("");
  }

  get state(): State { return this.#state; }
  /** What the gateway said at the start of this session; null unless online. */
  get session(): Connected | null { return this.#session; }
  /** Messages that are not settled. */
  get pending(): number { return this.#outbox.size; }

  /** Calls f at each such event; returns what ends that. */
  on<K extends keyof Events>(event: K, f: (e: Events[K]) => unknown): () => void {
    let set = this.#listeners.get(event);
    if (!set) this.#listeners.set(event, (set = new Set()));
    set.add(f);
    return () => { set.delete(f); };
  }

  /** Connects, and again whenever the connection is lost. While waiting: tries at once. */
  connect(): void {
    if (this.#state === "connecting" || this.#state === "online") return;
    this.#watchDevice();
    void this.#open();
  }

  /** Ends the connection. What is not settled is rejected with CLOSED, or stays for connect() if keep is set. */
  close(keep = false): void {
    this.#stop();
    if (!keep) this.#outbox.clear(new ClientError("CLOSED", "the client was closed"));
  }

  /**
   * Queues a message, connected or not; data becomes JSON now. The promise is settled by the gateway's answer:
   * resolved once the message is stored, rejected when it is refused for good. messageId (1 to 128 bytes
   * without control characters) is made up unless given.
   */
  send(type: string, data: unknown, messageId = `${this.#prefix}-${++this.#counter}`): Sent {
    return Object.assign(this.#queue(type, data, messageId), { messageId });
  }

  async #queue(type: string, data: unknown, messageId: string): Promise<Receipt> {
    if (typeof type !== "string" || OWN.has(type)) throw new ClientError("INVALID_MESSAGE", `a message cannot be of type "${type}"`);
    if (!plain(messageId)) throw new ClientError("INVALID_MESSAGE", "messageId must be 1 to 128 bytes without control characters");
    let json: string;
    try {
      json = JSON.stringify(data) ?? "null";
    } catch (cause) {
      throw new ClientError("INVALID_MESSAGE", "data cannot be written as JSON", undefined, { cause });
    }
    return this.#outbox.add(messageId, encode(this.#format, { type, message_id: messageId, data: json, timestamp: Date.now() }));
  }

  // --- events ---

  #emit<K extends keyof Events>(event: K, e: Events[K]): unknown[] {
    const results: unknown[] = [];
    for (const f of [...this.#listeners.get(event) ?? []]) {
      try {
        results.push(f(e));
      } catch (cause) {
        results.push(Promise.reject(cause));
      }
    }
    return results;
  }

  #report(error: ClientError): void {
    for (const r of this.#emit("error", error)) Promise.resolve(r).catch(() => {}); // nobody is left to tell
  }

  // #tell emits and waits for asynchronous listeners; those that fail are reported.
  async #tell<K extends keyof Events>(event: K, e: Events[K]): Promise<void> {
    for (const r of await Promise.allSettled(this.#emit(event, e))) {
      if (r.status === "rejected") this.#report(new ClientError("LISTENER", `a listener of ${event} failed`, undefined, { cause: r.reason }));
    }
  }

  #become(state: State, error?: ClientError, retryAt?: number): void {
    this.#state = state;
    void this.#tell("state", { state, error, retryAt });
  }

  #after(name: Timer, ms: number, f: () => void): void {
    this.#cancel(name);
    this.#timers[name] = setTimeout(() => {
      delete this.#timers[name];
      f();
    }, Math.min(ms, TIMER_MAX_MS)); // a longer one would fire at once
  }

  #cancel(name: Timer): void {
    clearTimeout(this.#timers[name]);
    delete this.#timers[name];
  }

  // #watchDevice: a network that is back, or a page that is seen again, sits out no timer.
  #watchDevice(): void {
    if (this.#wake) return;
    const { signal } = (this.#wake = new AbortController());
    const look = () => {
      if (this.#session) this.#probe(WAKE_MS);
      else if (this.#state === "waiting" && Date.now() >= this.#notBefore && globalThis.navigator?.onLine !== false) void this.#open();
    };
    globalThis.addEventListener?.("online", look, { signal });
    globalThis.addEventListener?.("offline", look, { signal });
    globalThis.document?.addEventListener("visibilitychange", () => {
      if (document.visibilityState === "visible") look();
    }, { signal });
  }

  // --- the connection ---

  #token(reason: TokenReason): Promise<string> {
    this.#asked ??= (async () => this.#o.token(reason))().then((token) => {
      if (typeof token !== "string" || token === "") throw new TypeError("the token is no text");
      return token;
    }).finally(() => { this.#asked = null; });
    return this.#asked;
  }

  async #open(): Promise<void> {
    this.#drop();
    const generation = this.#generation;
    this.#become("connecting");
    if (generation !== this.#generation) return; // a listener closed it
    let token: string;
    try {
      token = await this.#token(this.#refusal ? "refused" : "connect");
    } catch (cause) {
      if (generation !== this.#generation) return;
      const error = new ClientError("TOKEN", "the token callback failed", undefined, { cause });
      this.#report(error);
      return this.#lost(error);
    }
    if (generation !== this.#generation) return;
    if (token === this.#refusal?.token) return this.#stop(this.#refusal.error); // the callback has no other

    let ws: Socket;
    try {
      ws = this.#dial(token);
    } catch (cause) {
      const reason = String(cause).replaceAll(token, "[token]"); // a subprotocol is quoted
      return this.#stop(new ClientError("CONNECT", `no WebSocket can be made: ${reason}`));
    }
    this.#ws = ws;
    ws.binaryType = "arraybuffer";
    ws.onmessage = ({ data }) => {
      if (generation !== this.#generation) return;
      this.#cancel("probe");
      if (this.#session) this.#beat(this.#session.heartbeat_ms);
      try {
        this.#take(decode(data), token);
      } catch (cause) {
        this.#lost(new ClientError("PROTOCOL", "what came is no frame of a gateway", undefined, { cause }));
      }
    };
    ws.onclose = ({ code, reason }) => { if (generation === this.#generation) this.#closed(code, reason, token); };
    ws.onerror = () => { // close follows, but not from every WebSocket that could not connect
      if (generation === this.#generation) this.#after("connect", CLOSE_MS, () => this.#lost(new ClientError("DISCONNECTED", "the connection failed")));
    };
    this.#after("connect", CONNECT_MS, () => this.#lost(new ClientError("TIMEOUT", "no gateway answered")));
  }

  #dial(token: string): Socket {
    const { tokenIn = "subprotocol", ackDeliveries, deviceId, device, webSocket } = this.#o;
    const url = new URL(this.#urls[this.#at]!);
    const query = url.searchParams;
    query.set("auth", "close"); // browsers cannot read another refusal
    if (ackDeliveries) query.set("ack", "1");
    if (deviceId) query.set("device_id", deviceId);
    if (device) query.set("device", device);
    if (tokenIn === "query") query.set("token", token);
    const protocols = [this.#format === "protobuf" ? "im.proto.v1" : "im.json.v1"];
    if (tokenIn === "subprotocol") protocols.push("bearer." + token);
    const headers = tokenIn === "header" ? { Authorization: "Bearer " + token } : undefined;
    if (webSocket) return webSocket(url.href, protocols, headers);
    // Node's constructor takes an object in place of the protocols; a browser's refuses it.
    return new WebSocket(url.href, headers ? ({ protocols, headers } as unknown as string[]) : protocols);
  }

  #write(frame: ClientFrame): void {
    if (this.#session && this.#ws?.readyState === 1) this.#ws.send(encode(this.#format, frame));
  }

  // #drop leaves the connection without waiting for the other side.
  #drop(): void {
    this.#acknowledge();
    this.#generation++;
    for (const t of Object.keys(this.#timers) as Timer[]) this.#cancel(t);
    this.#outbox.stop();
    this.#ws?.close(1000);
    this.#ws = null;
    this.#session = null;
  }

  #stop(error?: ClientError): void {
    this.#drop();
    this.#wake?.abort();
    this.#wake = null;
    this.#epoch++;
    this.#become("stopped", error);
  }

  #lost(error: ClientError): void {
    this.#drop();
    this.#next();
    const ms = Math.max(0, this.#notBefore - Date.now()) + backoff(this.#failures++, BACKOFF_FIRST_MS, BACKOFF_MAX_MS);
    this.#after("retry", ms, () => void this.#open());
    this.#become("waiting", error, Date.now() + ms);
  }

  #next(): void {
    this.#at = (this.#at + 1) % this.#urls.length;
  }

  #closed(code: number, reason: string, token: string): void {
    const error = new ClientError("DISCONNECTED", `the connection was closed with ${code} ${reason}`.trim(), code);
    if (code < 4500 || code > 4599) return this.#lost(error);
    if (code !== 4502 && code !== 4503) return this.#stop(error);
    this.#refusal = { token, error }; // connect() asks for another, too
    if (++this.#refused <= TOKEN_TRIES) return this.#lost(error);
    this.#refused = 0;
    this.#stop(error);
  }

  #take(frame: Frame, token: string): void {
    if (frame.message_id) return this.#delivered(frame); // whatever its type; the gateway's own frames have none
    switch (frame.type) {
      case "connected": return this.#connected(fields(frame), token);
      case "message-ack":
        if (this.#outbox.answer(fields(frame) as Ack)) this.#failures = 0; // it gets somewhere
        return;
      case "reconnect": return this.#leaveAfter(hint(fields(frame).retry_after_ms));
      case "token-refreshed": return this.#refreshAt(fields(frame).expires_at);
      case "error": {
        const { code, message } = fields(frame);
        return this.#report(new ClientError(String(code), String(message)));
      }
      case "pong": return;
      default: return this.#delivered(frame);
    }
  }

  #connected(data: any, token: string): void {
    if (this.#session) return;
    const { heartbeat_ms, max_message_bytes } = data;
    this.#session = {
      ...data,
      heartbeat_ms: heartbeat_ms >= HEARTBEAT_MIN_MS ? heartbeat_ms : HEARTBEAT_MS,
      max_message_bytes: max_message_bytes > 0 ? max_message_bytes : 0,
    } as Connected;
    this.#notBefore = 0;
    this.#refusal = null;
    this.#cancel("connect");
    this.#after("steady", STEADY_MS, () => { this.#failures = this.#refused = 0; });
    this.#beat(this.#session.heartbeat_ms);
    this.#refreshAt(expiry(token));
    const generation = this.#generation;
    this.#become("online");
    if (generation !== this.#generation) return; // a listener closed it
    void this.#tell("connected", this.#session);
    if (generation === this.#generation) this.#outbox.start(this.#session.max_message_bytes);
  }

  // #beat pings after a heartbeat of silence (browsers hide the gateway's pings); 2.5 of them are a loss.
  #beat(every: number): void {
    this.#after("beat", every, () => { if (!this.#timers.probe) this.#probe(1.5 * every); });
  }

  #probe(ms: number): void {
    this.#write({ type: "ping" });
    this.#after("probe", ms, () => this.#lost(new ClientError("TIMEOUT", "nothing was heard from the gateway")));
  }

  // #leaveAfter moves on to the next gateway in so many ms, once what is outstanding is answered.
  #leaveAfter(ms: number): void {
    this.#notBefore = Date.now() + ms;
    const move = () => {
      this.#next();
      void this.#open();
    };
    this.#after("leave", ms, () => {
      this.#after("leave", LEAVE_MS, move);
      this.#outbox.leave(move);
    });
  }

  // #refreshAt asks for a new token ahead of expires (Unix ms), by a fifth of what is left or a minute, and
  // again in what is left then unless token-refreshed comes. Past that the gateway closes with 4502.
  #refreshAt(expires: number): void {
    const left = expires - Date.now();
    if (!(left > 0)) return; // or not known
    this.#after("token", left - Math.min(60_000, left / 5), async () => {
      const generation = this.#generation;
      try {
        const token = await this.#token("expiring");
        if (generation === this.#generation) this.#write({ type: "refresh-token", data: JSON.stringify({ token }) });
      } catch (cause) {
        this.#report(new ClientError("TOKEN", "the token callback failed", undefined, { cause }));
      }
      if (generation === this.#generation) this.#refreshAt(expires); // the gateway may refuse, or put it off
    });
  }

  // --- receiving ---

  #delivered(frame: Frame): void {
    const { delivery_id: id } = frame;
    if (!this.#o.ackDeliveries || id === undefined) {
      if (this.#first(frame.message_id)) void this.#tell("message", frame);
      return;
    }
    if (this.#held >= HELD) { // acks are cumulative, so this one cannot be left out
      return this.#lost(new ClientError("SLOW_LISTENER", `listeners are ${HELD} messages behind`));
    }
    this.#held++;
    const generation = this.#generation, epoch = this.#epoch;
    this.#handling = this.#handling.then(async () => {
      this.#held--;
      if (epoch !== this.#epoch) return;
      if (this.#first(frame.message_id)) await this.#tell("message", frame);
      if (generation !== this.#generation) return;
      this.#ackId = id;
      if (++this.#acks >= ACKS) this.#acknowledge();
      else if (!this.#timers.acks) this.#after("acks", ACKS_MS, () => this.#acknowledge());
    });
  }

  #acknowledge(): void {
    if (this.#ackId > 0) this.#write({ type: "delivery-ack", data: `{"delivery_id":${this.#ackId}}` });
    this.#ackId = this.#acks = 0;
    this.#cancel("acks");
  }

  // #first reports whether a message id is new; one that is missing always is.
  #first(id: string | undefined): boolean {
    if (!id) return true;
    if (this.#seen.has(id)) return false;
    this.#seen.add(id);
    if (this.#seen.size > SEEN) this.#seen.delete(this.#seen.values().next().value!);
    return true;
  }
}

// plain reports whether s is 1 to 128 bytes of UTF-8 without control characters.
function plain(s: string): boolean {
  return /^[^\u0000-\u001f\u007f\p{Surrogate}]+$/u.test(s) && size(s) <= 128;
}

function fields(frame: Frame): any {
  if (typeof frame.data !== "object" || frame.data === null) throw new TypeError(`${frame.type} without data`);
  return frame.data;
}

/** A JWT's exp in Unix ms; NaN for a token that does not tell. */
function expiry(token: string): number {
  try {
    return JSON.parse(atob(token.split(".")[1]!.replace(/-/g, "+").replace(/_/g, "/"))).exp * 1000;
  } catch {
    return NaN;
  }
}
