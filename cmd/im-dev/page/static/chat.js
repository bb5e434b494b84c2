// The conversations of one user, as im-logic tells of them. It asks for what was missed after each
// `connected` and now and then, and confirms what arrives.
//
// Events: "change" with detail = the id of the conversation that changed, or undefined for all;
// "refused" with detail = a text to show.

import { Kept } from "./kept.js";

const SYNC_MS = 10_000; // no answer for so long: ask again
// While connected it asks now and then, too: a live record goes astray when presence is wrong for a
// moment, as after Redis lost its data.
const SYNC_EVERY_MS = 30_000;
const KEPT = 1_000; // messages of a conversation
export const OUTBOX = 200; // messages that wait for the gateway's answer

// States of own messages: pending (in the outbox), acked (Kafka has it), delivered (to all others),
// failed; of other people's: received.
export class Chat extends EventTarget {
  conversations = new Map(); // id -> {id, kind, name, members, messages, unread, touched}

  #client;
  #kept;
  #me;
  #after = 0; // sync cursor; only sync answers move it, as live records may overtake each other
  #syncing = false; // the question is in the outbox
  #syncTimer = 0;
  #receipts = new Map(); // conversation id -> Set of message ids, not yet in the outbox
  #receiptTimer = 0;
  #order = 0;
  #closed = false;

