// The demo page. This module joins the parts and draws; api.js, chat.js and kept.js hold no DOM. client/ is
// the build of the JavaScript client (clients/js, npm run embed).
//
// For tests, every element below has the same id and data-testid, unless noted, and keeps it:
//
//   body[data-view]           "auth" or "app"; body[data-pane]: "list" or "chat" (narrow screens)
//   sign in                   username, password, login, register, guest-name, guest, auth-error
//   who and how               me (text: user name; data-user: user id), logout,
//                             connection (data-state: idle, connecting, online, waiting, stopped;
//                             data-reason: replaced, kicked or refused; data-gateway: gateway_id)
//   conversations             new-chat-user, new-chat, conversations; each entry is
//                             [data-testid=conversation] with data-id, data-unread
//   groups                    group-open, group-dialog, group-name, group-members, group-create,
//                             group-id, group-join, group-close
//   the open conversation     back, chat-title, chat-detail (of a group: its id), messages; each is
//                             [data-testid=message] with data-id (message_id), data-client-id,
//                             data-from, data-state (pending, acked, delivered, failed; received); inside:
//                             [data-testid=message-text], -state, -retry
//                             message-input, send
//   banner, banner-text, banner-action, notice
//
// window.imDemo is {api, client, chat}; client and chat are those of who is signed in.

import { Api } from "./api.js";
import { Chat, OUTBOX } from "./chat.js";
import { Client } from "./client/index.js";

const RENEW_EARLY_MS = 30_000; // a token that is worth less is not begun with

const $ = (id) => document.getElementById(id);
const gateways = document.querySelector("meta[name=im-gateways]").content.split(" ").filter(Boolean);
// Each tab is a device of its own, as long as it is not loaded anew.
const deviceId = Array.from(crypto.getRandomValues(new Uint8Array(8)), (b) => b.toString(16).padStart(2, "0")).join("");

const api = new Api(gateways);
let client = null;
let chat = null;
let open = ""; // id of the open conversation
window.imDemo = { api, get client() { return client; }, get chat() { return chat; } };

// --- signing in and out ---

async function signIn(action) {
  $("auth-error").hidden = true;
  const buttons = document.querySelectorAll("#auth button");
  for (const b of buttons) b.disabled = true;
  try {
    await action();
    $("password").value = "";
    enter();
  } catch (e) {
    $("auth-error").textContent = e.message;
    $("auth-error").hidden = false;
  } finally {
    for (const b of buttons) b.disabled = false;
  }
}

$("login-form").addEventListener("submit", (e) => {
  e.preventDefault();
  signIn(() => api.login($("username").value.trim(), $("password").value));
});
$("register").addEventListener("click", () => {
  if (!$("login-form").reportValidity()) return;
  signIn(async () => {
    const name = $("username").value.trim(), password = $("password").value;
    await api.register(name, password);
    await api.login(name, password);
  });
});
$("guest-form").addEventListener("submit", (e) => {
  e.preventDefault();
  signIn(() => api.guest($("guest-name").value.trim()));
});
$("logout").addEventListener("click", () => leave("", true));

function enter() {
  const { user } = api.session;
  client = new Client({
    urls: gateways.map((g) => g.replace("http", "ws") + "/ws"),
    token, deviceId, device: "web", ackDeliveries: true, outbox: OUTBOX,
  });
  client.on("state", drawConnection);
  client.on("error", (e) => console.warn(e));
  chat = new Chat(client, user.userId);
  chat.addEventListener("change", (e) => schedule(e.detail));
  chat.addEventListener("joined", (e) => show(e.detail));
  chat.addEventListener("refused", (e) => notice(e.detail));
  $("me").textContent = user.username;
  $("me").dataset.user = user.userId;
  avatar($("me-avatar"), user.userId, user.username);
  document.body.dataset.view = "app";
  document.body.dataset.pane = "list";
  document.title = `${user.username} · im-gateway chat`;
  show("");
  client.connect();
}

// token is asked for by the client.
async function token(reason) {
  try {
    if (reason !== "connect" || api.session.expiresAt - Date.now() < RENEW_EARLY_MS) await api.refresh();
  } catch (e) {
    if (e.status === 401) leave("Please log in again.");
    throw e;
  }
  return api.session.token;
}

// leave signs out. forget: what was not sent is not sent at the next login either.
function leave(message = "", forget = false) {
  api.logout();
  chat?.close(forget);
  client?.close();
  chat = client = null;
  document.body.dataset.view = "auth";
  document.title = "im-gateway chat";
  $("auth-error").textContent = message;
  $("auth-error").hidden = message === "";
}

// --- connection ---

const texts = { idle: "Not connected", connecting: "Connecting…", online: "Online", waiting: "Reconnecting…", stopped: "Disconnected" };

