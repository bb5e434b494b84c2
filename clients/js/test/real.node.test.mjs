// The real gateway, with Node's own WebSocket: of Node 22 and later, or behind --experimental-websocket.
import test from "node:test";
import assert from "node:assert/strict";
import { here } from "./real.mjs";

const major = parseInt(process.versions.node);
if (globalThis.WebSocket) {
  // That of Node 20 says nothing of a handshake that is cut: 10 s each until the client gives up.
  here("Node", {}, (name) => major >= 22 || !name.startsWith("connections cut"));
} else {
  test("Node's own WebSocket", () => assert.fail("run node with --experimental-websocket, as make test-js does"));
}
