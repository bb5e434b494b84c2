// The client of im-gateway for browsers and Node: one user's connection, kept up across gateways, with an
// outbox that loses nothing while it lives and keeps order. README.md says what it promises.
export { Client } from "./client.js";
export { ClientError } from "./errors.js";
