// Against a gateway that is played, with a clock that the test sets: what a real one does too seldom, or too
// slowly.
import test, { mock } from "node:test";
import assert from "node:assert/strict";
import { Client, ClientError } from "../dist/index.js";

// A test's promises are settled once the event loop has turned; its clock stands still meanwhile.
const turn = () => new Promise((f) => setImmediate(f));
const tick = async (ms) => {
  for (; ms > 0; ms -= 1_000) mock.timers.tick(Math.min(ms, 1_000)); // a timer that a timer sets counts from the end of a step
  await turn();
};

const limit = { timeout: 30_000 };
const jwt = (seconds) => `h.${Buffer.from(JSON.stringify({ exp: Date.now() / 1000 + seconds })).toString("base64url")}.s`;

// played runs f with a client whose connections are in `sockets`.
function played(name, options, f) {
  test(name, limit, async () => {
    mock.timers.enable({ apis: ["setTimeout", "Date"], now: 1_760_000_000_000 });
    const sockets = [];
    const states = [];
    const errors = [];
    const client = new Client({
      urls: "ws://gateway/ws", token: () => "opaque",
      webSocket: (url, protocols, headers) => {
        const s = {
          url: new URL(url), protocols, headers, readyState: 1, sent: [], raw: [], closed: null,
          send(d) { this.raw.push(d); this.sent.push(JSON.parse(d)); },
          close(code) { this.readyState = 3; this.closed = code; },
          text(d) { this.onmessage({ data: d }); },
          say(type, data, more) { this.text(JSON.stringify({ type, data, ...more })); },
          hello(more) { this.say("connected", { gateway_id: "g", session_id: "s", heartbeat_ms: 30_000, max_message_bytes: 1000, ...more }); },
          ack(id, more) { this.say("message-ack", { client_msg_id: id, status: "success", ...more }); },
          end(code, reason = "") { this.readyState = 3; this.onclose({ code, reason }); },
          get ids() { return this.sent.map((f) => f.message_id); },
          get last() { return this.sent.at(-1); },
        };
        sockets.push(s);
        return s;
      },
      ...options,
    });
    client.on("state", (e) => states.push(e));
    client.on("error", (e) => errors.push(e));
    try {
      await f({ client, sockets, states, errors, async open() { client.connect(); await turn(); sockets.at(-1).hello(); return sockets.at(-1); } });
    } finally {
      client.close(true);
      mock.timers.reset();
    }
  });
}

// settled tells what became of a promise, now.
async function settled(p) {
  let s = "pending";
  p.then((v) => { s = v; }, (e) => { s = e; });
  await turn();
  return s;
}

const unknown = { status: "error", code: "OUTCOME_UNKNOWN" };

// --- sending ---

played("OUTCOME_UNKNOWN: a late success settles it", {}, async ({ client, open }) => {
  const sent = client.send("t", 1, "m-1"), next = client.send("t", 2, "m-2");
  const s = await open();
  s.ack("m-1", unknown);
  await tick(900);
  assert.equal(client.pending, 2);
  s.ack("m-1", { offset: 7 });
  assert.equal((await sent).offset, 7);
  assert.deepEqual(s.ids, ["m-1", "m-2"]);
  s.ack("m-2");
  await next;
});

played("OUTCOME_UNKNOWN: without one it is sent again under its id, and both answers are taken", {}, async ({ client, open }) => {
  const sent = client.send("t", 1, "m-1"), next = client.send("t", 2, "m-2");
  const s = await open();
  s.ack("m-1", unknown);
  await tick(1_200);
  assert.deepEqual(s.ids, ["m-1", "m-1"]);
  s.ack("m-1", { offset: 7 });
  s.ack("m-1", { offset: 7 });
  s.ack("m-1", unknown);
  assert.equal((await sent).offset, 7);
  assert.equal(await settled(next), "pending");
  s.ack("m-2");
  await next;
  assert.deepEqual(s.ids, ["m-1", "m-1", "m-2"]);
});

for (const code of ["OVERLOADED", "BROKER_UNAVAILABLE", "RATE_LIMITED", "AUTH_FAILED", "TOKEN_EXPIRED"]) {
  played(`${code}: not before retry_after_ms, under the same id, and nothing else before it`, {}, async ({ client, open }) => {
    client.send("t", 1, "m-1");
    client.send("t", 2, "m-2");
    const s = await open();
    s.ack("m-1", { status: "error", code, retry_after_ms: 5_000 });
    await tick(4_999);
    assert.deepEqual(s.ids, ["m-1"]);
    await tick(1_001);
    assert.deepEqual(s.ids, ["m-1", "m-1"]);
    s.ack("m-1");
    assert.deepEqual(s.ids, ["m-1", "m-1", "m-2"]);
    s.ack("m-2");
  });
}

