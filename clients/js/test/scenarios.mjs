// What a client does at a real gateway, in Node and in a browser alike. Each scenario gets env:
// Client; options for each client (a WebSocket); headers, whether that can send headers; call(command,
// arguments) for the servers (harness.mjs); gateways a and b.

export function event(client, name, fits = () => true) {
  return new Promise((resolve) => {
    const off = client.on(name, (e) => { if (fits(e)) { off(); resolve(e); } });
  });
}

function equal(got, want, what) {
  const [a, b] = [JSON.stringify(got), JSON.stringify(want)];
  if (a !== b) throw new Error(`${what}: got ${a}, want ${b}`);
}

async function eventually(what, ok) {
  for (let i = 0; i < 500; i++) {
    if (await ok()) return;
    await new Promise((f) => setTimeout(f, 100));
  }
  throw new Error(`it did not come true: ${what}`);
}

async function rejected(promise) {
  try {
    await promise;
  } catch (e) {
    return e;
  }
  throw new Error("it was not rejected");
}

// make returns a client of a new user, or of the one in options, and closes it at the end of the scenario.
async function make(env, { user, ...options } = {}) {
  user ??= await env.call("user");
  const token = await env.call("token", { user });
  const c = new env.Client({ urls: env.a.url, token: () => token, ...env.options, ...options });
  c.user = user;
  env.open.push(c);
  return c;
}

async function connected(c) {
  const on = event(c, "connected");
  c.connect();
  return on;
}

const numbers = (n) => Array.from({ length: n }, (_, i) => i);

// send sends n messages, and returns when all are stored. It checks what Kafka has: each of them, first
// occurrences in order, and no more repetitions than allowed.
async function send(env, c, n, { repeated = 0, data = (i) => i } = {}) {
  const sent = numbers(n).map((i) => c.send("note", data(i)));
  const receipts = await Promise.all(sent);
  equal(receipts.map((r) => r.client_msg_id), sent.map((s) => s.messageId), "the receipts' names");
  await check(env, c, sent.map((s) => s.messageId), repeated);
  equal(c.pending, 0, "pending");
  return receipts;
}

async function check(env, c, ids, repeated) {
  const records = await env.call("records", { user: c.user, until: ids.at(-1) });
  const stored = records.map((r) => r.id).filter((id) => ids.includes(id));
  const first = [...new Set(stored)];
  equal(first, ids, "what is stored, in order");
  if (stored.length - first.length > repeated) throw new Error(`${stored.length - first.length} stored twice, want ${repeated} at most`);
  return records;
}

