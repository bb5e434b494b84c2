// The client of im-gateway for browsers and Node: one user's connection, kept up across gateways,
// with an outbox that loses nothing while it lives and keeps order. See README.md.

/** A frame that the gateway sends. */
export interface Frame {
  type: string;
  message_id?: string;
  data?: any;
  timestamp?: number;
  delivery_id?: number;
}

/** Where a message was stored: the data of a successful message-ack. */
export interface Receipt {
  client_msg_id: string;
  messageId: string;
  topic: string;
  partition: number;
  /** Absent when the broker did not tell. */
  offset?: number;
}

/** What `connected` says. */
export interface Connected {
  gateway_id: string;
  session_id: string;
  heartbeat_ms: number;
  max_message_bytes: number;
  presence?: "degraded";
}

/** waiting: for the next attempt. stopped: by close(), or by a refusal that trying again does not mend. */
export type State = "idle" | "connecting" | "online" | "waiting" | "stopped";

/** Why a token is asked for: to connect, because the one in use is about to expire, or because it was refused. */
export type TokenReason = "connect" | "expiring" | "refused";

export interface Events {
  state: { state: State; error?: ClientError; retryAt?: number };
  connected: Connected;
  /** With ackDeliveries the gateway holds a message until all listeners, also asynchronous ones, are done. */
  message: Frame;
  /** A frame that the gateway refused without naming it, a token callback or a listener that failed. */
  error: ClientError;
}

export interface Options {
  /** ws:// or wss:// addresses of gateways, tried in turn. */
  urls: string | string[];
  /** Returns a token that is good now. Never called twice at once. */
  token: (reason: TokenReason) => string | Promise<string>;
  /** How the token travels; "header" needs a constructor that sends headers, as Node's does. Default: subprotocol. */
  tokenIn?: "subprotocol" | "query" | "header";
  /** Default: json. */
  format?: "json" | "protobuf";
  /** Ask for acknowledged deliveries (ack=1). */
  ackDeliveries?: boolean;
  deviceId?: string;
  device?: string;
  /** Unsettled messages that send() takes, 200. */
  outboxLimit?: number;
  /** Makes a connection; by default the global WebSocket. headers is given with tokenIn "header" only. */
  webSocket?: (url: string, protocols: string[], headers?: Record<string, string>) => WebSocket;
}

/** code is one of the gateway's, or CLOSED, OUTBOX_FULL, TOKEN, LISTENER; closeCode the WebSocket's, when it ended the client. */
export class ClientError extends Error {
  constructor(readonly code: string, message: string, readonly closeCode?: number, options?: ErrorOptions) {
    super(message, options);
    this.name = "ClientError";
  }
}

/** A message on its way. It carries the id by which im-logic recognises it. */
export type Sent = Promise<Receipt> & { readonly messageId: string };

interface Entry {
  frame: Frame;
  attempts: number;
  resolve: (r: Receipt) => void;
  reject: (e: ClientError) => void;
}

type Timer = "retry" | "connect" | "beat" | "token" | "ack";

const CONNECT_MS = 10_000; // from the first byte to `connected`
const ACK_MS = 12_000; // a little more than the gateway's own deadline of 10 s
const BACKOFF_FIRST_MS = 250;
const BACKOFF_MAX_MS = 10_000;
const SEEN = 1_024; // message ids remembered
const TOKEN_TRIES = 2; // refusals in a row after which a new token is asked for no more
const TIMER_MAX_MS = 2 ** 31 - 1;
// Refusals that sending again may mend.
const TRANSIENT = new Set(["OVERLOADED", "BROKER_UNAVAILABLE", "RATE_LIMITED", "OUTCOME_UNKNOWN", "AUTH_FAILED", "TOKEN_EXPIRED"]);

/** Grows with each failure up to BACKOFF_MAX_MS; between half of that and all of it. */
function backoff(failures: number): number {
  return Math.min(BACKOFF_MAX_MS, BACKOFF_FIRST_MS * 2 ** failures) * (0.5 + Math.random() / 2);
}

export class Client {
  #o: Options;
  #urls: string[];
  #at = 0;
  #listeners = new Map<keyof Events, Set<(e: any) => unknown>>();
  #state: State = "idle";
  #ws: WebSocket | null = null;
  #generation = 0; // of the connection; what belongs to an older one is ignored
  #session: Connected | null = null;
  #failures = 0;
  #refused = 0;
  #notBefore = 0; // Unix ms; a gateway that drains asked for it
  #heard = 0;
  #timers: Partial<Record<Timer, ReturnType<typeof setTimeout>>> = {};

