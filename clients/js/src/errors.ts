/** What went wrong: a code of the gateway's (docs/protocol.md), or of the client's own. */
export type ErrorCode =
  // Of a message that the gateway refused; one that sending again may mend is sent again instead.
  | "INVALID_MESSAGE" | "MESSAGE_TOO_LARGE"
  // Of an `error` event, when the gateway named no message.
  | "RATE_LIMITED" | "OVERLOADED" | "AUTH_FAILED" | "TOKEN_EXPIRED"
  // Of send().
  | "OUTBOX_FULL" | "DUPLICATE_ID" | "CLOSED"
  // Of a connection that ended or was not made: by a close, by silence, by bytes that are no frame, because
  // listeners are too slow, or because no WebSocket could be made at all.
  | "DISCONNECTED" | "TIMEOUT" | "PROTOCOL" | "SLOW_LISTENER" | "CONNECT"
  // The token callback or a listener failed; cause says how.
  | "TOKEN" | "LISTENER"
  | (string & {});

export class ClientError extends Error {
  override readonly name = "ClientError";
  /** closeCode is the WebSocket's, when a close is what happened. */
  constructor(readonly code: ErrorCode, message: string, readonly closeCode?: number, options?: { cause?: unknown }) {
    super(message, options);
  }
}
