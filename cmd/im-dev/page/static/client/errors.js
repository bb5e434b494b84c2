export class ClientError extends Error {
    code;
    closeCode;
    name = "ClientError";
    /** closeCode is the WebSocket's, when a close is what happened. */
    constructor(code, message, closeCode, options) {
        super(message, options);
        this.code = code;
        this.closeCode = closeCode;
    }
}
