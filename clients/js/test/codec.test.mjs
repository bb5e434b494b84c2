// The two forms of a frame, against vectors of the gateway's own code (codec/vectors_test.go).
import test from "node:test";
import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { decode, decodeProtobuf, encode, size } from "../dist/frames.js";

const vectors = JSON.parse(readFileSync(new URL("../../../codec/testdata/vectors.json", import.meta.url), "utf8"));
const bytes = (hex) => new Uint8Array(Buffer.from(hex, "hex"));

test("a client's frames are byte for byte what the generated code writes", () => {
  assert.ok(vectors.client.length > 4);
  for (const { proto, ...frame } of vectors.client) {
    const b = encode("protobuf", frame);
    assert.equal(Buffer.from(b).toString("hex"), proto);
    assert.equal(size(b), proto.length / 2);
    const s = encode("json", frame);
    assert.deepEqual(JSON.parse(s), { ...frame, ...frame.data && { data: JSON.parse(frame.data) } });
    assert.equal(size(s), Buffer.byteLength(s));
  }
});

test("a gateway's frames mean the same in both forms, also in pieces of other sizes", () => {
  assert.ok(vectors.server.length > 10);
  for (const { name, json, proto } of vectors.server) {
    assert.deepEqual(decode(JSON.stringify(json)), json, name);
    const b = bytes(proto);
    assert.deepEqual(decode(b.buffer.slice(b.byteOffset, b.byteOffset + b.length)), json, name);
    for (let n = 0; n < Math.min(b.length, 200); n++) { // cut anywhere: a frame or an error, never a hang
      try {
        decodeProtobuf(b.subarray(0, n));
      } catch (e) {
        assert.ok(e instanceof Error);
      }
    }
  }
});

test("what is no frame is refused", () => {
  for (const [name, proto] of Object.entries(vectors.malformed)) assert.throws(() => decodeProtobuf(bytes(proto)), name);
  for (const text of ["", "{", "null", "1", "[]", "{}", '{"type":1}']) assert.throws(() => decode(text), text);
  for (const data of ["{", "\ufeff1"]) { // data that is no JSON
    assert.throws(() => decodeProtobuf(encode("protobuf", { type: "t", data })), SyntaxError);
  }
  let state = 1; // any bytes at all
  for (let i = 0; i < 20_000; i++) {
    const b = Uint8Array.from({ length: i % 40 }, () => (state = (state * 48271) % 2147483647) & 255);
    try {
      decodeProtobuf(b);
    } catch (e) {
      assert.ok(e instanceof RangeError || e instanceof TypeError || e instanceof SyntaxError, String(e));
    }
  }
});