const reasons = { 4500: "replaced", 4501: "kicked" }; // of stopped, by the close code

let connection = { state: "idle" };

function drawConnection(e) {
  connection = e;
  const { state, error } = e;
  if (state === "stopped" && (error?.closeCode === 4502 || error?.closeCode === 4503)) return leave("Please log in again.");
  const el = $("connection");
  el.dataset.state = state;
  el.dataset.reason = state === "stopped" && error ? reasons[error.closeCode] ?? "refused" : "";
  el.dataset.gateway = client?.session?.gateway_id ?? "";
  $("connection-text").textContent = texts[state];
  drawBanner();
}

let bannerTimer = 0;
function drawBanner() {
  clearTimeout(bannerTimer);
  const { state, error, retryAt } = connection;
  let text = "", action = "";
  if (state === "waiting") {
    const seconds = Math.ceil((retryAt - Date.now()) / 1000);
    text = seconds > 1 ? `Connection lost. Trying again in ${seconds} s.` : "Connection lost. Trying again.";
    action = "Try now";
    bannerTimer = setTimeout(drawBanner, 500);
  } else if (state === "stopped" && error) {
    text = { 4500: "You are connected somewhere else.", 4501: "You were disconnected by the operator." }[error.closeCode] ?? "The gateway refused the connection.";
    action = "Connect here";
  }
  $("banner").hidden = text === "";
  if ($("banner-text").textContent !== text) $("banner-text").textContent = text;
  $("banner-action").textContent = action;
  $("banner-action").hidden = action === "";
}
$("banner-action").addEventListener("click", () => client.connect());

let noticeTimer = 0;
function notice(text) {
  $("notice").textContent = text;
  $("notice").hidden = false;
  clearTimeout(noticeTimer);
  noticeTimer = setTimeout(() => { $("notice").hidden = true; }, 5_000);
}

// --- conversations ---

$("new-chat-form").addEventListener("submit", (e) => {
  e.preventDefault();
  const name = $("new-chat-user").value.trim();
  if (!name) return;
  $("new-chat-user").value = "";
  // Registered users' ids are their names in lower case; guests' ids are that already.
  show(chat.direct(name.toLowerCase()));
});
$("group-open").addEventListener("click", () => $("group-dialog").showModal());
$("group-close").addEventListener("click", () => $("group-dialog").close());
$("group-create-form").addEventListener("submit", (e) => {
  e.preventDefault();
  const members = $("group-members").value.split(/[\s,]+/).filter(Boolean);
  group(chat.createGroup($("group-name").value.trim(), members), e.target);
});
$("group-join-form").addEventListener("submit", (e) => {
  e.preventDefault();
  group(chat.joinGroup($("group-id").value.trim()), e.target);
});
function group(queued, form) {
  if (!queued) return notice("Too much is waiting to be sent.");
  form.reset();
  $("group-dialog").close();
}
$("back").addEventListener("click", () => { document.body.dataset.pane = "list"; show(""); });

function show(id) {
  open = id;
  if (id) document.body.dataset.pane = "chat";
  $("chat").classList.toggle("open", id !== "");
  $("messages").replaceChildren();
  schedule();
  if (id && matchMedia("(pointer: fine)").matches) $("message-input").focus();
}

// --- drawing, at most once per frame ---

let drawing = false;
function schedule() {
  if (drawing) return;
  drawing = true;
  // A hidden tab gets no animation frames, but its state must be right all the same.
  if (document.visibilityState === "visible") requestAnimationFrame(draw);
  else setTimeout(draw, 0);
}

function draw() {
  drawing = false;
  if (!chat) return;
  if (open && document.visibilityState === "visible") chat.read(open);
  drawConversations();
  if (open) drawChat(chat.conversations.get(open));
}
document.addEventListener("visibilitychange", schedule);

function drawConversations() {
  const list = [...chat.conversations.values()].sort((a, b) => b.touched - a.touched);
  reconcile($("conversations"), list, (c) => c.id, () => {
    const li = document.createElement("li");
    const button = element("button", "conversation", "conversation");
    const who = element("div", "who");
    who.append(element("strong"), element("span"));
    button.append(element("span", "avatar"), who, element("span", "badge"));
    li.append(button);
    return li;
  }, (li, c) => {
    const button = li.firstChild;
    const title = chat.title(c);
    button.dataset.id = c.id;
    button.dataset.unread = c.unread;
    button.setAttribute("aria-current", c.id === open);
    button.onclick = () => show(c.id);
    avatar(button.children[0], c.kind === "dm" ? chat.peer(c) : c.id, title);
    text(button.querySelector("strong"), title);
    const last = c.messages.at(-1);
    text(button.querySelector(".who span"), last ? (last.from === api.session.user.userId ? "You: " : "") + words(last.content) : "No messages yet");
    const badge = button.querySelector(".badge");
    text(badge, c.unread || "");
    badge.hidden = c.unread === 0;
  });
}

