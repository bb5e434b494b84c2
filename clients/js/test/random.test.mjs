// Chance against the outbox: a played gateway that stores, refuses, falls silent, forgets to answer and hangs
// up as a random number says. Each seed must end with every message stored, once, in order.
import test, { mock } from "node:test";
import assert from "node:assert/strict";
import { Client } from "../dist/index.js";

const turn = () => new Promise((f) => setImmediate(f));

// world plays one seed and returns what was sent and what is stored, by their ids.
async function world(seed, { window, refusals }) {
  mock.timers.enable({ apis: ["setTimeout", "Date"], now: 1_760_000_000_000 });
  let state = seed * 7919 + 1;
  const chance = (n) => (state = (state * 48271) % 2147483647) % n;
  const stored = [];
  const connect = () => {
    const s = {
      readyState: 1,
      say(type, data) { if (this.readyState === 1) this.onmessage({ data: JSON.stringify({ type, data }) }); },
      ack(id, more) { this.say("message-ack", { client_msg_id: id, status: "success", ...more }); },
      hangUp() {
        if (this.readyState !== 1) return;
        this.readyState = 3;
        this.onclose({ code: [1006, 4002, 4000, 1001][chance(4)], reason: "" });
      },
      close() { this.readyState = 3; },
      send(d) {
        const { type, message_id: id } = JSON.parse(d);
        if (type === "ping") return soon(() => s.say("pong"));
        soon(() => take(id));
      },
    };
    // What a connection carries arrives in order, and not after it has ended.
    let at = 0;
    const soon = (f) => {
      at = Math.max(at + 1, Date.now() + chance(50));
      setTimeout(() => { if (s.readyState === 1) f(); }, at - Date.now());
    };
    const take = (id) => {
      const store = () => { if (!stored.includes(id)) stored.push(id); };
      const refuse = (code) => soon(() => s.ack(id, { status: "error", code, ...chance(2) && { retry_after_ms: chance(3_000) } }));
      switch (chance(refusals ? 12 : 8)) {
        case 0: return s.hangUp();
        case 1: // stored, and nobody is told
          store();
          return s.hangUp();
        case 2: // stored, and told in vain
          store();
          soon(() => s.hangUp());
          return soon(() => s.ack(id));
        case 3: // no answer at all
          if (chance(4) === 0) return refusals && chance(2) ? undefined : store();
          break;
        case 8: return refuse("OVERLOADED");
        case 9: return refuse("BROKER_UNAVAILABLE");
        case 10: return refuse("OUTCOME_UNKNOWN");
        case 11: // a late success, perhaps
          store();
          refuse("OUTCOME_UNKNOWN");
          if (chance(2)) setTimeout(() => s.ack(id), chance(5_000));
          return undefined;
      }
      store();
      soon(() => s.ack(id));
    };
    if (chance(8) === 0) setTimeout(() => s.hangUp(), chance(500));
    else setTimeout(() => s.say("connected", { heartbeat_ms: 30_000, max_message_bytes: 1000 }), chance(500));
    if (chance(6) === 0) setTimeout(() => s.say("reconnect", { retry_after_ms: chance(1_000) }), chance(3_000));
    return s;
  };
  const client = new Client({ urls: ["ws://a/ws", "ws://b/ws"], token: () => "t", window, webSocket: connect });
  const sent = [];
  let settled = 0;
  try {
    client.connect();
    for (let i = 0; i < 30; i++) {
      const s = client.send("note", i, "m-" + i);
      sent.push(s.messageId);
      void s.then(() => settled++);
      if (chance(3) === 0) {
        mock.timers.tick(chance(300));
        await turn();
      }
    }
    for (let i = 0; i < 20_000 && settled < sent.length; i++) {
      mock.timers.tick(100);
      await turn();
    }
    assert.equal(settled, sent.length, `seed ${seed}: what is settled`);
    assert.equal(client.pending, 0);
  } finally {
    client.close(true);
    mock.timers.reset();
  }
  return { sent, stored };
}

for (const [name, options, inOrder] of [
  ["one outstanding: once and in order, whatever is refused or cut", { window: 1, refusals: true }, true],
  ["a window: once and in order, whatever is cut", { window: 5, refusals: false }, true],
  ["a window: once, whatever is refused or cut", { window: 5, refusals: true }, false],
]) {
  test(name, { timeout: 120_000 }, async () => {
    for (let seed = 1; seed <= 40; seed++) {
      const { sent, stored } = await world(seed, options);
      assert.deepEqual(inOrder ? stored : stored.toSorted(), inOrder ? sent : sent.toSorted(), `seed ${seed}`);
    }
  });
}
