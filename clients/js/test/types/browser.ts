// A program for the browser, checked by the compiler alone.
import { Client, ClientError, type Frame, type Receipt } from "im-gateway-client";

const client = new Client({ urls: ["wss://a/ws", "wss://b/ws"], token: async (reason) => (reason === "refused" ? "new" : "old"), webSocket: (url, protocols) => new WebSocket(url, protocols) });
client.on("message", (m: Frame) => m.data.content);
const off: () => void = client.on("state", ({ state, error, retryAt }) => {
  if (state === "waiting") console.log((retryAt ?? 0) - Date.now(), error?.closeCode);
});
off();
const sent = client.send("send-message", { content: "hi" });
const id: string = sent.messageId;
const receipt: Receipt = await sent;
console.log(id, receipt.offset?.toFixed());
client.session?.max_message_bytes.toFixed();
const code = new ClientError("OUTBOX_FULL", "full").code;
if (code === "OUTBOX_FULL") client.close();

// @ts-expect-error an event that is none
client.on("closed", () => {});
// @ts-expect-error no token
new Client({ urls: "wss://a/ws" });
// @ts-expect-error a way that is none
new Client({ urls: "wss://a/ws", token: () => "t", tokenIn: "cookie" });
// @ts-expect-error the state is the client's
client.state = "online";