function drawChat(c) {
  const title = chat.title(c);
  text($("chat-title"), title);
  avatar($("chat-avatar"), c.kind === "dm" ? chat.peer(c) : c.id, title);
  text($("chat-detail"), detail(c));
  $("composer").hidden = c.id === "console";
  const list = $("messages");
  const atEnd = list.scrollHeight - list.scrollTop - list.clientHeight < 80;
  const me = api.session.user.userId;
  reconcile(list, c.messages, (m) => m.order, () => {
    const li = element("li", "message", "message");
    const meta = element("div", "meta");
    meta.append(element("time"), element("span", "state", "message-state"));
    li.append(element("span", "from"), element("div", "text", "message-text"), meta);
    return li;
  }, (li, m, before) => {
    const own = m.from === me;
    li.classList.toggle("mine", own);
    li.dataset.id = m.id;
    li.dataset.clientId = m.clientId ?? "";
    li.dataset.from = m.from;
    li.dataset.state = m.state;
    const [from, body, meta] = li.children;
    from.hidden = own || c.kind === "dm" || before?.from === m.from;
    text(from, m.fromName || m.from);
    li.style.setProperty("--hue", hue(m.from));
    text(body, words(m.content));
    const at = new Date(m.sentAt);
    text(meta.children[0], at.toLocaleTimeString([], { hour: "2-digit", minute: "2-digit" }));
    meta.children[0].dateTime = at.toISOString();
    const state = meta.children[1];
    state.hidden = !own;
    const others = c.members.length - 1;
    text(state, m.state === "acked" && c.kind === "group" && m.deliveredTo.length ? `delivered ${m.deliveredTo.length}/${others}` : m.state);
    let retry = meta.children[2];
    if (own && m.state === "failed" && !retry) {
      retry = element("button", "retry", "message-retry");
      retry.textContent = "Retry";
      meta.append(retry);
    }
    if (retry) {
      retry.hidden = m.state !== "failed";
      retry.onclick = () => chat.retry(c.id, m);
    }
  });
  if (atEnd) list.scrollTop = list.scrollHeight;
}

function detail(c) {
  if (c.id === "console") return "records without a conversation";
  if (c.kind === "group") return `${c.members.length} ${c.members.length === 1 ? "member" : "members"} · ${c.id}`;
  const other = c.members.find((m) => m.user_id === chat.peer(c));
  return other && !other.known ? "has not signed up yet" : chat.peer(c);
}

// reconcile makes the children of parent those of items, keeping the elements of kept items.
function reconcile(parent, items, key, create, update) {
  const old = new Map();
  for (const child of parent.children) old.set(child.dataset.key, child);
  let before = null, at = parent.firstChild;
  for (const item of items) {
    const k = String(key(item));
    let child = old.get(k);
    if (child) old.delete(k);
    else {
      child = create();
      child.dataset.key = k;
    }
    if (child === at) at = at.nextSibling;
    else parent.insertBefore(child, at);
    update(child, item, before);
    before = item;
  }
  for (const child of old.values()) child.remove();
}

function element(tag, className = "", testid = "") {
  const e = document.createElement(tag);
  if (className) e.className = className;
  if (testid) e.dataset.testid = testid;
  if (tag === "button") e.type = "button";
  return e;
}

function text(e, value) {
  if (e.textContent !== String(value)) e.textContent = value;
}

function words(content) {
  return typeof content === "string" ? content : JSON.stringify(content);
}

function hue(id) {
  let h = 0;
  for (const ch of id) h = (h * 31 + ch.codePointAt(0)) % 360;
  return h;
}

function avatar(e, id, name) {
  e.style.setProperty("--hue", hue(id));
  text(e, [...name][0]?.toUpperCase() ?? "?");
}

// --- composer ---

$("composer").addEventListener("submit", (e) => {
  e.preventDefault();
  const content = $("message-input").value.trim();
  if (!content || !open) return;
  if (!chat.send(open, content)) return notice("Too much is waiting to be sent. Try again when you are online.");
  $("message-input").value = "";
  $("messages").scrollTop = $("messages").scrollHeight;
});
// Enter sends, Shift+Enter begins a new line. beforeinput rather than keydown: the keyboards of
// phones do not say which key it was.
let shift = false;
$("message-input").addEventListener("keydown", (e) => { shift = e.shiftKey; });
$("message-input").addEventListener("beforeinput", (e) => {
  if (e.inputType !== "insertLineBreak" || shift || e.isComposing) return;
  e.preventDefault();
  $("composer").requestSubmit();
});

// A reload goes on with the session of this tab.
if (api.session) enter();
