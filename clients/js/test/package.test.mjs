// What is handed out: the package, its types, and the copy that the demo page uses.
import test from "node:test";
import assert from "node:assert/strict";
import { execFileSync } from "node:child_process";
import { cpSync, mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { fileURLToPath } from "node:url";

const root = fileURLToPath(new URL("..", import.meta.url));
const run = (dir, command, ...args) => execFileSync(command, args, { cwd: dir, encoding: "utf8", stdio: ["ignore", "pipe", "inherit"] });
const manifest = JSON.parse(readFileSync(join(root, "package.json"), "utf8"));

test("it depends on nothing", () => {
  assert.equal(manifest.dependencies ?? manifest.peerDependencies ?? manifest.optionalDependencies, undefined);
  for (const f of readdirSync(join(root, "dist"))) {
    for (const [, from] of readFileSync(join(root, "dist", f), "utf8").matchAll(/(?:from|import)\s*\(?["']([^"']+)["']/g)) {
      assert.match(from, /^\.\//, f);
    }
  }
});

test("the demo page has this build: npm run embed", () => {
  const copy = fileURLToPath(new URL("../../../cmd/im-dev/page/static/client/", import.meta.url));
  const modules = readdirSync(join(root, "dist")).filter((f) => f.endsWith(".js"));
  assert.deepEqual(readdirSync(copy).sort(), modules.sort());
  for (const f of modules) assert.equal(readFileSync(join(copy, f), "utf8"), readFileSync(join(root, "dist", f), "utf8"), f);
});

test("packed and installed, it is found with its types, by strict programs for the browser and for Node", () => {
  const dir = mkdtempSync(join(tmpdir(), "im-js-"));
  try {
    const [{ filename, files }] = JSON.parse(run(root, "npm", "pack", "--json", "--pack-destination", dir));
    assert.deepEqual(files.map((f) => f.path).filter((p) => !p.startsWith("dist/")).sort(), ["README.md", "package.json"]);
    writeFileSync(join(dir, "package.json"), `{"type":"module"}`);
    run(dir, "npm", "install", "--offline", "--no-audit", "--no-fund", "--silent", "./" + filename);
    assert.match(run(dir, "node", "-e", `import("im-gateway-client").then((m) => console.log(Object.keys(m).join()))`), /^Client,ClientError$/m);
    for (const name of ["@types", "undici-types"]) cpSync(join(root, "node_modules", name), join(dir, "node_modules", name), { recursive: true });
    cpSync(join(root, "test", "types"), dir, { recursive: true });
    for (const project of ["browser", "node"]) run(dir, "node", join(root, "node_modules/typescript/bin/tsc"), "-p", `tsconfig.${project}.json`);
  } finally {
    rmSync(dir, { recursive: true });
  }
});
