import assert from "node:assert/strict";
import test from "node:test";

import { line, readLine, say } from "../../web/speak.js";

const SHORT = { text: "too short: 288 tokens, and `min_tokens` is 8,192", code: "too_short", values: { tokens: "288", least: "8,192" } };
const LEAVE = { text: "too short: ...: leave AdaSpa off.", code: "leave_off", values: { why: SHORT } };

test("a line is said in the interface's language, with the lines inside of it", () => {
  assert.equal(say(LEAVE, "zh"), "太短：288 个 token，而 `min_tokens` 为 8,192：请关闭 AdaSpa。");
  assert.equal(say(LEAVE, "zh-TW"), say(LEAVE, "zh"));
  for (const locale of ["en", "fr", undefined]) assert.equal(say(LEAVE, locale), LEAVE.text);
});

test("a line without words, or of a newer server, is said as it came", () => {
  assert.equal(say({ text: "as it is" }, "ja"), "as it is");
  assert.equal(say({ text: "new", code: "not_known_here", values: {} }, "ja"), "new");
  assert.equal(say({ text: "x", code: "toString", values: {} }, "ja"), "x");
});

test("the page's own lines have English of their own", () => {
  assert.equal(line("count_dense", { count: 3 }).text, "3 dense");
  assert.equal(say(line("count_dense", { count: 3 }), "ko"), "전체 3");
});

test("a message is read into lines of text", () => {
  assert.deepEqual(readLine("plain"), { text: "plain" });
  assert.deepEqual(readLine({ text: "a", code: 7 }), { text: "a" });
  assert.deepEqual(readLine({ text: "a", code: "took", values: { took: 3 } }).values.took, { text: "" });
  for (const said of [null, undefined, 7, {}]) assert.equal(readLine(said), null);
});
