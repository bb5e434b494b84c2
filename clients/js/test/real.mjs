// Runs the scenarios in this process.
import test, { after, before } from "node:test";
import { Client } from "../dist/index.js";
import { start } from "./harness.mjs";
import { run, scenarios } from "./scenarios.mjs";

/** here registers a test for each scenario, with these options for each client; returns what holds the servers. */
export function here(kind, options, fits = () => true) {
  const servers = {};
  before(async () => { Object.assign(servers, await start()); });
  after(() => servers.stop());
  for (const name of Object.keys(scenarios).filter(fits)) {
    test(`${kind}: ${name}`, { timeout: 120_000 }, async () => {
      const call = async (command, args) => JSON.parse(JSON.stringify((await servers.commands[command](args ?? {})) ?? null));
      await run(name, { Client, options, headers: true, call, a: servers.a, b: servers.b });
    });
  }
  return servers;
}
