// Against the real gateway: bin/im-dev on embedded servers.
import test, { after, before } from "node:test";
import assert from "node:assert/strict";
import { spawn } from "node:child_process";
import { once } from "node:events";
import { existsSync, mkdtempSync, readFileSync, rmSync } from "node:fs";
import { createServer } from "node:http";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { Client } from "../dist/index.js";
import { event, proxy, start } from "./gateway.mjs";

let gw;
const open = [];
before(async () => { gw = await start("-sessions.policy", "replace", "-websocket.allowed_origins", "*"); });
after(async () => {
  for (const c of open) c.close();
  await gw.stop();
});

function client(options) {
  const c = new Client(options);
  open.push(c);
  return c;
}
const limit = { timeout: 30_000 };

for (const format of ["json", "protobuf"]) {
  for (const tokenIn of ["subprotocol", "query", "header"]) {
    test(`${format}, token by ${tokenIn}: a message is stored and reaches its target`, limit, async () => {
      const [a, b] = [await gw.user(), await gw.user()];
      const alice = client({ urls: gw.ws, token: a.token, tokenIn, format });
      const bob = client({ urls: gw.ws, token: b.token, tokenIn, format, ackDeliveries: true });
      const came = event(bob, "message", (m) => m.type === "new-message");
      const online = event(bob, "connected");
      bob.connect();
      await online;
      const sent = alice.send("send-message", { to: b.name, content: "grüß dich" }); // before it is connected
      alice.connect();
      const receipt = await sent;
      assert.equal(receipt.client_msg_id, sent.messageId);
      assert.ok(receipt.offset >= 0);
      const m = await came;
      assert.equal(m.data.content, "grüß dich");
      assert.ok(m.message_id);
      assert.ok(m.delivery_id >= 1);
      assert.equal(alice.pending, 0);
      alice.close();
      bob.close();
    });
  }
}

for (const [what, up, down] of [["messages", 700, Infinity], ["answers", Infinity, 900]]) {
  test(`connections cut in the middle of ${what}: all arrive once, in order`, limit, async () => {
    const [a, b] = [await gw.user(), await gw.user()];
    const wire = await proxy(gw.port, 5, up, down);
    const alice = client({ urls: wire.url, token: a.token });
    const bob = client({ urls: gw.ws, token: b.token, ackDeliveries: true });
    const online = event(bob, "connected");
    bob.connect();
    await online;
    const n = 40, got = [];
    const all = event(bob, "message", (m) => {
      if (m.type === "new-message") got.push(m.data.content);
      return got.length >= n;
    });
    alice.connect();
    const sent = Array.from({ length: n }, (_, i) => alice.send("send-message", { to: b.name, content: String(i) }));
    const offsets = (await Promise.all(sent)).map((r) => r.offset);
    assert.deepEqual(offsets, offsets.toSorted((x, y) => x - y));
    await all;
    assert.deepEqual(got, Array.from({ length: n }, (_, i) => String(i)));
    assert.equal(wire.cut, 5);
    alice.close();
    bob.close();
    wire.close();
  });
}

test("a refused token is replaced; one that stays refused ends it", limit, async () => {
  const a = await gw.user();
  const reasons = [];
  const c = client({ urls: gw.ws, token: (reason) => { reasons.push(reason); return reason === "refused" ? a.token() : "stale"; } });
  const online = event(c, "connected");
  c.connect();
  await online;
  assert.deepEqual(reasons, ["connect", "refused"]);
  c.close();

  const bad = client({ urls: gw.ws, token: () => "stale" });
  const stopped = event(bad, "state", (e) => e.state === "stopped");
  bad.connect();
  assert.equal((await stopped).error.closeCode, 4503);
});

test("a newer session replaces this one, which stays away", limit, async () => {
  const a = await gw.user();
  const [first, second] = [client({ urls: gw.ws, token: a.token }), client({ urls: gw.ws, token: a.token })];
  const online = event(first, "connected");
  first.connect();
  await online;
  const stopped = event(first, "state", (e) => e.state === "stopped");
  second.connect();
  assert.equal((await stopped).error.closeCode, 4500);
  second.close();
});

test("in Chromium, with connections cut: all messages are stored in order", limit, async () => {
  const a = await gw.user();
  const wire = await proxy(gw.port, 3, 300);
  const page = `<!doctype html><script type="module">
    import { Client } from "/index.js";
    const c = new Client({ urls: ${JSON.stringify(wire.url)}, token: () => ${JSON.stringify(await a.token())}, format: "protobuf", ackDeliveries: true });
    c.connect();
    const receipts = await Promise.all(Array.from({ length: 20 }, (_, i) => c.send("send-message", { to: "nobody", content: String(i) })));
    c.close();
    await fetch("/result", { method: "POST", body: JSON.stringify(receipts.map((r) => r.offset)) });
  </script>`;
  let told;
  const result = new Promise((f) => { told = f; });
  const server = createServer(async (q, r) => {
    if (q.url === "/result") {
      let body = "";
      for await (const d of q) body += d;
      told(JSON.parse(body));
    }
    r.setHeader("Content-Type", q.url === "/index.js" ? "text/javascript" : "text/html");
    r.end(q.url === "/index.js" ? readFileSync(new URL("../dist/index.js", import.meta.url)) : page);
  }).listen(0, "127.0.0.1");
  await once(server, "listening");
  const home = mkdtempSync(join(tmpdir(), "im-js-"));
  const browser = spawn("chromium", ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update",
    "--disable-sync", "--remote-debugging-port=0", `--user-data-dir=${home}`, `http://127.0.0.1:${server.address().port}/`], { stdio: "ignore" });
  try {
    const offsets = await result;
    assert.equal(offsets.length, 20);
    assert.deepEqual(offsets, offsets.toSorted((x, y) => x - y));
    assert.equal(wire.cut, 3);
  } finally {
    const exit = once(browser, "exit");
    browser.kill();
    await exit;
    server.close();
    server.closeAllConnections();
    wire.close();
    for (let tries = 0; existsSync(home); tries++) { // its children may still write there
      try {
        rmSync(home, { recursive: true });
      } catch (e) {
        if (tries > 100) throw e;
        await new Promise((f) => setTimeout(f, 100));
      }
    }
  }
});

test("the README's example", limit, async () => {
  const source = readFileSync(new URL("../README.md", import.meta.url), "utf8").match(/```js\n([\s\S]*?)```/)[1]
    .replace(/^import .*$/m, "").replace(/"wss:[^"]*"/, "url");
  const [a, b] = [await gw.user(), await gw.user()];
  let made;
  class Kept extends Client { constructor(o) { super(o); open.push(made = this); } }
  const lines = [];
  const run = Object.getPrototypeOf(async () => {}).constructor;
  await new run("Client", "url", "login", "console", source.replace('"bob"', "to"). replace(/^/, `const to = ${JSON.stringify(b.name)};\n`))(
    Kept, gw.ws, a.token, { log: (...l) => lines.push(l) });
  assert.ok(lines.some(([what]) => what === "stored at"));
  made.close();
});
