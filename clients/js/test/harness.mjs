// What the tests of the real gateway share: servers and gateways to kill, a TCP proxy that cuts, and all of
// it behind one HTTP server, so that a browser can use it as Node does. Needs bin/, which `make test-js` builds.
import { spawn } from "node:child_process";
import { createHmac, randomBytes, randomInt } from "node:crypto";
import { once } from "node:events";
import { createServer as createHTTP } from "node:http";
import { connect, createServer } from "node:net";
import { readFileSync } from "node:fs";
import { setImmediate } from "node:timers/promises";
import { fileURLToPath } from "node:url";

const bin = (name) => fileURLToPath(new URL("../../../bin/" + name, import.meta.url));
const secret = randomBytes(24).toString("hex");
const PATIENCE_MS = 60_000;

// freePort finds a port that nobody listens on, below those that systems give to outgoing connections, one of
// which could else take it while its server is down.
async function freePort() {
  for (let i = 0; i < 100; i++) {
    const port = randomInt(12_000, 32_000);
    const s = createServer();
    const free = await new Promise((f) => s.on("error", () => f(false)).listen(port, "127.0.0.1", () => f(true)));
    if (!free) continue;
    s.close();
    await once(s, "close");
    return port;
  }
  throw new Error("no free port");
}

// launch starts a program and ends it with this process.
function launch(name, env) {
  const child = spawn(bin(name), { stdio: ["pipe", "pipe", "pipe"], env: { PATH: process.env.PATH, HOME: process.env.HOME, ...env } });
  child.log = "";
  child.on("error", (e) => { child.log += e; }); // no such file: `make test-js` builds it
  for (const s of [child.stdout, child.stderr]) s.on("data", (d) => { child.log += d; });
  child.exited = once(child, "close");
  child.exited.catch(() => {});
  const kill = () => child.kill("SIGKILL");
  process.on("exit", kill);
  child.on("close", () => process.off("exit", kill));
  return child;
}

async function until(what, child, ok) {
  const deadline = Date.now() + PATIENCE_MS;
  for (;;) {
    const v = await ok();
    if (v) return v;
    if (child.exitCode !== null || child.pid === undefined || Date.now() > deadline) {
      throw new Error(`${what} did not come true:\n${child.log}`);
    }
    await new Promise((f) => setTimeout(f, 30));
  }
}

function jwt(claims) {
  const part = (v) => Buffer.from(JSON.stringify(v)).toString("base64url");
  const text = `${part({ alg: "HS256", typ: "JWT" })}.${part(claims)}`;
  return `${text}.${createHmac("sha256", secret).update(text).digest("base64url")}`;
}

/** token of a user, that expires in so many seconds. */
export function token(user, seconds = 3600) {
  return jwt({ user_id: user, exp: Math.floor(Date.now() / 1000) + seconds, jti: randomBytes(6).toString("hex") });
}

export const newUser = () => "u" + randomBytes(6).toString("hex");

class Gateway {
  constructor(servers, id, change) {
    this.servers = servers;
    this.id = id;
    this.change = change;
  }

  async start() {
    this.port ??= await freePort();
    this.admin ??= await freePort();
    this.grpc ??= await freePort();
    const keys = {
      gateway_id: this.id, "http.addr": `127.0.0.1:${this.port}`, "admin.addr": `127.0.0.1:${this.admin}`, "grpc.addr": `127.0.0.1:${this.grpc}`,
      "kafka.brokers": this.servers.kafka, "redis.addrs": this.servers.redis, "etcd.endpoints": this.servers.etcd,
      "auth.hs256_secret": secret, "auth.leeway": "0s", "kafka.start_grace": "100ms", "kafka.ack_deadline": "1s",
      "etcd.lease_ttl": "2s", "drain.window": "1s", ...this.change,
    };
    const env = {};
    for (const [k, v] of Object.entries(keys)) env["IM_" + k.toUpperCase().replaceAll(".", "_")] = v;
    this.child = launch("im-gateway", env);
    await until("the gateway is ready", this.child, () => fetch(`http://127.0.0.1:${this.admin}/readyz`).then((r) => r.ok, () => false));
    return this;
  }

  get url() { return `ws://127.0.0.1:${this.port}/ws`; }

  // end sends SIGKILL or SIGTERM and waits.
  async end(signal) {
    this.child.kill(signal);
    await this.child.exited;
  }
}