played("without retry_after_ms later each time, with a bound", {}, async ({ client, open }) => {
  client.send("t", 1, "m-1");
  const s = await open();
  const waits = [];
  for (let i = 0; i < 8; i++) {
    s.ack("m-1", { status: "error", code: "OVERLOADED" });
    let waited = 0;
    for (const n = s.sent.length; s.sent.filter((f) => f.message_id).length < i + 2 && waited < 20_000; waited += 50) await tick(50);
    waits.push(waited);
  }
  assert.ok(waits[0] <= 500 && waits[0] >= 250, String(waits));
  assert.ok(waits.at(-1) <= 10_000 && waits.at(-1) >= 5_000, String(waits));
});

played("retry_after_ms holds across a reconnect, and has a bound", {}, async ({ client, open, sockets }) => {
  client.send("t", 1, "m-1");
  let s = await open();
  s.ack("m-1", { status: "error", code: "RATE_LIMITED", retry_after_ms: 20_000 });
  s.end(1006);
  await tick(1_000);
  s = sockets.at(-1);
  s.hello();
  await tick(15_000);
  assert.deepEqual(s.ids.filter(Boolean), []);
  await tick(10_000);
  assert.deepEqual(s.ids.filter(Boolean), ["m-1"]);
  for (const retry_after_ms of [1e300, "soon", -5, null]) {
    s.ack("m-1", { status: "error", code: "RATE_LIMITED", retry_after_ms });
    const n = s.ids.filter(Boolean).length;
    for (let t = 0; t < 400_000 && s.ids.filter(Boolean).length === n; t += 10_000) {
      s.say("pong");
      await tick(10_000);
    }
    assert.equal(s.ids.filter(Boolean).length, n + 1, String(retry_after_ms));
  }
});

played("a reconnect sends everything again, in order", { window: 3 }, async ({ client, open, sockets }) => {
  const sent = [1, 2, 3, 4, 5].map((i) => client.send("t", i, "m-" + i));
  let s = await open();
  assert.deepEqual(s.ids, ["m-1", "m-2", "m-3"]);
  s.ack("m-2"); // of another partition's leader, say
  assert.deepEqual(s.ids, ["m-1", "m-2", "m-3", "m-4"]);
  s.end(1006);
  s.ack("m-1"); // of the connection that is gone
  assert.equal(await settled(sent[0]), "pending");
  await tick(1_000);
  s = sockets.at(-1);
  s.hello();
  assert.deepEqual(s.ids, ["m-1", "m-3", "m-4"]);
  for (const i of [1, 3, 4, 5]) s.ack("m-" + i);
  await Promise.all(sent);
  assert.deepEqual(s.ids, ["m-1", "m-3", "m-4", "m-5"]);
});

played("window: after a refusal one at a time, from the refused one on", { window: 3 }, async ({ client, open }) => {
  const sent = [1, 2, 3, 4, 5, 6].map((i) => client.send("t", i, "m-" + i));
  const s = await open();
  s.ack("m-1", { status: "error", code: "OVERLOADED", retry_after_ms: 100 });
  await tick(1_000);
  assert.deepEqual(s.ids, ["m-1", "m-2", "m-3"], "not while others are outstanding");
  s.ack("m-2");
  s.ack("m-3", { status: "error", code: "OVERLOADED", retry_after_ms: 100 });
  assert.equal(s.last.message_id, "m-1");
  await tick(1_000);
  assert.deepEqual(s.ids, ["m-1", "m-2", "m-3", "m-1"]);
  s.ack("m-1");
  assert.deepEqual(s.ids, ["m-1", "m-2", "m-3", "m-1", "m-3"]);
  s.ack("m-3");
  assert.deepEqual(s.ids.slice(5), ["m-4", "m-5", "m-6"]);
  for (const i of [4, 5, 6]) s.ack("m-" + i);
  await Promise.all(sent);
});

