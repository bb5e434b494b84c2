// The real gateway, with Node's own WebSocket (22 and later, or --experimental-websocket) and that of ws.
import test, { after, before } from "node:test";
import { readFileSync } from "node:fs";
import assert from "node:assert/strict";
import WebSocket from "ws";
import { Client } from "../dist/index.js";
import { newUser, start, token } from "./harness.mjs";
import { run, scenarios } from "./scenarios.mjs";

let h;
before(async () => { h = await start(); });
after(() => h.stop());

const kinds = { ws: { webSocket: (url, protocols, headers) => new WebSocket(url, protocols, { headers }) } };
if (globalThis.WebSocket) kinds.Node = {};

for (const [kind, options] of Object.entries(kinds)) {
  for (const name of Object.keys(scenarios)) {
    // Node 20's own, an experiment, says nothing of a handshake that is cut: the client's 10 s for each.
    if (kind === "Node" && parseInt(process.versions.node) < 22 && name.startsWith("connections cut")) continue;
    test(`${kind}: ${name}`, { timeout: 120_000 }, async () => {
      const call = async (command, args) => JSON.parse(JSON.stringify((await h.commands[command](args ?? {})) ?? null));
      await run(name, { Client, options, headers: true, call, a: h.a, b: h.b });
    });
  }
}

test("the README's example", { timeout: 60_000 }, async () => {
  const user = newUser();
  const source = readFileSync(new URL("../README.md", import.meta.url), "utf8").match(/```js\n([\s\S]*?)```/)[1]
    .replace(/^import .*$/m, "").replace(/"wss:[^"]*"/, "url");
  let made;
  class Kept extends Client { constructor(o) { super({ ...kinds.ws, ...o }); made = this; } }
  const lines = [];
  const run = Object.getPrototypeOf(async () => {}).constructor;
  await new run("Client", "url", "login", "console", source)(Kept, h.a.url, () => token(user), { log: (...l) => lines.push(l) });
  assert.ok(lines.some(([what]) => what === "stored at"), JSON.stringify(lines));
  made.close();
});
