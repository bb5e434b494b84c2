// What the page does by itself. Elements that tests rely on: state, stale, sessions, rate-in, rate-out,
// upstream-in, downstream-in, dependency-NAME, senders, receivers, user, find-user, found-sessions, token,
// unlock-button, lock, log-level, drain, ask-yes, ask-no, ask-reason, notice; and data-acting of main: off, locked
// or unlocked.
const every = 2000; // ms between two looks
const kept = 60; // looks that a curve shows
const $ = (id) => document.getElementById(id);
const main = $("main");

// ---- live parts ----

const curves = {}; // by id: the last rates
let before = null; // the totals of the last look and when it was

// rates fills in what only two looks can tell.
function rates(fragment) {
  const now = Number(fragment.getElementById("tiles").dataset.now);
  const totals = {};
  for (const e of fragment.querySelectorAll(".rate")) {
    totals[e.id] = Number(e.dataset.total);
    const curve = (curves[e.id] ??= []);
    if (before && now > before.now) {
      curve.push((Math.max(0, totals[e.id] - before.totals[e.id]) * 1000) / (now - before.now));
      if (curve.length > kept) curve.shift();
    }
    if (curve.length === 0) continue;
    const last = curve.at(-1);
    e.textContent = last.toLocaleString("en", { maximumFractionDigits: last < 100 ? 1 : 0 });
    const top = Math.max(...curve, 1);
    const line = curve.map((v, i) => `${60 - (curve.length - 1 - i)},${19 - (v / top) * 17}`);
    e.parentElement.querySelector("polyline").setAttribute("points", line.join(" "));
  }
  before = { now, totals };
}

// put replaces what has changed, so that what has not keeps its selection.
function put(fragment) {
  for (const next of fragment.querySelectorAll("[data-live]")) {
    const shown = $(next.id);
    if (shown.outerHTML !== next.outerHTML) shown.replaceWith(next);
  }
  for (const b of $("log-level").querySelectorAll("button")) {
    b.setAttribute("aria-pressed", String(b.value === $("tiles").dataset.level));
  }
}

async function get(path) {
  const response = await fetch(path, { cache: "no-store" });
  const text = await response.text();
  if (!response.ok) throw new Error(text);
  return new DOMParser().parseFromString(text, "text/html");
}

let silentSince = null;

async function look() {
  try {
    const fragment = await get("page/live");
    rates(fragment);
    put(fragment);
    silentSince = null;
    document.body.classList.remove("stale");
  } catch {
    silentSince ??= new Date();
    document.body.classList.add("stale");
    $("stale").textContent = `no answer since ${silentSince.toLocaleTimeString()}`;
  }
}

async function measure() {
  try {
    const fragment = await get("page/talkers");
    $("talkers").replaceChildren(...fragment.body.childNodes);
  } catch {
    // look says that nobody answers; without sessions there is nothing to measure
  }
}

// repeat runs f again and again, while somebody looks at the page.
async function repeat(f) {
  for (;;) {
    if (!document.hidden) await f();
    await new Promise((done) => {
      const woken = new AbortController();
      const go = () => { woken.abort(); clearTimeout(timer); done(); };
      const timer = setTimeout(go, every);
      document.addEventListener("visibilitychange", go, { signal: woken.signal });
    });
  }
}

// ---- find ----

let sought = new URLSearchParams(location.search).get("user") ?? "";

async function find() {
  if (!sought) return;
  try {
    const asked = sought;
    const fragment = await get("page/user?" + new URLSearchParams({ user: asked }));
    allow(fragment);
    if (asked === sought && $("found").innerHTML !== fragment.body.innerHTML) {
      $("found").replaceChildren(...fragment.body.childNodes);
    }
  } catch {
    // look says that nobody answers
  }
}

function seek(user) {
  sought = user;
  $("user").value = user;
  history.replaceState(null, "", "?" + new URLSearchParams({ user }));
  return find();
}

