// What the tests share: a whole im-dev, and a TCP proxy that cuts.
import { spawn } from "node:child_process";
import { createServer, connect } from "node:net";
import { fileURLToPath } from "node:url";
import { randomBytes } from "node:crypto";
import { once } from "node:events";

async function freePort() {
  const s = createServer().listen(0, "127.0.0.1");
  await once(s, "listening");
  const { port } = s.address();
  s.close();
  await once(s, "close");
  return port;
}

// start runs bin/im-dev on embedded servers.
export async function start(...flags) {
  const port = await freePort();
  const base = `http://127.0.0.1:${port}`;
  const args = ["-http", `127.0.0.1:${port}`, "-page", "127.0.0.1:0", "-admin", "127.0.0.1:0", "-grpc", "127.0.0.1:0", ...flags];
  const child = spawn(fileURLToPath(new URL("../../../bin/im-dev", import.meta.url)), args, { stdio: ["ignore", "pipe", "pipe"] });
  let log = "";
  for (const s of [child.stdout, child.stderr]) s.on("data", (d) => { log += d; });
  const deadline = Date.now() + 60_000;
  while (!(log.includes("is ready"))) {
    if (Date.now() > deadline || child.exitCode !== null) {
      child.kill("SIGKILL");
      throw new Error("im-dev did not start:\n" + log);
    }
    await new Promise((f) => setTimeout(f, 50));
  }
  const post = async (path, body) => {
    const r = await fetch(base + path, { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) });
    const json = await r.json();
    if (!json.success) throw new Error(`${path}: ${JSON.stringify(json)}`);
    return json.data;
  };
  return {
    port,
    ws: `ws://127.0.0.1:${port}/ws`,
    // user registers somebody and returns the name and a way to log in.
    async user() {
      const username = "u" + randomBytes(6).toString("hex");
      const password = randomBytes(12).toString("hex");
      await post("/api/auth/register", { username, password });
      return { name: username, token: async () => (await post("/api/auth/login", { username, password })).token };
    },
    async stop() {
      if (child.exitCode !== null) return;
      child.kill("SIGTERM");
      const kill = setTimeout(() => child.kill("SIGKILL"), 10_000);
      await once(child, "exit");
      clearTimeout(kill);
    },
  };
}

// proxy carries connections to port; the first `cuts` of them are cut after `up` bytes from the client
// (those of the handshake not counted), or `down` bytes of the gateway's.
export async function proxy(port, cuts, up, down = Infinity) {
  const sockets = new Set();
  const p = { url: "", cut: 0, close: () => { server.close(); for (const s of sockets) s.destroy(); } };
  const server = createServer((a) => {
    const b = connect(port, "127.0.0.1");
    for (const s of [a, b]) {
      sockets.add(s);
      s.on("error", () => {}).on("close", () => { a.destroy(); b.destroy(); sockets.delete(s); });
    }
    const carry = (from, to, limit) => {
      let head = true, n = 0;
      from.on("data", (d) => {
        if (head) {
          head = false;
          const end = d.indexOf("\r\n\r\n") + 4;
          to.write(d.subarray(0, end));
          d = d.subarray(end);
        }
        if (p.cut < cuts && n + d.length > limit) { // in the middle of what is on its way
          p.cut++;
          to.write(d.subarray(0, limit - n), () => { a.destroy(); b.destroy(); });
          limit = Infinity;
          from.pause();
          return;
        }
        n += d.length;
        if (d.length > 0) to.write(d);
      });
    };
    carry(a, b, up);
    carry(b, a, down);
  }).listen(0, "127.0.0.1");
  await once(server, "listening");
  p.url = `ws://127.0.0.1:${server.address().port}/ws`;
  return p;
}

// event waits for one that fits.
export function event(client, name, fits = () => true) {
  return new Promise((resolve) => {
    const off = client.on(name, (e) => { if (fits(e)) { off(); resolve(e); } });
  });
}
