// A program for Node with the package ws, checked by the compiler alone.
import WebSocket from "ws";
import { Client } from "im-gateway-client";

new Client({
  urls: "wss://a/ws", token: () => "t", tokenIn: "header",
  webSocket: (url, protocols, headers) => new WebSocket(url, protocols, { headers }),
}).connect();
