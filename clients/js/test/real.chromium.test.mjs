// The real gateway, in Chromium.
import test, { after, before } from "node:test";
import { spawn } from "node:child_process";
import { once } from "node:events";
import { existsSync, mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { start } from "./harness.mjs";
import { scenarios } from "./scenarios.mjs";

let h, browser, home;
const results = new Map(Object.keys(scenarios).map((name) => {
  const r = {};
  r.done = new Promise((resolve) => { r.resolve = resolve; });
  return [name, r];
}));

before(async () => {
  h = await start();
  h.commands.result = ({ name, error }) => { results.get(name).resolve(error ?? ""); };
  h.commands.gateways = () => ({ a: { id: h.a.id, url: h.a.url }, b: { id: h.b.id, url: h.b.url } });
  home = mkdtempSync(join(tmpdir(), "im-js-"));
  browser = spawn("chromium", ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update",
    "--disable-sync", "--remote-debugging-port=0", `--user-data-dir=${home}`, `${h.base}/`], { stdio: ["ignore", "ignore", "pipe"] });
  let log = "";
  browser.stderr.on("data", (d) => { log += d; });
  const failed = (why) => { for (const r of results.values()) r.resolve(`Chromium ended: ${why}\n${log}`); };
  browser.on("error", failed).on("exit", failed);
});

after(async () => {
  if (browser.exitCode === null && browser.pid !== undefined) {
    const exit = once(browser, "exit");
    browser.kill();
    await exit;
  }
  await h.stop();
  for (let tries = 0; existsSync(home); tries++) { // its children may still write there
    try {
      rmSync(home, { recursive: true });
    } catch (e) {
      if (tries > 100) throw e;
      await new Promise((f) => setTimeout(f, 100));
    }
  }
});

for (const [name, r] of results) {
  test(`Chromium: ${name}`, { timeout: 240_000 }, async () => {
    const error = await r.done;
    if (error) throw new Error(error);
  });
}