  #outbox: Entry[] = [];
  #outstanding = false;
  #counter = 0;
  #prefix: string;

  #seen = new Set<string>();
  #handling: Promise<void> = Promise.resolve();

  constructor(options: Options) {
    this.#o = options;
    this.#urls = [options.urls].flat();
    if (this.#urls.length === 0) throw new TypeError("no urls");
    const random = crypto.getRandomValues(new Uint8Array(8)); // randomUUID needs https
    this.#prefix = Array.from(random, (b) => b.toString(16).padStart(2, "0")).join("");
  }

  get state(): State { return this.#state; }
  /** What the gateway said at the start of this session; null unless online. */
  get session(): Connected | null { return this.#session; }
  /** Messages that are not settled. */
  get pending(): number { return this.#outbox.length; }

  /** Calls f at each such event; returns what ends that. */
  on<K extends keyof Events>(event: K, f: (e: Events[K]) => unknown): () => void {
    let set = this.#listeners.get(event);
    if (!set) this.#listeners.set(event, (set = new Set()));
    set.add(f);
    return () => { set.delete(f); };
  }

  /** Connects, and again whenever the connection is lost. On a running client: connects anew at once. */
  connect(): void {
    this.#drop();
    void this.#open(this.#refused > 0 ? "refused" : "connect");
  }

  /** Ends the connection. What is not settled is rejected with CLOSED, or stays for connect() if keep is set. */
  close(keep = false): void {
    this.#drop();
    this.#become("stopped");
    if (keep) return;
    for (const e of this.#outbox.splice(0)) e.reject(new ClientError("CLOSED", "the client was closed"));
  }

  /**
   * Queues a message, connected or not. The promise is settled by the gateway's answer: resolved once the
   * message is stored, rejected when it is refused for good. messageId is made up unless given.
   */
  send(type: string, data: unknown, messageId = `${this.#prefix}-${++this.#counter}`): Sent {
    const frame: Frame = { type, message_id: messageId, data, timestamp: Date.now() };
    const promise = new Promise<Receipt>((resolve, reject) => {
      if (this.#outbox.length >= (this.#o.outboxLimit ?? 200)) {
        return reject(new ClientError("OUTBOX_FULL", "too much is waiting to be sent"));
      }
      this.#outbox.push({ frame, attempts: 0, resolve, reject });
    });
    this.#pump();
    return Object.assign(promise, { messageId });
  }

  // --- events ---

  #emit<K extends keyof Events>(event: K, e: Events[K]): unknown[] {
    const results: unknown[] = [];
    for (const f of this.#listeners.get(event) ?? []) {
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
    clearTimeout(this.#timers[name]);
    this.#timers[name] = setTimeout(f, Math.min(ms, TIMER_MAX_MS));
  }

  // --- the connection ---

  async #open(reason: TokenReason): Promise<void> {
    const generation = this.#generation;
    this.#become("connecting");
    let token: string;
    try {
      token = await this.#o.token(reason);
    } catch (cause) {
      if (generation !== this.#generation) return;
      this.#report(new ClientError("TOKEN", "the token callback failed", undefined, { cause }));
      return this.#lost();
    }
    if (generation !== this.#generation) return;

    let ws: WebSocket;
    try {
      ws = this.#dial(token);
    } catch (cause) { // an address or a token that no WebSocket takes
      return this.#stop(new ClientError("CLOSED", "cannot connect", undefined, { cause }));
    }
    this.#ws = ws;
    ws.binaryType = "arraybuffer";
    ws.onmessage = ({ data }) => {
      if (generation !== this.#generation) return;
      this.#heard = Date.now();
      let frame: Frame;
      try {
        frame = typeof data === "string" ? JSON.parse(data) : decode(new Uint8Array(data));
      } catch {
        return this.#lost(); // not our gateway's
      }
      this.#take(frame, token);
    };
    ws.onclose = ({ code, reason }) => { if (generation === this.#generation) this.#closed(code, reason); };
    ws.onerror = () => {}; // close follows
    this.#after("connect", CONNECT_MS, () => this.#lost());
  }

  #dial(token: string): WebSocket {
    const { tokenIn = "subprotocol", format = "json" } = this.#o;
    const url = new URL(this.#urls[this.#at]!);
    const query = url.searchParams;
    query.set("auth", "close"); // a refusal that browsers can read
    if (this.#o.ackDeliveries) query.set("ack", "1");
    if (this.#o.deviceId) query.set("device_id", this.#o.deviceId);
    if (this.#o.device) query.set("device", this.#o.device);
    if (tokenIn === "query") query.set("token", token);
    const protocols = [format === "protobuf" ? "im.proto.v1" : "im.json.v1"];
    if (tokenIn === "subprotocol") protocols.push("bearer." + token);
    const headers = tokenIn === "header" ? { Authorization: "Bearer " + token } : undefined;
    if (this.#o.webSocket) return this.#o.webSocket(url.href, protocols, headers);
    // Node's constructor takes headers in place of the protocols.
    return new WebSocket(url.href, headers ? ({ protocols, headers } as unknown as string[]) : protocols);
  }

  #write(frame: Frame): boolean {
    if (!this.#session || this.#ws?.readyState !== 1) return false;
    this.#ws.send(this.#encoded(frame));
    return true;
  }

  #encoded(frame: Frame): string | Uint8Array<ArrayBuffer> {
    return this.#o.format === "protobuf" ? encode(frame) : JSON.stringify(frame);
  }

  // #drop leaves the connection without waiting for the other side.
  #drop(): void {
    this.#generation++;
    for (const t of Object.values(this.#timers)) clearTimeout(t);
    this.#ws?.close();
    this.#ws = null;
    this.#session = null;
    this.#outstanding = false;
  }

  #stop(error: ClientError): void {
    this.#drop();
    this.#become("stopped", error);
  }

  #lost(): void {
    this.#drop();
    this.#at = (this.#at + 1) % this.#urls.length;
    const ms = Math.max(0, this.#notBefore - Date.now()) + backoff(this.#failures++);
    this.#after("retry", ms, () => this.connect());
    this.#become("waiting", undefined, Date.now() + ms);
  }

  #closed(code: number, reason: string): void {
    if (code < 4500 || code > 4599) return this.#lost();
    const expired = code === 4502 || code === 4503;
    if (expired && this.#refused++ < TOKEN_TRIES) return this.#lost();
    this.#refused = expired ? 1 : 0; // connect() asks for a new token
    this.#stop(new ClientError("CLOSED", reason || `the gateway closed with ${code}`, code));
  }

  #take(frame: Frame, token: string): void {
    const { data } = frame;
    switch (frame.type) {
      case "connected":
        this.#session = data;
        this.#failures = this.#refused = this.#notBefore = 0;
        clearTimeout(this.#timers.connect);
        this.#beat();
        this.#refreshAt(expiry(token));
        this.#become("online");
        void this.#tell("connected", data);
        return this.#pump();
      case "message-ack": return this.#answered(data);
      case "reconnect":
        this.#notBefore = Date.now() + (data?.retry_after_ms ?? 0);
        return;
      case "token-refreshed": return this.#refreshAt(data.expires_at);
      case "error": return this.#report(new ClientError(data?.code ?? "", data?.message ?? ""));
      case "pong": return;
      default: return this.#delivered(frame);
    }
  }

  // #beat asks for a sign of life (browsers hide WebSocket pings) and connects anew after 2.5 heartbeats of silence.
  #beat(): void {
    const every = this.#session!.heartbeat_ms;
    this.#after("beat", every / 2, () => {
      if (Date.now() - this.#heard > 2.5 * every) return this.#lost();
      if (Date.now() - this.#heard >= every / 2) this.#write({ type: "ping" });
      this.#beat();
    });
  }

  // #refreshAt asks for a new token ahead of expires (Unix ms; NaN: unknown), by a fifth of what is left or a minute.
  #refreshAt(expires: number): void {
    const left = expires - Date.now();
    if (!(left > 0)) return;
    this.#after("token", left - Math.min(60_000, left / 5), async () => {
      const generation = this.#generation;
      try {
        const token = await this.#o.token("expiring");
        if (generation === this.#generation) this.#write({ type: "refresh-token", data: { token } });
      } catch (cause) { // the gateway closes with 4502 if it comes to that
        this.#report(new ClientError("TOKEN", "the token callback failed", undefined, { cause }));
      }
    });
  }

  // --- sending: one message outstanding, so that refusals and cuts keep the order ---

  #pump(): void {
    const entry = this.#outbox[0];
    if (!entry || this.#outstanding || !this.#session) return;
    const encoded = this.#encoded(entry.frame);
    const bytes = typeof encoded === "string" ? new TextEncoder().encode(encoded).length : encoded.length;
    if (bytes > this.#session.max_message_bytes) { // the gateway would close the connection
      this.#outbox.shift();
      entry.reject(new ClientError("MESSAGE_TOO_LARGE", `${bytes} bytes are more than ${this.#session.max_message_bytes}`));
      return this.#pump();
    }
    if (!this.#write(entry.frame)) return;
    this.#outstanding = true;
    entry.attempts++;
    this.#after("ack", ACK_MS, () => this.#lost());
  }

  #answered(ack: Receipt & { status: string; code?: string; retry_after_ms?: number }): void {
    const at = this.#outbox.findIndex((e) => e.frame.message_id === ack.client_msg_id);
    if (at < 0) return; // settled before
    const entry = this.#outbox[at]!;
    const code = ack.code ?? "";
    if (ack.status !== "success" && TRANSIENT.has(code)) {
      // A late success may come meanwhile.
      this.#after("ack", (ack.retry_after_ms ?? 0) + backoff(entry.attempts), () => {
        this.#outstanding = false;
        this.#pump();
      });
      return;
    }
    this.#outbox.splice(at, 1);
    if (ack.status === "success") entry.resolve(ack);
    else entry.reject(new ClientError(code, `the gateway refused the message: ${code}`));
    if (at > 0) return; // the first is still outstanding
    clearTimeout(this.#timers.ack);
    this.#outstanding = false;
    this.#pump();
  }

  // --- receiving ---

  #delivered(frame: Frame): void {
    const generation = this.#generation;
    const id = frame.message_id;
    const duplicate = id !== undefined && this.#seen.has(id);
    if (id !== undefined && !duplicate) {
      this.#seen.add(id);
      if (this.#seen.size > SEEN) this.#seen.delete(this.#seen.values().next().value!);
    }
    if (frame.delivery_id === undefined) {
      if (!duplicate) void this.#tell("message", frame);
      return;
    }
    // One by one; the gateway bounds how many are not acknowledged.
    this.#handling = this.#handling.then(async () => {
      if (!duplicate) await this.#tell("message", frame);
      if (generation === this.#generation) this.#write({ type: "delivery-ack", data: { delivery_id: frame.delivery_id } });
    });
  }
}

/** A JWT's exp in Unix ms; NaN for a token that does not tell. */
function expiry(token: string): number {
  try {
    return JSON.parse(atob(token.split(".")[1]!.replace(/-/g, "+").replace(/_/g, "/"))).exp * 1000;
  } catch {
    return NaN;
  }
}

// --- im.proto.v1: codec/proto/im/client/v1/client.proto ---

/** A ClientFrame's bytes. */
export function encode(frame: Frame): Uint8Array<ArrayBuffer> {
  const out: number[] = [];
  const varint = (n: number) => {
    for (; n >= 128; n = Math.floor(n / 128)) out.push((n % 128) | 128);
    out.push(n);
  };
  const parts: Uint8Array[] = [];
  const bytes = (field: number, s: string | undefined) => {
    if (!s) return;
    const b = new TextEncoder().encode(s);
    varint(field << 3 | 2);
    varint(b.length);
    parts.push(Uint8Array.from(out.splice(0)), b);
  };
  bytes(1, frame.type);
  bytes(2, frame.message_id);
  bytes(3, frame.data === undefined ? undefined : JSON.stringify(frame.data));
  if (frame.timestamp) {
    varint(4 << 3);
    varint(frame.timestamp);
    parts.push(Uint8Array.from(out));
  }
  const all = new Uint8Array(parts.reduce((n, p) => n + p.length, 0));
  let at = 0;
  for (const p of parts) {
    all.set(p, at);
    at += p.length;
  }
  return all;
}

/** The frame of a ServerFrame's bytes; unknown fields are skipped. Throws RangeError or SyntaxError on others. */
export function decode(b: Uint8Array): Frame {
  let at = 0;
  const varint = () => {
    let n = 0;
    for (let scale = 1, i = 0; i < 10; scale *= 128, i++) {
      if (at >= b.length) break;
      const c = b[at++]!;
      n += (c & 127) * scale;
      if (c < 128) return n;
    }
    throw new RangeError("a varint has no end");
  };
  const take = (n: number) => {
    if (n > b.length - at) throw new RangeError("a field is cut short");
    return b.subarray(at, (at += n));
  };
  const text = (v: Uint8Array) => new TextDecoder("utf-8", { fatal: true }).decode(v);
  const frame: Frame = { type: "" };
  while (at < b.length) {
    const key = varint();
    const field = Math.floor(key / 8);
    switch (key % 8) {
      case 0: {
        const n = varint();
        if (field === 4) frame.timestamp = n;
        if (field === 5) frame.delivery_id = n;
        break;
      }
      case 1: take(8); break;
      case 2: {
        const v = take(varint());
        if (field === 1) frame.type = text(v);
        if (field === 2) frame.message_id = text(v);
        if (field === 3) frame.data = JSON.parse(text(v));
        break;
      }
      case 5: take(4); break;
      default: throw new RangeError("a field of unknown kind");
    }
  }
  return frame;
}
