// Against a gateway that is played: what a real one does too seldom.
import test from "node:test";
import assert from "node:assert/strict";
import { Client, decode, encode } from "../dist/index.js";
import { event } from "./gateway.mjs";

// play makes a client whose connections are in `sockets`; each says `connected` when dialled.
function play(options = {}, heartbeat_ms = 30_000) {
  const sockets = [];
  const client = new Client({
    urls: "ws://gateway/ws", token: () => "opaque", ...options,
    webSocket: (url) => {
      const s = {
        url, readyState: 1, sent: [], waiting: [],
        send(d) { this.sent.push(JSON.parse(d)); this.waiting.shift()?.(); },
        close() { this.readyState = 3; },
        say(frame) { this.onmessage({ data: JSON.stringify(frame) }); },
        ack(id, more) { this.say({ type: "message-ack", data: { client_msg_id: id, status: "success", ...more } }); },
        async next(n) { while (this.sent.length < n) await new Promise((f) => this.waiting.push(f)); return this.sent[n - 1]; },
      };
      sockets.push(s);
      queueMicrotask(() => s.say({ type: "connected", data: { gateway_id: "g", session_id: "s", heartbeat_ms, max_message_bytes: 1000 } }));
      return s;
    },
  });
  return { client, sockets };
}
const limit = { timeout: 30_000 };
const unknown = { status: "error", code: "OUTCOME_UNKNOWN" };

test("OUTCOME_UNKNOWN: a late success settles it", limit, async () => {
  const { client, sockets } = play();
  client.connect();
  const sent = client.send("t", 1, "m-1"), next = client.send("t", 2, "m-2");
  await event(client, "connected");
  const [s] = sockets;
  s.ack("m-1", { ...unknown, retry_after_ms: 20_000 });
  assert.equal(client.pending, 2);
  s.ack("m-1", { offset: 7 });
  assert.equal((await sent).offset, 7);
  assert.deepEqual(s.sent.map((f) => f.message_id), ["m-1", "m-2"]);
  s.ack("m-2");
  await next;
  client.close();
});

test("a refusal is sent again under the same id, and nothing before it", limit, async () => {
  for (const code of ["OUTCOME_UNKNOWN", "OVERLOADED", "BROKER_UNAVAILABLE", "RATE_LIMITED"]) {
    const { client, sockets } = play();
    client.connect();
    const sent = [client.send("t", 1, "m-1"), client.send("t", 2, "m-2")];
    await event(client, "connected");
    const [s] = sockets;
    s.ack("m-1", { status: "error", code, retry_after_ms: 1 });
    await s.next(2);
    s.ack("m-1");
    s.ack("m-2");
    await Promise.all(sent);
    assert.deepEqual(s.sent.map((f) => f.message_id), ["m-1", "m-1", "m-2"]);
    client.close();
  }
});

test("what is refused for good, too large or too much is rejected", limit, async () => {
  const { client, sockets } = play({ outboxLimit: 2 });
  const [large, invalid, full] = [client.send("t", "x".repeat(1000)), client.send("t", 2, "m-2"), client.send("t", 3)];
  const refused = [
    assert.rejects(large, { code: "MESSAGE_TOO_LARGE" }),
    assert.rejects(invalid, { code: "INVALID_MESSAGE" }),
    assert.rejects(full, { code: "OUTBOX_FULL" }),
  ];
  client.connect();
  await event(client, "connected");
  sockets[0].ack("m-2", { status: "error", code: "INVALID_MESSAGE" });
  await Promise.all(refused);
  const left = assert.rejects(client.send("t", 4), { code: "CLOSED" });
  client.close();
  await left;
});

test("40xx reconnects, not before retry_after_ms; 45xx does not", limit, async () => {
  const { client, sockets } = play();
  client.connect();
  await event(client, "connected");
  const said = Date.now();
  sockets[0].say({ type: "reconnect", data: { retry_after_ms: 300 } });
  const waiting = event(client, "state", (e) => e.state === "waiting");
  sockets[0].onclose({ code: 4002, reason: "" });
  assert.ok((await waiting).retryAt >= said + 300);
  await event(client, "connected");
  const stopped = event(client, "state", (e) => e.state === "stopped");
  sockets[1].onclose({ code: 4501, reason: "kicked" });
  assert.equal((await stopped).error.closeCode, 4501);
  client.close();
});

test("an expiring token is refreshed in the session", limit, async () => {
  const jwt = (ms) => `h.${Buffer.from(JSON.stringify({ exp: (Date.now() + ms) / 1000 })).toString("base64url")}.s`;
  const reasons = [];
  const { client, sockets } = play({ token: (reason) => { reasons.push(reason); return jwt(reason === "connect" ? 200 : 3_600_000); } });
  client.connect();
  await event(client, "connected");
  const frame = await sockets[0].next(1);
  assert.equal(frame.type, "refresh-token");
  assert.ok(frame.data.token);
  assert.deepEqual(reasons, ["connect", "expiring"]);
  client.close();
});

test("silence: ping, then another connection", limit, async () => {
  const { client, sockets } = play({}, 40);
  client.connect();
  await event(client, "connected");
  assert.equal((await sockets[0].next(1)).type, "ping");
  await event(client, "connected");
  assert.equal(sockets.length, 2);
  client.close();
});

test("duplicates are dropped and acknowledged; an ack waits for the listener", limit, async () => {
  const { client, sockets } = play({ ackDeliveries: true });
  const seen = [];
  let finish;
  const held = new Promise((f) => { finish = f; });
  client.on("message", async (m) => { seen.push(m.message_id); await held; });
  client.connect();
  await event(client, "connected");
  const [s] = sockets;
  assert.equal(new URL(s.url).searchParams.get("ack"), "1");
  s.say({ type: "new-message", message_id: "a", delivery_id: 1, data: {} });
  s.say({ type: "new-message", message_id: "a", delivery_id: 2, data: {} });
  await new Promise((f) => setImmediate(f));
  assert.equal(s.sent.length, 0);
  finish();
  await s.next(2);
  assert.deepEqual(s.sent.map((f) => f.data.delivery_id), [1, 2]);
  assert.deepEqual(seen, ["a"]);
  client.close();
});

test("protobuf", () => {
  const b = encode({ type: "t", message_id: "m", data: { a: "ü" }, timestamp: 1760000000000 });
  assert.deepEqual(decode(b), { type: "t", message_id: "m", data: { a: "ü" }, timestamp: 1760000000000 });
  assert.deepEqual(decode(Uint8Array.of(0x0a, 1, 0x74, 0x28, 0xac, 2, 0x7d, 1, 2, 3, 4, 0x79, 1, 2, 3, 4, 5, 6, 7, 8)), { type: "t", delivery_id: 300 });
  for (const bad of [[0x0a], [0x0a, 5, 1], [0xff], [0x0b], Array(12).fill(0xff)]) assert.throws(() => decode(Uint8Array.from(bad)));
});
