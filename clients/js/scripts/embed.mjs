// Copies the build to the demo page, which is embedded in im-dev: who builds that needs no npm.
import { copyFileSync, mkdirSync, readdirSync, rmSync } from "node:fs";

const from = new URL("../dist/", import.meta.url), to = new URL("../../../cmd/im-dev/page/static/client/", import.meta.url);
rmSync(to, { recursive: true, force: true });
mkdirSync(to);
for (const f of readdirSync(from)) if (f.endsWith(".js")) copyFileSync(new URL(f, from), new URL(f, to));