export const scenarios = {
  async "a message is stored, a record is delivered: each way of the token, each format"(env) {
    for (const format of ["json", "protobuf"]) {
      for (const tokenIn of ["subprotocol", "query", ...(env.headers ? ["header"] : [])]) {
        const c = await make(env, { format, tokenIn, ackDeliveries: true, deviceId: "dé 1", device: "web" });
        const came = event(c, "message");
        const data = { to: "nobody", content: "grüß dich 😀", list: [1.5, null, { a: "\u2028\0" }] };
        const sent = c.send("note", data); // before it is connected
        const { gateway_id, session_id } = await connected(c);
        equal(gateway_id, env.a.id, "gateway");
        const receipt = await sent;
        equal([receipt.client_msg_id, receipt.topic], [sent.messageId, "im-upstream-topic"], "receipt");
        const [record] = await check(env, c, [sent.messageId], 0);
        equal([record.type, record.session, record.device, record.data], ["note", session_id, "dé 1", data], "record");
        equal([record.partition, record.offset], [receipt.partition, receipt.offset], "where it is");
        await env.call("push", { id: env.a.id, record: { target_user_id: c.user, type: "hello", message_id: "p-1", data } });
        const m = await came;
        equal([m.type, m.message_id, m.delivery_id, m.data], ["hello", "p-1", 1, data], "what came");
        c.close();
      }
    }
  },

  async "connections cut in the middle of frames: all are stored once, in order"(env) {
    for (const [format, window] of [["json", 1], ["protobuf", 1], ["json", 8]]) {
      const plan = [{ head: 100 }, { up: 777 }, { up: 3 }, { down: 900 }, { down: 1 }, { up: 350 }, { down: 260 }];
      const { proxy, url } = await env.call("proxy", { id: env.a.id, plan });
      const c = await make(env, { urls: url, format, window });
      c.connect();
      await send(env, c, 30);
      equal(await env.call("proxied", { proxy }), { cut: plan.length, connections: plan.length + 1 }, "cuts");
      c.close();
    }
  },

  async "a large message cut in its middle is stored once"(env) {
    const { proxy, url } = await env.call("proxy", { id: env.a.id, plan: [{ up: 40_000 }, { up: 60_000 }] });
    const c = await make(env, { urls: url });
    c.connect();
    await send(env, c, 3, { data: () => "x".repeat(60_000) });
    equal((await env.call("proxied", { proxy })).cut, 2, "cuts");
    equal((await rejected(c.send("note", "x".repeat(70_000)))).code, "MESSAGE_TOO_LARGE", "refusal");
    await send(env, c, 1);
  },

  async "a network that carries single bytes"(env) {
    const { url } = await env.call("proxy", { id: env.a.id, slow: true });
    const c = await make(env, { urls: url, window: 4, ackDeliveries: true });
    const came = event(c, "message");
    c.connect();
    await send(env, c, 8);
    await env.call("push", { id: env.a.id, record: { target_user_id: c.user, message_id: "p-1", data: "x" } });
    equal((await came).message_id, "p-1", "what came");
  },

  async "a gateway that is killed and comes back: nothing is lost, order is kept"(env) {
    const c = await make(env, { urls: env.b.url });
    await connected(c);
    const ids = [];
    const sent = [];
    const more = (n) => {
      for (let i = 0; i < n; i++) {
        const s = c.send("note", ids.length);
        ids.push(s.messageId);
        sent.push(s);
      }
    };
    more(40);
    await sent[10];
    const lost = event(c, "state", (e) => e.state === "waiting");
    await env.call("kill", { id: env.b.id });
    equal((await lost).error.code, "DISCONNECTED", "why");
    more(20);
    const back = event(c, "connected");
    await env.call("again", { id: env.b.id });
    await back;
    more(20);
    await Promise.all(sent);
    await check(env, c, ids, 1); // the one that was outstanding when it was killed
  },

  async "a gateway that drains: the client moves on, nothing is repeated"(env) {
    const c = await make(env, { urls: [env.b.url, env.a.url], ackDeliveries: true });
    await connected(c);
    const on = event(c, "connected", (e) => e.gateway_id === env.a.id);
    const sent = numbers(20).map((i) => c.send("note", i));
    const drained = env.call("drain", { id: env.b.id });
    await on;
    await Promise.all(sent);
    await check(env, c, sent.map((s) => s.messageId), 0);
    await drained;
    await env.call("again", { id: env.b.id });
  },

  async "a token about to expire is replaced in the session"(env) {
    const user = await env.call("user");
    const reasons = [];
    const c = await make(env, {
      user, token: (reason) => {
        reasons.push(reason);
        return env.call("token", { user, seconds: reason === "connect" ? 6 : 3600 });
      },
    });
    const errors = [];
    c.on("error", (e) => errors.push(e));
    const { session_id } = await connected(c);
    await new Promise((f) => setTimeout(f, 7_000)); // the first token is worth nothing any more
    await send(env, c, 1);
    equal([c.session.session_id, reasons, errors], [session_id, ["connect", "expiring"], []], "session, reasons, errors");
  },

  async "a token that expires all the same leads to another connection with another"(env) {
    const user = await env.call("user");
    const reasons = [];
    const c = await make(env, {
      user, token: (reason) => {
        reasons.push(reason);
        if (reason === "expiring") throw new Error("no token to be had");
        return env.call("token", { user, seconds: reason === "connect" ? 4 : 3600 });
      },
    });
    const errors = [];
    c.on("error", (e) => errors.push(e.code));
    await connected(c);
    const lost = event(c, "state", (e) => e.state === "waiting");
    const back = event(c, "connected");
    equal((await lost).error.closeCode, 4502, "close code");
    await back;
    equal([reasons.at(-1), new Set(errors).size, errors[0]], ["refused", 1, "TOKEN"], "reasons and errors");
    await send(env, c, 1);
  },

  async "a refused token is replaced; one that stays refused ends it"(env) {
    const user = await env.call("user");
    const good = await env.call("token", { user });
    let other = good;
    const c = await make(env, { user, token: (reason) => (reason === "refused" ? other : "stale") });
    await connected(c);
    c.close();
    other = "stale";
    const stopped = event(c, "state", (e) => e.state === "stopped");
    const sent = c.send("note", 1);
    c.connect();
    equal((await stopped).error.closeCode, 4503, "close code");
    equal(c.pending, 1, "it waits for a good token");
    other = good;
    c.connect();
    await sent;
  },

  async "a newer session replaces this one, a kick ends it: it stays away"(env) {
    const first = await make(env);
    await connected(first);
    const stopped = event(first, "state", (e) => e.state === "stopped");
    const second = await make(env, { user: first.user });
    await connected(second);
    equal((await stopped).error.closeCode, 4500, "close code of the first");
    const kicked = event(second, "state", (e) => e.state === "stopped");
    await env.call("push", { id: env.a.id, record: { target_user_id: second.user, type: "kick", data: { reason: "why" } } });
    const { error } = await kicked;
    equal([error.closeCode, /why/.test(error.message)], [4501, true], "close code of the second");
  },

  async "records: repeated ones are dropped, each is acknowledged when its listener is done"(env) {
    const c = await make(env, { ackDeliveries: true });
    const came = [];
    let finish;
    const held = new Promise((f) => { finish = f; });
    c.on("message", async (m) => {
      came.push(m.message_id);
      await held;
    });
    await connected(c);
    const push = (id) => env.call("push", { id: env.a.id, record: { target_user_id: c.user, message_id: id, data: 1 } });
    for (const i of numbers(20)) {
      await push("p-" + i);
      await push("p-" + i);
    }
    const ledger = async () => (await env.call("ledger", { id: env.a.id })).downstream;
    await eventually("the gateway holds them, and the first came", async () => (await ledger()).open === 40 && came.length > 0);
    const before = (await ledger()).ends.delivered ?? 0;
    equal(came, ["p-0"], "one at a time");
    finish();
    await eventually("all are acknowledged", async () => (await ledger()).open === 0);
    equal((await ledger()).ends.delivered - before, 40, "delivered");
    equal(came, numbers(20).map((i) => "p-" + i), "what came");
  },

  async "a connection is cut while a listener works: a redelivery of what it has is dropped and acknowledged"(env) {
    const { proxy, url } = await env.call("proxy", { id: env.a.id, plan: [{ up: 200 }] });
    const c = await make(env, { urls: url, ackDeliveries: true });
    const came = [];
    let finish;
    const held = new Promise((f) => { finish = f; });
    c.on("message", async (m) => {
      came.push(m.message_id);
      await held;
    });
    await connected(c);
    const ledger = async () => (await env.call("ledger", { id: env.a.id })).downstream;
    const push = async () => {
      for (const i of numbers(3)) await env.call("push", { id: env.a.id, record: { target_user_id: c.user, message_id: "p-" + i, data: 1 } });
    };
    const { ends: before } = await ledger();
    await push();
    await eventually("all are held, and the first came", async () => (await ledger()).open === 3 && came.length === 1);
    const back = event(c, "connected");
    void c.send("note", "x".repeat(300)); // is cut
    await back;
    equal((await env.call("proxied", { proxy })).cut, 1, "cuts");
    await push();
    await eventually("they are held again", async () => (await ledger()).open === 3);
    finish();
    await eventually("all are acknowledged", async () => (await ledger()).open === 0);
    equal(came, ["p-0", "p-1", "p-2"], "what came");
    const { ends } = await ledger();
    const more = (end) => (ends[end] ?? 0) - (before[end] ?? 0);
    equal([more("unacked"), more("delivered")], [3, 3], "ends of the lost session and of the second");
  },

  async "Kafka does not answer: OUTCOME_UNKNOWN stays in the outbox, and is stored once"(env) {
    const c = await make(env, { urls: env.b.url });
    await connected(c);
    await send(env, c, 1);
    await env.call("kafka", { away: true });
    const sent = numbers(5).map((i) => c.send("note", i));
    await new Promise((f) => setTimeout(f, 2_500)); // the gateway gives up after 1 s
    equal(c.pending, 5, "pending");
    await env.call("kafka", { away: false });
    await Promise.all(sent);
    await check(env, c, sent.map((s) => s.messageId), 0);
  },

  async "more than a user may send: RATE_LIMITED only slows down, order is kept"(env) {
    const gw = await env.call("gateway", { change: { "limits.user_messages_per_second": "20" } });
    const c = await make(env, { urls: gw.url });
    c.connect();
    await send(env, c, 60);
    await env.call("kill", { id: gw.id });
  },
};

/** run runs one scenario and ends its clients. */
export async function run(name, env) {
  env = { ...env, open: [] };
  try {
    await scenarios[name](env);
  } finally {
    for (const c of env.open) {
      try {
        c.on("error", () => {});
        c.close(true);
      } catch { /* it failed already */ }
    }
  }
}
