// The real gateway, in Node with the WebSocket of the package ws.
import test from "node:test";
import { readFileSync } from "node:fs";
import assert from "node:assert/strict";
import WebSocket from "ws";
import { Client } from "../dist/index.js";
import { newUser, token } from "./harness.mjs";
import { here } from "./real.mjs";

const options = { webSocket: (url, protocols, headers) => new WebSocket(url, protocols, { headers }) };
const servers = here("ws", options);

test("the README's example", { timeout: 60_000 }, async () => {
  const user = newUser();
  const source = readFileSync(new URL("../README.md", import.meta.url), "utf8").match(/```js\n([\s\S]*?)```/)[1]
    .replace(/^import .*$/m, "").replace(/"wss:[^"]*"/, "url");
  let made;
  class Kept extends Client { constructor(o) { super({ ...options, ...o }); made = this; } }
  const lines = [];
  const AsyncFunction = Object.getPrototypeOf(async () => {}).constructor;
  await new AsyncFunction("Client", "url", "login", "console", source)(Kept, servers.a.url, () => token(user), { log: (...l) => lines.push(l) });
  assert.ok(lines.some(([what]) => what === "stored at"), JSON.stringify(lines));
  made.close();
});