  constructor(client, me) {
    super();
    this.#client = client;
    this.#me = me;
    this.#kept = new Kept(me);
    client.on("connected", () => this.#sync());
    client.on("message", (m) => this.#record(m));
    for (const m of this.#kept.all) this.#queue(m);
  }

  // close ends it. forget: what is not settled is not to be taken up by the next one.
  close(forget) {
    this.#closed = true;
    clearTimeout(this.#syncTimer);
    clearTimeout(this.#receiptTimer);
    if (forget) this.#kept.forget();
  }

  // send shows and queues a message; false: too much is waiting.
  send(conversationId, content) {
    return this.#add("send-message", { conversation_id: conversationId, content, echo: true });
  }

  // retry queues a failed message anew.
  retry(conversationId, message) {
    if (!this.send(conversationId, message.content)) return;
    const c = this.conversations.get(conversationId);
    c.messages = c.messages.filter((m) => m !== message);
    this.#changed(conversationId);
  }

  direct(user) {
    const id = "dm:" + [this.#me, user].sort(byCodePoint).join(":");
    this.#conversation(id);
    return id;
  }

  createGroup(name, members) { return this.#add("create-group", { name, members }); }
  joinGroup(id) { return this.#add("join-group", { conversation_id: id }); }

  read(id) {
    const c = this.conversations.get(id);
    if (!c?.unread) return;
    c.unread = 0;
    this.#changed(id);
  }

  title(c) {
    if (c.kind === "group") return c.name || c.id;
    const other = this.peer(c);
    return c.members.find((m) => m.user_id === other)?.name || other;
  }

  // peer is the other user of a direct conversation.
  peer(c) {
    const pair = c.id.slice("dm:".length);
    if (pair.startsWith(this.#me + ":")) return pair.slice(this.#me.length + 1);
    return pair.slice(0, pair.length - this.#me.length - 1);
  }

  // #add queues what is not to be lost by a reload.
  #add(type, data) {
    if (this.#client.pending >= OUTBOX) return false;
    const m = { type, data, id: newId(), at: Date.now() };
    this.#kept.add(m);
    this.#queue(m);
    return true;
  }

  #queue(m) {
    if (m.type === "send-message") this.#mine(m);
    const settled = (state, answer) => {
      if (this.#closed) return; // the next one sends it again
      this.#kept.settle(m.id);
      this.#settled(m, state, answer);
    };
    this.#client.send(m.type, m.data, m.id).then((receipt) => settled("acked", receipt), (e) => settled("failed", e));
  }

  #sync() {
    this.#syncAgain(SYNC_MS);
    if (this.#syncing) return;
    this.#syncing = true;
    this.#client.send("sync", { after: this.#after })
      .catch(() => {}) // asked again by the timer
      .finally(() => { this.#syncing = false; });
  }

  #syncAgain(ms) {
    clearTimeout(this.#syncTimer);
    this.#syncTimer = setTimeout(() => this.#client.state === "online" && this.#sync(), ms);
  }

  #record({ type, message_id, data }) {
    if (!data) return;
    switch (type) {
      case "new-message":
        // A person at a console producer may send {"content": ...} alone.
        if (!data.conversation_id) this.#stray(message_id, data);
        else this.#message(data, true);
        break;
      case "message-delivered":
        this.#delivered(data);
        break;
      case "conversation":
        this.#described(data);
        break;
      case "sync":
        this.#syncing = false; // its ack may come later
        for (const c of data.conversations) this.#described(c);
        for (const m of data.messages) this.#message(m, false);
        this.#after = data.after;
        if (data.more) this.#sync();
        else this.#syncAgain(SYNC_EVERY_MS * (0.75 + Math.random() / 2));
        this.#changed();
        break;
      case "chat-error":
        this.#refused(data);
        break;
    }
  }

  #conversation(id) {
    let c = this.conversations.get(id);
    if (!c) {
      const kind = id.startsWith("dm:") ? "dm" : "group";
      c = { id, kind, name: "", members: [], messages: [], unread: 0, touched: Date.now() };
      this.conversations.set(id, c);
      this.#changed(id);
    }
    return c;
  }

  #described(view) {
    const c = this.#conversation(view.conversation_id);
    c.kind = view.kind;
    c.name = view.name;
    c.members = view.members;
    this.#changed(c.id);
    if (view.client_msg_id && view.kind === "group") {
      this.dispatchEvent(new CustomEvent("joined", { detail: c.id }));
    }
  }

  // #mine shows a message of the outbox.
  #mine({ id, data, at }) {
    const c = this.#conversation(data.conversation_id);
    c.messages.push({
      id: "", clientId: id, from: this.#me, fromName: "", content: data.content,
      seq: 0, sentAt: at, state: "pending", deliveredTo: [], order: ++this.#order,
    });
    c.touched = Date.now();
    this.#changed(c.id);
  }

  #message(data, live) {
    const c = this.#conversation(data.conversation_id);
    const own = data.from === this.#me;
    let m = c.messages.find((m) => m.id === data.message_id || (own && m.clientId && m.clientId === data.client_msg_id));
    if (!m) {
      m = { clientId: own ? data.client_msg_id : "", from: data.from, deliveredTo: [], state: "", order: ++this.#order };
      c.messages.push(m);
      if (!own) c.unread++;
      c.touched = Math.max(c.touched, live ? Date.now() : data.sent_at);
    }
    m.id = data.message_id;
    m.fromName = data.from_name;
    m.content = data.content;
    m.seq = data.seq;
    m.sentAt = data.sent_at;
    m.deliveredTo = union(m.deliveredTo, data.delivered_to);
    this.#state(c, m);
    c.messages.sort(bySeq);
    if (c.messages.length > KEPT) c.messages.splice(0, c.messages.length - KEPT);
    if (!own && !m.deliveredTo.includes(this.#me)) this.#confirm(c.id, m.id);
    this.#changed(c.id);
  }

  #stray(id, data) {
    const c = this.#conversation("console");
    c.name = "Console";
    const content = typeof data === "object" && "content" in data ? data.content : data;
    c.messages.push({ id, clientId: "", from: "console", fromName: "", content, seq: 0, sentAt: Date.now(), state: "received", deliveredTo: [], order: ++this.#order });
    c.unread++;
    c.touched = Date.now();
    this.#changed(c.id);
  }

  #delivered(data) {
    const c = this.conversations.get(data.conversation_id);
    const m = c?.messages.find((m) => m.id === data.message_id || (m.clientId && m.clientId === data.client_msg_id));
    if (!m) return; // the next sync tells of it
    m.deliveredTo = union(m.deliveredTo, data.delivered_to);
    this.#state(c, m);
    this.#changed(c.id);
  }

  // #state is called for messages that im-logic knows of, so they are acked at least.
  #state(c, m) {
    if (m.from !== this.#me) {
      m.state = "received";
      return;
    }
    const others = c.kind === "dm" ? 1 : c.members.length - 1;
    m.state = m.deliveredTo.length >= Math.max(others, 1) ? "delivered" : "acked";
  }

  // #settled takes the gateway's answer: a receipt, or an error.
  #settled({ type, data, id }, state, answer) {
    if (type !== "send-message") {
      if (state === "failed") this.#refuse(answer.code);
      return;
    }
    const c = this.conversations.get(data.conversation_id);
    const m = c?.messages.find((m) => m.clientId === id);
    if (!m || m.state === "delivered" || m.state === "failed") return;
    m.state = state;
    if (answer.messageId) m.id ||= answer.messageId;
    this.#changed(c.id);
  }

  #refused({ client_msg_id, message }) {
    for (const c of this.conversations.values()) {
      const m = client_msg_id && c.messages.find((m) => m.clientId === client_msg_id);
      if (m) {
        m.state = "failed";
        this.#changed(c.id);
      }
    }
    this.#refuse(message);
  }

  #refuse(text) {
    this.dispatchEvent(new CustomEvent("refused", { detail: text }));
  }

  // #confirm gathers receipts for a moment: a sync may bring many messages.
  #confirm(conversationId, id) {
    if (!this.#receipts.has(conversationId)) this.#receipts.set(conversationId, new Set());
    this.#receipts.get(conversationId).add(id);
    if (!this.#receiptTimer) this.#receiptTimer = setTimeout(() => this.#sendReceipts(), 50);
  }

  #sendReceipts() {
    this.#receiptTimer = 0;
    for (const [conversation_id, ids] of this.#receipts) {
      if (this.#client.pending >= OUTBOX) {
        this.#receiptTimer = setTimeout(() => this.#sendReceipts(), 1_000);
        return;
      }
      const message_ids = [...ids].slice(0, 200);
      // Not kept over a reload: the sync after it brings the messages again.
      this.#client.send("delivered", { conversation_id, message_ids }).catch(() => {});
      for (const id of message_ids) ids.delete(id);
      if (ids.size === 0) this.#receipts.delete(conversation_id);
    }
    if (this.#receipts.size > 0) this.#sendReceipts();
  }

  #changed(id) {
    this.dispatchEvent(new CustomEvent("change", { detail: id }));
  }
}

// newId names a message over reloads too; randomUUID needs https.
function newId() {
  return Array.from(crypto.getRandomValues(new Uint8Array(12)), (b) => b.toString(16).padStart(2, "0")).join("");
}

// byCodePoint orders as im-logic does: by the bytes of UTF-8.
function byCodePoint(a, b) {
  const x = [...a], y = [...b];
  for (let i = 0; i < Math.min(x.length, y.length); i++) {
    if (x[i] !== y[i]) return x[i].codePointAt(0) - y[i].codePointAt(0);
  }
  return x.length - y.length;
}

// bySeq keeps what im-logic has not numbered yet at the end.
function bySeq(a, b) {
  return (a.seq || Infinity) - (b.seq || Infinity) || a.order - b.order;
}

function union(a, b) {
  return [...new Set([...a, ...(b ?? [])])];
}
