import { ClientError } from "./errors.js";
import { size } from "./frames.js";
const UNKNOWN_MS = 1_000; // for a late success after OUTCOME_UNKNOWN
const RETRY_FIRST_MS = 500;
const RETRY_MAX_MS = 10_000;
const HINT_MAX_MS = 300_000; // bounds what a gateway may ask to wait
const TRANSIENT = new Set(["OVERLOADED", "BROKER_UNAVAILABLE", "RATE_LIMITED", "OUTCOME_UNKNOWN", "AUTH_FAILED", "TOKEN_EXPIRED"]);
/** Doubles with n from first to max; between half of that and all of it, so that clients spread. */
export function backoff(n, first, max) {
    return Math.min(max, first * 2 ** n) * (0.5 + Math.random() / 2);
}
/** A time that a gateway named, in ms; 0 for none. */
export function hint(ms) {
    return typeof ms === "number" && ms > 0 ? Math.min(ms, HINT_MAX_MS) : 0;
}
// Outbox holds the messages that are not settled, in the order in which they came. At most `window` of them
// are outstanding; after a refusal one, until no refused one is left.
export class Outbox {
    limit;
    window;
    ackMs;
    write;
    dead;
    #entries = [];
    #online = false;
    #maxBytes = 0;
    #left = null; // called once nothing is outstanding; nothing is sent meanwhile
    #refusals = 0; // in a row
    #timer;
    // dead is called when a message is not answered for ackMs.
    constructor(limit, window, ackMs, write, dead) {
        this.limit = limit;
        this.window = window;
        this.ackMs = ackMs;
        this.write = write;
        this.dead = dead;
    }
    get size() { return this.#entries.length; }
    add(id, wire) {
        return new Promise((resolve, reject) => {
            if (this.#entries.length >= this.limit) {
                return reject(new ClientError("OUTBOX_FULL", `${this.limit} messages wait to be settled`));
            }
            if (this.#entries.some((e) => e.id === id)) {
                return reject(new ClientError("DUPLICATE_ID", `message ${id} waits to be settled`));
            }
            this.#entries.push({ id, wire, size: size(wire), sent: false, sentAt: 0, retryAt: 0, refused: false, resolve, reject });
            this.#pump();
        });
    }
    // start: a session has begun; what is not settled is sent again, in order.
    start(maxBytes) {
        this.#online = true;
        this.#maxBytes = maxBytes;
        this.#pump();
    }
    // stop: the session has ended.
    stop() {
        clearTimeout(this.#timer);
        this.#online = false;
        this.#left = null;
        for (const e of this.#entries)
            e.sent = false;
    }
    leave(left) {
        this.#left = left;
        this.#pump();
    }
    clear(error) {
        for (const e of this.#entries.splice(0))
            e.reject(error);
    }
    // answer takes a message-ack and reports whether it settles a message as stored. One for an id that is not
    // here is a second answer: nothing to do.
    answer(ack) {
        const e = this.#entries.find((e) => e.id === ack.client_msg_id);
        if (!e)
            return false;
        const code = ack.code ?? "", stored = ack.status === "success";
        if (stored) {
            this.#refusals = 0;
            this.#settle(e);
            e.resolve(ack);
        }
        else if (!e.sent) {
            return false; // it is on its way again
        }
        else if (TRANSIENT.has(code)) {
            const asked = hint(ack.retry_after_ms) || (code === "OUTCOME_UNKNOWN" ? UNKNOWN_MS : 0);
            const ms = asked * (1 + Math.random() / 5) || backoff(this.#refusals++, RETRY_FIRST_MS, RETRY_MAX_MS);
            e.sent = false;
            e.refused = true;
            e.retryAt = Date.now() + ms;
        }
        else {
            this.#settle(e);
            e.reject(new ClientError(code, `the gateway refused message ${e.id}: ${code}`));
        }
        this.#pump();
        return stored;
    }
    #settle(e) {
        this.#entries.splice(this.#entries.indexOf(e), 1);
    }
    // #pump sends what may be sent, and looks again when time alone makes a difference.
    #pump() {
        clearTimeout(this.#timer);
        if (!this.#online)
            return;
        const now = Date.now();
        let outstanding = 0, refused = false, due = Infinity;
        for (const e of this.#entries) {
            refused ||= e.refused;
            if (!e.sent)
                continue;
            outstanding++;
            due = Math.min(due, e.sentAt + this.ackMs);
        }
        if (due <= now)
            return this.dead();
        if (this.#left) {
            if (outstanding === 0)
                return this.#left();
        }
        else {
            const window = refused ? 1 : this.window;
            for (const e of [...this.#entries]) {
                if (outstanding >= window)
                    break;
                if (e.sent)
                    continue;
                if (e.retryAt > now) {
                    due = Math.min(due, e.retryAt);
                    break;
                }
                if (this.#maxBytes > 0 && e.size > this.#maxBytes) { // the gateway would close the connection
                    this.#settle(e);
                    e.reject(new ClientError("MESSAGE_TOO_LARGE", `${e.size} bytes are more than ${this.#maxBytes}`));
                    continue;
                }
                e.sent = true;
                e.sentAt = now;
                outstanding++;
                due = Math.min(due, now + this.ackMs);
                this.write(e.wire);
            }
        }
        if (due < Infinity)
            this.#timer = setTimeout(() => this.#pump(), due - now);
    }
}
