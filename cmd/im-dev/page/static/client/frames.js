// The two forms of a frame: JSON text (im.json.v1) and protobuf (im.proto.v1, the messages ClientFrame and
// ServerFrame of codec/proto/im/client/v1/client.proto). data is JSON in both.
const text = new TextEncoder();
export function encode(format, f) {
    if (format === "protobuf")
        return encodeProtobuf(f);
    let s = `{"type":${JSON.stringify(f.type)}`;
    if (f.message_id !== undefined)
        s += `,"message_id":${JSON.stringify(f.message_id)}`;
    if (f.data !== undefined)
        s += `,"data":${f.data}`;
    if (f.timestamp !== undefined)
        s += `,"timestamp":${f.timestamp}`;
    return s + "}";
}
/** Bytes that a frame takes on the wire. */
export function size(w) {
    return typeof w === "string" ? text.encode(w).length : w.length;
}
/** The frame of a message. Throws on what is none. */
export function decode(message) {
    const f = typeof message === "string" ? JSON.parse(message) : decodeProtobuf(new Uint8Array(message));
    if (typeof f?.type !== "string")
        throw new TypeError("a frame without a type");
    return f;
}
/** A ClientFrame's bytes, as the generated code writes them: fields by number, empty ones left out. */
export function encodeProtobuf(f) {
    const out = [];
    const varint = (n) => {
        for (; n >= 128; n = Math.floor(n / 128))
            out.push((n % 128) | 128);
        out.push(n);
    };
    const field = (number, s) => {
        if (!s)
            return;
        const b = text.encode(s);
        out.push(number << 3 | 2);
        varint(b.length);
        out.push(b);
    };
    field(1, f.type);
    field(2, f.message_id);
    field(3, f.data);
    if (f.timestamp) {
        out.push(4 << 3);
        varint(f.timestamp);
    }
    const b = new Uint8Array(out.reduce((n, p) => n + (typeof p === "number" ? 1 : p.length), 0));
    let at = 0;
    for (const p of out) {
        if (typeof p === "number")
            b[at++] = p;
        else {
            b.set(p, at);
            at += p.length;
        }
    }
    return b;
}
/** The frame of a ServerFrame's bytes; fields that are not known are skipped. Throws on what is no ServerFrame. */
export function decodeProtobuf(b) {
    let at = 0;
    const varint = () => {
        let n = 0;
        for (let scale = 1, i = 0; i < 10 && at < b.length; scale *= 128, i++) {
            const c = b[at++];
            n += (c & 127) * scale;
            if (c < 128)
                return n;
        }
        throw new RangeError("a varint has no end");
    };
    const take = (n) => {
        if (n > b.length - at)
            throw new RangeError("a field is cut short");
        return b.subarray(at, (at += n));
    };
    const utf8 = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true });
    const frame = { type: "" };
    while (at < b.length) {
        const key = varint();
        const field = Math.floor(key / 8);
        if (field === 0)
            throw new RangeError("a field without a number");
        switch (key % 8) {
            case 0: {
                const n = varint();
                if (field === 4)
                    frame.timestamp = n;
                if (field === 5)
                    frame.delivery_id = n;
                break;
            }
            case 1:
                take(8);
                break;
            case 2: {
                const v = take(varint());
                if (field === 1)
                    frame.type = utf8.decode(v);
                if (field === 2)
                    frame.message_id = utf8.decode(v);
                if (field === 3)
                    frame.data = JSON.parse(utf8.decode(v));
                break;
            }
            case 5:
                take(4);
                break;
            default: throw new RangeError("a field of unknown kind");
        }
    }
    return frame;
}