// proxy carries connections to port. plan has a cut for each of the first ones: {head: n} after n bytes of the
// request for the upgrade, {up: n} or {down: n} after n bytes of what follows it on the client's or the
// gateway's side. slow: every byte is a packet of its own.
async function proxy(port, plan = [], slow = false) {
  const sockets = new Set();
  const p = { cut: 0, connections: 0 };
  const server = createServer({ noDelay: true }, (a) => {
    const { head = Infinity, up = Infinity, down = Infinity } = plan[p.connections++] ?? {};
    const b = connect({ port, host: "127.0.0.1", noDelay: true });
    const end = () => {
      a.destroy();
      b.destroy();
    };
    for (const s of [a, b]) {
      sockets.add(s);
      s.on("error", () => {}).on("close", () => { end(); sockets.delete(s); });
    }
    const carry = (from, to, headLimit, limit) => {
      let inHead = true, n = 0;
      let turn = Promise.resolve();
      const write = (d, last) => {
        if (!slow) return to.write(d, last);
        turn = turn.then(async () => {
          for (let i = 0; i < d.length; i++) {
            to.write(d.subarray(i, i + 1));
            await setImmediate();
          }
          last?.();
        });
      };
      const pass = (d, bound) => {
        if (n + d.length <= bound) {
          n += d.length;
          write(d);
          return true;
        }
        p.cut++; // in the middle of what is on its way
        from.removeAllListeners("data");
        write(d.subarray(0, bound - n), end);
        return false;
      };
      from.on("data", (d) => {
        if (inHead) {
          const at = d.indexOf("\r\n\r\n"); // a head comes in one piece here
          if (!pass(d.subarray(0, at + 4), headLimit)) return;
          inHead = false;
          n = 0;
          d = d.subarray(at + 4);
        }
        if (d.length > 0) pass(d, limit);
      });
    };
    carry(a, b, head, up);
    carry(b, a, Infinity, down);
  }).listen(0, "127.0.0.1");
  await once(server, "listening");
  p.url = `ws://127.0.0.1:${server.address().port}/ws`;
  p.close = () => {
    server.close();
    for (const s of sockets) s.destroy();
  };
  return p;
}

/** start runs the servers, two gateways, and the HTTP server by which scenarios have them in hand. */
export async function start() {
  const backend = launch("backend", { IM_AUTH_HS256_SECRET: secret });
  await until("the servers are there", backend, () => backend.log.includes("\n"));
  const servers = JSON.parse(backend.log);
  const gateways = new Map();
  const proxies = [];
  const serve = async (path, init) => {
    const r = await fetch(`http://${servers.http}${path}`, init);
    if (!r.ok) throw new Error(`${path}: ${r.status} ${await r.text()}`);
    return r;
  };

  // What a scenario may call; arguments and results are JSON.
  const commands = {
    user: () => newUser(),
    token: ({ user, seconds }) => token(user, seconds),
    async gateway({ change = {} } = {}) {
      const gw = await new Gateway(servers, "gw-" + randomBytes(4).toString("hex"), change).start();
      gateways.set(gw.id, gw);
      return { id: gw.id, url: gw.url };
    },
    kill: ({ id }) => gateways.get(id).end("SIGKILL"),
    drain: ({ id }) => gateways.get(id).end("SIGTERM"),
    again: async ({ id }) => { await gateways.get(id).start(); },
    ledger: async ({ id }) => (await fetch(`http://127.0.0.1:${gateways.get(id).admin}/ledger`)).json(),
    async proxy({ id, plan, slow }) {
      const p = await proxy(gateways.get(id).port, plan, slow);
      return { proxy: proxies.push(p) - 1, url: p.url };
    },
    proxied: ({ proxy }) => ({ cut: proxies[proxy].cut, connections: proxies[proxy].connections }),
    records: async ({ user, until }) => (await serve(`/records?${new URLSearchParams({ user, until })}`)).json(),
    push: async ({ id, record }) => { await serve(`/push?topic=im-downstream-topic-${id}`, { method: "POST", body: JSON.stringify(record) }); },
    kafka: async ({ away }) => { await serve(`/kafka?away=${away}`, { method: "POST" }); },
  };

  const files = { "/": "chromium.html", "/scenarios.mjs": "scenarios.mjs" };
  const server = createHTTP(async (q, r) => {
    const { pathname } = new URL(q.url, "http://h");
    try {
      if (pathname.startsWith("/call/")) {
        let body = "";
        for await (const d of q) body += d;
        const result = await commands[pathname.slice("/call/".length)](JSON.parse(body || "{}"));
        r.setHeader("Content-Type", "application/json");
        return r.end(JSON.stringify(result ?? null));
      }
      const file = pathname.startsWith("/dist/") ? ".." + pathname : files[pathname];
      const text = readFileSync(new URL(file, import.meta.url));
      r.setHeader("Content-Type", /js$/.test(file) ? "text/javascript" : "text/html");
      r.end(text);
    } catch (e) {
      r.statusCode = 500;
      r.end(String(e));
    }
  }).listen(0, "127.0.0.1");
  await once(server, "listening");
  const base = `http://127.0.0.1:${server.address().port}`;
  // What compresses is tried, too: browsers and ws offer it.
  const compressed = { "websocket.compression.enabled": "true", "websocket.compression.threshold_bytes": "0" };
  const [a, b] = await Promise.all([commands.gateway(), commands.gateway({ change: compressed })]);
  return {
    base, a, b, commands,
    async stop() {
      for (const p of proxies) p.close();
      for (const gw of gateways.values()) if (gw.child.exitCode === null && gw.child.signalCode === null) await gw.end("SIGKILL");
      backend.stdin.end();
      await backend.exited;
      server.close();
      server.closeAllConnections();
    },
  };
}
