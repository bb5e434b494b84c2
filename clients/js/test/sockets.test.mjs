// Servers that are no gateways, or bad ones, on real sockets.
import test from "node:test";
import assert from "node:assert/strict";
import { createHash } from "node:crypto";
import { once } from "node:events";
import { createServer } from "node:net";
import WebSocket from "ws";
import { Client } from "../dist/index.js";

const GUID = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"; // RFC 6455, section 1.3
const frame = (opcode, payload) => {
  const b = Buffer.from(payload);
  const head = b.length < 126 ? [0x80 | opcode, b.length] : [0x80 | opcode, 126, b.length >> 8, b.length & 255];
  return Buffer.concat([Buffer.from(head), b]);
};
const text = (v) => frame(1, JSON.stringify(v));
const hello = text({ type: "connected", data: { gateway_id: "g", session_id: "s", heartbeat_ms: 200, max_message_bytes: 65536 } });
const ack = (id) => text({ type: "message-ack", data: { client_msg_id: id, status: "success", topic: "t", partition: 0, offset: 1 } });

// request reads the head of the handshake and returns the answer that accepts it.
async function request(socket) {
  let head = "";
  while (!head.includes("\r\n\r\n")) head += (await once(socket, "data"))[0].toString("latin1");
  const key = /sec-websocket-key: (\S+)/i.exec(head)[1];
  const accept = createHash("sha1").update(key + GUID).digest("base64");
  return `HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Protocol: im.json.v1\r\nSec-WebSocket-Accept: ${accept}\r\n\r\n`;
}
// upgraded accepts the handshake and says hello.
const upgraded = async (s, ...more) => s.write(Buffer.concat([Buffer.from(await request(s)), hello, ...more]));

const bad = {
  "hangs up": (s) => s.destroy(),
  "hangs up in the middle of the answer": async (s) => { s.end((await request(s)).slice(0, 60)); },
  "is full": async (s) => { await request(s); s.end("HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\nContent-Length: 2\r\n\r\n{}"); },
  "is an ordinary web server": async (s) => { await request(s); s.end("HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello"); },
  "speaks no HTTP": async (s) => { await request(s); s.end("220 smtp\r\n"); },
  "proves nothing": async (s) => { s.end((await request(s)).replace(/Accept: .{4}/, "Accept: AAAA")); },
  "selects another protocol": async (s) => { s.end((await request(s)).replace("im.json.v1", "mqtt")); },
  "closes without a word": async (s) => { s.end(await request(s)); },
  "sends a frame of a kind that is none": async (s) => upgraded(s, frame(11, "x")),
  "sends a masked frame": async (s) => upgraded(s, Buffer.from([0x81, 0x81, 1, 2, 3, 4, 5])),
  "sends text that is no UTF-8": async (s) => upgraded(s, frame(1, Buffer.from([0xff, 0xfe]))),
  "sends text that is no JSON": async (s) => upgraded(s, frame(1, "hello")),
  "sends bytes that are no protobuf": async (s) => upgraded(s, frame(2, Buffer.from([0xff, 0xff]))),
  "sends half a frame and hangs up": async (s) => { await upgraded(s, ack("m-1").subarray(0, 40)); s.end(); },
  "sends half a frame and falls silent": async (s) => upgraded(s, ack("m-1").subarray(0, 40)),
  "says hello and falls silent": async (s) => upgraded(s),
  "resets the connection": async (s) => { await upgraded(s); s.resetAndDestroy(); },
  "closes with a code that is none": async (s) => upgraded(s, frame(8, Buffer.from([0, 1]))),
};

for (const [name, behave] of Object.entries(bad)) {
  test(`a server that ${name} is left; the message is stored by the next`, { timeout: 60_000 }, async () => {
    const sockets = new Set();
    let n = 0;
    const server = createServer((s) => {
      sockets.add(s);
      s.on("error", () => {});
      if (n++ === 0) return behave(s);
      void upgraded(s).then(() => s.on("data", () => s.write(ack("m-1")))); // whatever comes, it is the message
    }).listen(0, "127.0.0.1");
    await once(server, "listening");
    const client = new Client({
      urls: `ws://127.0.0.1:${server.address().port}/ws`, token: () => "a.b.c",
      webSocket: (url, protocols) => new WebSocket(url, protocols),
    });
    const states = [];
    client.on("state", (e) => states.push(e.state));
    const sent = client.send("note", 1, "m-1");
    client.connect();
    assert.equal((await sent).offset, 1);
    assert.equal(states.filter((s) => s === "waiting").length, 1);
    client.close();
    server.close();
    for (const s of sockets) s.destroy();
  });
}