played("what is refused for good, too large, too much, twice there or no message is rejected", { outbox: 2 }, async ({ client, open }) => {
  const refused = (p, code) => assert.rejects(p, { name: "ClientError", code });
  const large = client.send("t", "x".repeat(1000), "m-1");
  const invalid = client.send("t", 2, "m-2");
  const all = [refused(large, "MESSAGE_TOO_LARGE"), refused(invalid, "INVALID_MESSAGE"), refused(client.send("t", 3), "OUTBOX_FULL")];
  const s = await open();
  s.ack("m-2", { status: "error", code: "INVALID_MESSAGE" });
  await Promise.all(all);
  assert.deepEqual(s.ids, ["m-2"]);
  const one = client.send("t", 1, "m-3");
  await refused(client.send("t", 1, "m-3"), "DUPLICATE_ID");
  s.ack("m-3");
  await one;
  const circle = {};
  circle.circle = circle;
  for (const [type, data, id] of [["ping", 1], ["", 1], ["delivery-ack", 1], ["refresh-token", 1], [undefined, 1], [7, 1], ["t", 1n], ["t", circle],
    ["t", 1, ""], ["t", 1, "a\n"], ["t", 1, "x".repeat(129)], ["t", 1, "\ud800"], ["t", 1, "ü".repeat(65)]]) {
    await refused(client.send(type, data, id), "INVALID_MESSAGE");
  }
  assert.equal(client.pending, 0);
  const last = client.send("t", undefined);
  assert.equal(s.last.data, null);
  s.ack(last.messageId);
  await last;
  const left = refused(client.send("t", 4), "CLOSED");
  client.close();
  await left;
});

played("data is what it was when it was sent", {}, async ({ client, open }) => {
  const data = { n: 1 };
  client.send("t", data, "m-1");
  data.n = 2;
  assert.deepEqual((await open()).last.data, { n: 1 });
});

played("a message that is not answered means a dead connection", { ackTimeoutMs: 5_000 }, async ({ client, open, sockets, states }) => {
  client.send("t", 1, "m-1");
  const s = await open();
  for (let i = 0; i < 4; i++) {
    s.say("pong");
    await tick(1_000);
  }
  assert.equal(client.state, "online");
  await tick(1_000);
  assert.equal(states.at(-1).error.code, "TIMEOUT");
  assert.equal(s.closed, 1000);
  await tick(1_000);
  sockets.at(-1).hello();
  assert.deepEqual(sockets.at(-1).ids, ["m-1"]);
});

played("close(true) keeps the outbox for connect()", {}, async ({ client, open, sockets }) => {
  const sent = client.send("t", 1, "m-1");
  const s = await open();
  client.close(true);
  assert.equal(s.closed, 1000);
  client.connect();
  await turn();
  sockets.at(-1).hello();
  sockets.at(-1).ack("m-1");
  await sent;
});

// --- connecting ---

for (const code of [1000, 1001, 1006, 1008, 1009, 1011, 1013, 4000, 4001, 4002, 4400, 4499, 4600]) {
  played(`${code} leads to another connection`, {}, async ({ client, open, sockets, states }) => {
    (await open()).end(code, "why");
    assert.equal(states.at(-1).state, "waiting");
    assert.equal(states.at(-1).error.closeCode, code);
    assert.match(states.at(-1).error.message, /why/);
    await tick(1_000);
    assert.equal(sockets.length, 2);
    assert.equal(client.state, "connecting");
  });
}

for (const code of [4500, 4501, 4504, 4599]) {
  played(`${code} ends it; connect() begins anew`, {}, async ({ client, open, sockets, states }) => {
    const sent = client.send("t", 1, "m-1");
    (await open()).end(code, "why");
    assert.equal(states.at(-1).state, "stopped");
    assert.equal(states.at(-1).error.closeCode, code);
    await tick(600_000);
    assert.equal(sockets.length, 1);
    assert.equal(await settled(sent), "pending");
    (await open()).ack("m-1");
    await sent;
  });
}

played("back-off: jittered, growing to 10 s, from the start after 10 steady seconds or a stored message", { urls: ["ws://a/ws", "ws://b/ws"] }, async ({ client, open, sockets, states }) => {
  client.connect();
  await turn();
  const waits = [];
  const fail = async (s) => {
    s.end(1006);
    waits.push(states.at(-1).retryAt - Date.now());
    await tick(waits.at(-1));
    await turn();
    return sockets.at(-1);
  };
  let s = sockets[0];
  for (let i = 0; i < 10; i++) {
    if (i % 2) s.hello(); // a gateway that greets and hangs up is no better than none
    s = await fail(s);
  }
  waits.forEach((ms, i) => {
    const bound = Math.min(10_000, 250 * 2 ** i);
    assert.ok(ms >= bound / 2 && ms <= bound, String(waits));
  });
  assert.deepEqual(sockets.slice(0, 4).map((s) => s.url.host), ["a", "b", "a", "b"]);
  s.hello();
  await tick(10_000);
  s = await fail(s);
  assert.ok(waits.at(-1) <= 250);
  s = await fail(await fail(s));
  assert.ok(waits.at(-1) >= 500);
  const sent = client.send("t", 1, "m-1");
  s.hello();
  s.ack("m-1");
  await sent;
  await fail(s);
  assert.ok(waits.at(-1) <= 250);
});