$("find").addEventListener("submit", (e) => { e.preventDefault(); seek($("user").value); });
$("talkers").addEventListener("click", (e) => {
  const link = e.target.closest("a.user");
  if (!link) return;
  e.preventDefault();
  seek(link.textContent);
  $("find-card").scrollIntoView({ block: "nearest" });
});

// ---- act ----

const tokenKey = "im-gateway admin.token"; // in sessionStorage: gone with the tab

function notice(text, bad = false) {
  $("notice").textContent = text;
  $("notice").className = bad ? "bad" : "";
  clearTimeout(notice.timer);
  notice.timer = setTimeout(() => { $("notice").textContent = ""; }, 8000);
}

// allow enables what the token allows.
function allow(where = document) {
  for (const b of where.querySelectorAll(".act")) b.disabled = main.dataset.acting !== "unlocked";
}

function lock(state) {
  if (state === "locked") sessionStorage.removeItem(tokenKey);
  main.dataset.acting = state;
  allow();
}

// act calls a route with the token; undefined: it was refused, and the page says so.
async function act(path, body, token = sessionStorage.getItem(tokenKey)) {
  try {
    const response = await fetch(path, {
      method: "POST",
      headers: { authorization: `Bearer ${token}`, "content-type": "application/json" },
      body: JSON.stringify(body ?? {}),
    });
    const text = await response.text();
    const answer = text ? JSON.parse(text) : {};
    if (response.ok) return answer;
    if (response.status === 403) lock("locked");
    notice(answer.error ?? `refused: ${response.status}`, true);
  } catch (e) {
    notice(`no answer: ${e.message}`, true);
  }
  return undefined;
}

// question takes the answer to the dialog that is open. The dialog's own close event comes late: after the
// next question, if somebody is quick.
let question = null;

function settle(value) {
  $("ask").close();
  question?.(value);
  question = null;
}

// ask opens the dialog; it is false, or what was typed in when the answer is yes.
function ask(title, text, yes, withReason) {
  question?.(false);
  $("ask-title").textContent = title;
  $("ask-text").textContent = text;
  $("ask-yes").textContent = yes;
  $("ask-reason-row").hidden = !withReason;
  $("ask-reason").value = "";
  $("ask").showModal();
  return new Promise((done) => { question = done; });
}

$("ask-no").addEventListener("click", () => settle(false));
$("ask").addEventListener("cancel", (e) => { e.preventDefault(); settle(false); }); // the escape key
$("ask-form").addEventListener("submit", (e) => { e.preventDefault(); settle({ reason: $("ask-reason").value }); });

$("unlock")?.addEventListener("submit", async (e) => {
  e.preventDefault();
  const token = $("token").value;
  $("token").value = "";
  if ((await act("token", {}, token)) === undefined) return;
  sessionStorage.setItem(tokenKey, token);
  lock("unlocked");
  notice("unlocked");
});

$("lock")?.addEventListener("click", () => lock("locked"));

$("log-level").addEventListener("click", async (e) => {
  if (!e.target.value) return;
  const answer = await act("log-level", { level: e.target.value });
  if (answer) notice(`the log level is ${answer.level}`);
  await look();
});

$("drain").addEventListener("click", async () => {
  const yes = await ask(`Drain ${document.querySelector("h1").textContent}?`,
    "Clients are sent elsewhere, what is under way is settled, and the process stops. It cannot be undone.", "Drain and stop");
  if (yes && (await act("drain"))) notice("draining");
});

$("found").addEventListener("click", async (e) => {
  const { user, session } = e.target.dataset;
  if (user === undefined) return;
  const yes = await ask(`Kick ${user}?`,
    session ? `Session ${session} is closed with 4501.` : "All sessions here are closed with 4501.", "Kick", true);
  if (!yes) return;
  const answer = await act("kick", { user_id: user, session_id: session, reason: yes.reason });
  if (answer) notice(answer.closed === 1 ? "1 session closed" : `${answer.closed} sessions closed`);
  await find();
});

if (main.dataset.acting === "locked" && sessionStorage.getItem(tokenKey)) lock("unlocked");
allow();
rates(document);
repeat(look);
repeat(measure);
repeat(find);