played("jitter: no two wait alike", {}, async ({ states, open }) => {
  const seen = new Set();
  for (let i = 0; i < 5; i++) {
    (await open()).end(1006);
    seen.add((states.at(-1).retryAt - Date.now()) / (250 * 2 ** i));
  }
  assert.ok(seen.size > 3);
});

played("a gateway that drains: not before retry_after_ms", {}, async ({ open, sockets }) => {
  const s = await open();
  s.say("reconnect", { retry_after_ms: 5_000, reason: "draining" });
  s.end(4002);
  await tick(4_999);
  assert.equal(sockets.length, 1);
  await tick(1_000);
  assert.equal(sockets.length, 2);
});

played("a gateway that drains: moves on by itself, once what is outstanding is answered", { urls: ["ws://a/ws", "ws://b/ws"] }, async ({ client, open, sockets, states }) => {
  const s = await open();
  s.say("reconnect", { retry_after_ms: 500, reason: "draining" });
  const sent = [1, 2].map((i) => client.send("t", i, "m-" + i));
  await tick(600);
  assert.equal(sockets.length, 1, "an answer is awaited");
  s.ack("m-1");
  await sent[0];
  await turn();
  assert.deepEqual(sockets.map((s) => s.url.host), ["a", "b"]);
  assert.equal(s.closed, 1000);
  sockets[1].hello();
  assert.deepEqual(sockets[1].ids, ["m-2"], "m-2 was kept back");
  assert.deepEqual(states.map((e) => e.state), ["connecting", "online", "connecting", "online"]);
});

played("a gateway that drains and answers no more is left after 2 s", {}, async ({ client, open, sockets }) => {
  const s = await open();
  client.send("t", 1, "m-1");
  s.say("reconnect", { retry_after_ms: 500 });
  await tick(500);
  await tick(1_999);
  assert.equal(sockets.length, 1);
  await tick(1);
  assert.equal(sockets.length, 2);
});

played("connect(): at once while waiting, nothing while connecting or online", {}, async ({ client, open, sockets }) => {
  const s = await open();
  client.connect();
  await turn();
  assert.equal(sockets.length, 1);
  s.end(1006);
  client.connect();
  client.connect();
  await turn();
  assert.equal(sockets.length, 2);
});

played("a gateway that never says connected is left", {}, async ({ client, sockets, states }) => {
  client.connect();
  await turn();
  await tick(9_999);
  assert.equal(client.state, "connecting");
  await tick(1);
  assert.equal(states.at(-1).error.code, "TIMEOUT");
});

played("a WebSocket that fails without a close is left", {}, async ({ client, sockets, states }) => {
  client.connect();
  await turn();
  sockets[0].onerror({});
  await tick(1_000);
  assert.equal(states.at(-1).state, "waiting");
});

played("silence: a ping after a heartbeat, another connection after 2.5", {}, async ({ client, open, sockets, states }) => {
  const s = await open();
  await tick(29_999);
  assert.deepEqual(s.sent, []);
  await tick(1);
  assert.deepEqual(s.sent, [{ type: "ping" }]);
  s.say("pong");
  await tick(30_000);
  assert.equal(s.sent.length, 2);
  await tick(44_999);
  assert.equal(client.state, "online");
  await tick(1);
  assert.equal(states.at(-1).error.code, "TIMEOUT");
});

played("anything that comes is a sign of life", {}, async ({ client, open }) => {
  const s = await open();
  for (let i = 0; i < 20; i++) {
    await tick(29_000);
    s.say("new-message", {}, { message_id: "m-" + i });
  }
  assert.equal(client.state, "online");
  assert.deepEqual(s.sent, []);
});

for (const [what, text] of Object.entries({
  "no JSON": "{", "no object": "null", "no type": "{}", "connected without data": '{"type":"connected"}', "an ack without data": '{"type":"message-ack"}',
  "an ack of nothing": '{"type":"message-ack","data":null}', "an error without data": '{"type":"error"}',
})) {
  played(`a gateway that sends ${what} is left`, {}, async ({ client, open, states }) => {
    (await open()).text(text);
    if (client.state === "online") assert.match(text, /connected/); // a second one is nothing
    else assert.equal(states.at(-1).error.code, "PROTOCOL");
    client.close();
    client.connect();
    await turn();
  });
}

played("a first frame that is no connected frame", {}, async ({ client, sockets, states }) => {
  client.connect();
  await turn();
  sockets[0].say("pong");
  assert.equal(client.state, "connecting");
  sockets[0].text('{"type":"connected"}');
  assert.equal(states.at(-1).error.code, "PROTOCOL");
});

for (const heartbeat_ms of [0, -1, 1, "soon", null, 1e-9]) {
  played(`a heartbeat of ${heartbeat_ms} is none`, {}, async ({ client, sockets }) => {
    client.connect();
    await turn();
    sockets[0].hello({ heartbeat_ms, max_message_bytes: undefined });
    await tick(1_000);
    assert.deepEqual(sockets[0].sent, []);
    assert.equal(client.session.heartbeat_ms, 30_000);
    client.send("t", "x".repeat(5_000));
    assert.equal(sockets[0].sent.length, 1);
  });
}

played("what an old connection says is nothing", {}, async ({ client, open, sockets }) => {
  const old = await open();
  client.close();
  const s = await open();
  const sent = client.send("t", 1, "m-1");
  const got = [];
  client.on("message", (m) => got.push(m));
  old.ack("m-1");
  old.say("new-message", {}, { message_id: "x" });
  old.end(4500);
  assert.equal(await settled(sent), "pending");
  assert.deepEqual(got, []);
  assert.equal(client.state, "online");
  s.ack("m-1");
  await sent;
});

// --- tokens ---

for (const [tokenIn, protocols, headers, query] of [
  [undefined, ["im.json.v1", "bearer.T"], undefined, null],
  ["subprotocol", ["im.json.v1", "bearer.T"], undefined, null],
  ["query", ["im.json.v1"], undefined, "T"],
  ["header", ["im.json.v1"], { Authorization: "Bearer T" }, null],
]) {
  played(`the token by ${tokenIn}`, { tokenIn, token: () => "T", deviceId: "d 1", device: "web", urls: "wss://g/ws?x=1" }, async ({ open }) => {
    const { url, ...s } = await open();
    assert.deepEqual([s.protocols, s.headers, url.searchParams.get("token")], [protocols, headers, query]);
    assert.deepEqual(["x", "auth", "ack", "device_id", "device"].map((k) => url.searchParams.get(k)), ["1", "close", null, "d 1", "web"]);
  });
}

{
  const reasons = [];
  played("an expiring token is refreshed in the session, again and again", {
    token: (reason) => { reasons.push(reason); return jwt(600); },
  }, async ({ open, sockets }) => {
    const s = await open();
    const alive = async (ms) => {
      for (; ms > 0; ms -= 20_000) {
        await tick(Math.min(ms, 20_000));
        s.say("pong");
      }
    };
    await alive(539_000);
    assert.deepEqual(reasons, ["connect"]);
    await alive(1_500);
    assert.deepEqual(reasons, ["connect", "expiring"]);
    assert.equal(s.last.type, "refresh-token");
    s.say("token-refreshed", { expires_at: Date.now() + 100_000 });
    await alive(80_000);
    assert.deepEqual(reasons, ["connect", "expiring", "expiring"]);
    assert.equal(sockets.length, 1);
  });
}

for (const code of ["RATE_LIMITED", "OVERLOADED", "AUTH_FAILED"]) {
  const reasons = [];
  played(`a refresh that is answered ${code} is asked for again`, {
    token: (reason) => { reasons.push(reason); return jwt(100); },
  }, async ({ open, errors }) => {
    const s = await open();
    const refreshes = () => s.sent.filter((f) => f.type === "refresh-token").length;
    const alive = async (ms) => {
      for (; ms > 0; ms -= 500) {
        await tick(500);
        s.say("pong");
      }
    };
    await alive(81_000);
    assert.equal(refreshes(), 1);
    s.say("error", { code, message: "why" });
    await alive(16_000);
    assert.equal(refreshes(), 2);
    s.say("token-refreshed", { expires_at: Date.now() + 3_600_000 });
    await alive(60_000);
    assert.equal(refreshes(), 2);
    assert.deepEqual(reasons, ["connect", "expiring", "expiring"]);
    assert.deepEqual(errors.map((e) => e.code), [code]);
  });
}

{
  let calls = 0;
  played("a token callback that fails is asked again while the old token lasts", {
    token: (reason) => { calls++; if (reason === "expiring") throw new Error("no"); return jwt(100); },
  }, async ({ client, open, errors }) => {
    const s = await open();
    for (let i = 0; i < 50; i++) {
      await tick(2_000);
      s.say("pong");
    }
    assert.ok(calls >= 3 && calls < 15, String(calls));
    assert.ok(errors.every((e) => e.code === "TOKEN" && e.cause.message === "no"));
    assert.equal(client.state, "online", "it is the gateway that says when");
  });
}

for (const code of [4502, 4503]) {
  let n = 0;
  const reasons = [];
  played(`${code}: another token, twice in a row at most`, { token: (r) => { reasons.push(r); return "t" + ++n; } }, async ({ client, sockets, states, open }) => {
    client.connect();
    await turn();
    sockets[0].end(code);
    await tick(1_000);
    sockets[1].hello();
    await tick(10_000); // steady
    for (let i = 1; i <= 2; i++) {
      sockets[i].end(code);
      assert.equal(client.state, "waiting");
      await tick(1_000);
    }
    sockets[3].end(code);
    assert.equal(states.at(-1).state, "stopped");
    assert.equal(states.at(-1).error.closeCode, code);
    assert.deepEqual(reasons, ["connect", "refused", "refused", "refused"]);
    await open();
    assert.equal(reasons.at(-1), "refused");
    assert.equal(client.state, "online");
  });
  played(`${code}: not with the same token again`, { token: () => "same" }, async ({ client, sockets, states }) => {
    client.connect();
    await turn();
    sockets[0].end(code);
    await tick(60_000);
    assert.equal(sockets.length, 1);
    assert.equal(states.at(-1).state, "stopped");
    assert.equal(states.at(-1).error.closeCode, code);
  });
}

{
  let running = 0, calls = 0, answer;
  played("the token callback never runs twice at once", {
    token: () => {
      calls++;
      assert.equal(++running, 1);
      return new Promise((f) => { answer = f; }).finally(() => { running--; });
    },
  }, async ({ client, sockets }) => {
    for (let i = 0; i < 3; i++) {
      client.connect();
      await turn();
      client.close();
    }
    client.connect();
    await turn();
    assert.equal(calls, 1);
    answer("T");
    await turn();
    assert.equal(sockets.length, 1, "for the last of them");
  });
}

for (const bad of ["", null, undefined, 7, { token: "x" }]) {
  played(`a token that is ${JSON.stringify(bad)} is an error, and asked for again`, { token: () => bad }, async ({ client, errors, sockets, states }) => {
    client.connect();
    await turn();
    assert.equal(errors[0].code, "TOKEN");
    assert.equal(states.at(-1).state, "waiting");
    await tick(1_000);
    assert.equal(errors.length, 2);
    assert.equal(sockets.length, 0);
  });
}

test("what no WebSocket takes stops it, and the token stays out of the error", limit, async () => {
  for (const token of ["secret token", "secret\u0000"]) {
    const client = new Client({
      urls: "ws://127.0.0.1:1/ws", token: () => token,
      webSocket: (url, protocols) => { throw new SyntaxError(`the protocols ${protocols} are bad`); },
    });
    const stopped = new Promise((f) => client.on("state", (e) => { if (e.state === "stopped") f(e.error); }));
    client.connect();
    const e = await stopped;
    assert.equal(e.code, "CONNECT");
    assert.doesNotMatch(`${e} ${e.stack} ${e.cause}`, /secret/);
  }
});

// --- receiving ---

played("the last 1,024 message ids are remembered", {}, async ({ client, open }) => {
  const got = [];
  client.on("message", (m) => got.push(m.message_id));
  const s = await open();
  const say = (id) => s.say("new-message", {}, { message_id: id });
  for (let i = 0; i < 1_025; i++) say("m-" + i);
  for (let i = 1; i < 1_025; i++) say("m-" + i);
  assert.equal(got.length, 1_025);
  say("m-0"); // forgotten
  say(undefined);
  say(undefined);
  assert.equal(got.length, 1_028);
});

played("an ack waits for the listener, and stands for all before it", { ackDeliveries: true }, async ({ client, open, errors }) => {
  const seen = [];
  const finish = [];
  client.on("message", (m) => {
    seen.push(m.message_id);
    return new Promise((f, fail) => finish.push(m.message_id === "b" ? fail : f));
  });
  const s = await open();
  assert.equal(s.url.searchParams.get("ack"), "1");
  s.say("new-message", {}, { message_id: "a", delivery_id: 1 });
  s.say("new-message", {}, { message_id: "a", delivery_id: 2 });
  s.say("new-message", {}, { message_id: "b", delivery_id: 3 });
  await tick(1_000);
  assert.deepEqual([seen, s.sent], [["a"], []]);
  finish.shift()();
  await turn();
  await tick(20);
  assert.deepEqual(s.sent.map((f) => f.data.delivery_id), [2]);
  finish.shift()(new Error("mine"));
  await turn();
  await tick(20);
  assert.deepEqual(s.sent.map((f) => f.data.delivery_id), [2, 3]);
  assert.deepEqual([errors[0].code, errors[0].cause.message], ["LISTENER", "mine"]);
});

played("what is acknowledged on its way out: close() sends it", { ackDeliveries: true }, async ({ client, open }) => {
  const s = await open();
  s.say("new-message", {}, { message_id: "a", delivery_id: 1 });
  await turn();
  client.close();
  assert.deepEqual(s.sent.map((f) => f.data.delivery_id), [1]);
});

played("a flood of records is acknowledged in few frames", { ackDeliveries: true }, async ({ client, open }) => {
  const s = await open();
  for (let i = 1; i <= 5_000; i++) {
    s.say("new-message", {}, { message_id: "m-" + i, delivery_id: i });
    if (i % 100 === 0) await turn();
  }
  await tick(20);
  assert.equal(s.last.data.delivery_id, 5_000);
  assert.equal(s.sent.length, Math.ceil(5_000 / 64));
});

played("many records at once are acknowledged before their time", { ackDeliveries: true }, async ({ open }) => {
  const s = await open();
  for (let i = 1; i <= 200; i++) s.say("new-message", {}, { message_id: "m-" + i, delivery_id: i });
  await turn();
  assert.deepEqual(s.sent.map((f) => f.data.delivery_id), [64, 128, 192]);
  await tick(20);
  assert.deepEqual(s.sent.map((f) => f.data.delivery_id), [64, 128, 192, 200]);
});

played("a record is one whatever its type", {}, async ({ client, open, sockets, errors }) => {
  const types = ["message-ack", "reconnect", "token-refreshed", "error", "connected", "pong"];
  const got = [];
  client.on("message", (m) => { got.push(m.type); });
  const sent = client.send("t", 1, "m-1");
  const s = await open();
  for (const type of types) s.say(type, { client_msg_id: "m-1", status: "success", retry_after_ms: 0 }, { message_id: "r-" + type });
  assert.equal(await settled(sent), "pending");
  await tick(3_000);
  assert.deepEqual([got, sockets.length, errors], [types, 1, []]);
  s.ack("m-1", { offset: 7 });
  assert.equal((await sent).offset, 7);
});

played("records of a connection that is gone are handled, and not acknowledged to another", { ackDeliveries: true }, async ({ client, open, sockets }) => {
  const seen = [];
  let finish;
  client.on("message", (m) => { seen.push(m.message_id); return new Promise((f) => { finish = f; }); });
  let s = await open();
  s.say("new-message", {}, { message_id: "a", delivery_id: 1 });
  s.say("new-message", {}, { message_id: "b", delivery_id: 2 });
  await turn();
  s.end(1006);
  await tick(1_000);
  s = sockets.at(-1);
  s.hello();
  finish();
  await turn();
  finish();
  await tick(20);
  assert.deepEqual([seen, s.sent], [["a", "b"], []]);
  s.say("new-message", {}, { message_id: "b", delivery_id: 1 });
  await turn();
  await tick(20);
  assert.deepEqual([seen, s.sent.map((f) => f.data.delivery_id)], [["a", "b"], [1]]);
});

played("records that were held at close() come again after connect()", { ackDeliveries: true }, async ({ client, open, sockets }) => {
  const seen = [];
  let finish;
  client.on("message", (m) => { seen.push(m.message_id); return new Promise((f) => { finish = f; }); });
  let s = await open();
  s.say("new-message", {}, { message_id: "a", delivery_id: 1 });
  s.say("new-message", {}, { message_id: "b", delivery_id: 2 });
  await turn();
  client.close();
  finish();
  await turn();
  assert.deepEqual(seen, ["a"], "nothing comes once it is closed");
  s = await open();
  s.say("new-message", {}, { message_id: "b", delivery_id: 1 });
  await turn();
  assert.deepEqual(seen, ["a", "b"]);
});

played("listeners that do not keep up: the gateway gets back what is too much", { ackDeliveries: true }, async ({ client, open, states }) => {
  client.on("message", () => new Promise(() => {}));
  const s = await open();
  for (let i = 1; i <= 400 && client.state === "online"; i++) {
    s.say("new-message", {}, { message_id: "m-" + i, delivery_id: i });
    await turn();
  }
  assert.equal(states.at(-1).state, "waiting");
  assert.equal(states.at(-1).error.code, "SLOW_LISTENER");
});

// --- events ---

played("listeners that fail or close break nothing", {}, async ({ client, open, errors, sockets }) => {
  client.on("connected", () => { throw new Error("one"); });
  client.on("connected", async () => { throw new Error("two"); });
  client.on("error", () => { throw new Error("three"); });
  client.on("error", async () => { throw new Error("four"); });
  const off = client.on("state", () => { throw new Error("five"); });
  const s = await open();
  await turn();
  assert.deepEqual(errors.map((e) => e.cause.message).sort(), ["five", "five", "one", "two"]);
  off();
  s.say("error", { code: "RATE_LIMITED", message: "slow down" });
  assert.equal(errors.at(-1).code, "RATE_LIMITED");
  assert.ok(errors.at(-1) instanceof ClientError);
  client.close();
  assert.equal(client.state, "stopped");
  for (const state of ["connecting", "online", "waiting"]) { // closes in the middle of it
    const stop = client.on("state", (e) => { if (e.state === state) client.close(); });
    client.connect();
    await turn();
    if (state !== "connecting") sockets.at(-1).hello();
    if (state === "waiting") sockets.at(-1).end(1006);
    stop();
    const n = sockets.length;
    await tick(60_000);
    assert.equal(client.state, "stopped", state);
    assert.equal(sockets.length, n, state);
  }
});

played("a frame of a later version is a message, not an error", {}, async ({ client, open }) => {
  const got = [];
  client.on("message", (m) => got.push(m.type));
  (await open()).say("typing", null);
  assert.deepEqual(got, ["typing"]);
});

// A browser says when its network is back, and when its page is seen again.
function device(t) {
  const page = new EventTarget();
  const document = new EventTarget();
  document.visibilityState = "visible";
  for (const [name, value] of Object.entries({ addEventListener: page.addEventListener.bind(page), document })) {
    globalThis[name] = value;
    t.after(() => { delete globalThis[name]; });
  }
  return { say: (name) => page.dispatchEvent(new Event(name)), show: (how) => { document.visibilityState = how; document.dispatchEvent(new Event("visibilitychange")); } };
}

test("a network that is back, a page that is seen again", limit, async (t) => {
  const { say, show } = device(t);
  const sockets = [];
  const client = new Client({
    urls: "ws://g/ws", token: () => "t",
    webSocket: () => {
      const s = {
        readyState: 1, sent: [], send(d) { this.sent.push(JSON.parse(d).type); }, close() { this.readyState = 3; },
        say(type, data) { this.onmessage({ data: JSON.stringify({ type, data }) }); },
      };
      sockets.push(s);
      return s;
    },
  });
  mock.timers.enable({ apis: ["setTimeout", "Date"], now: 1_760_000_000_000 });
  t.after(() => mock.timers.reset());
  const expect = async (n, state) => {
    await turn();
    assert.deepEqual([sockets.length, client.state], [n, state]);
  };
  say("online"); // before connect() it is nobody's
  await expect(0, "idle");
  client.connect();
  await expect(1, "connecting");
  say("online");
  await expect(1, "connecting");
  sockets[0].say("connected", {});
  show("hidden");
  assert.deepEqual(sockets[0].sent, []);
  show("visible");
  assert.deepEqual(sockets[0].sent, ["ping"]);
  sockets[0].say("pong");
  await tick(10_000);
  await expect(1, "online");
  say("offline");
  assert.deepEqual(sockets[0].sent, ["ping", "ping"]);
  await tick(10_000); // no answer
  await expect(1, "waiting");
  say("online"); // and not after the back-off
  await expect(2, "connecting");
  sockets[1].say("connected", {});
  sockets[1].say("reconnect", { retry_after_ms: 5_000 });
  sockets[1].onclose({ code: 4002, reason: "" });
  say("online"); // a gateway that drains has its time
  await expect(2, "waiting");
  client.close();
  say("online");
  show("visible");
  await expect(2, "stopped");
});

test("options that cannot be are refused at once", () => {
  const good = { urls: "ws://g/ws", token: () => "t", webSocket: () => assert.fail() };
  for (const bad of [{ urls: [] }, { urls: "g" }, { urls: ["ws://g/ws", "http://g/ws"] }, { deviceId: "" }, { deviceId: "a\n" }, { deviceId: "x".repeat(129) },
    { device: "Web" }, { device: "" }, { device: "x".repeat(33) }, { outbox: 0 }, { window: 0 }, { window: NaN }, { ackTimeoutMs: -1 }]) {
    assert.throws(() => new Client({ ...good, ...bad }), TypeError, JSON.stringify(bad));
  }
  new Client({ ...good, deviceId: "x".repeat(128), device: "web_1-a" });
});
