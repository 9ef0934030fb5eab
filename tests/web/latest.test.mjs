import assert from "node:assert/strict";
import test from "node:test";

import { Latest } from "../../web/latest.js";

test("keeps the last message of every node of a workflow", () => {
  const latest = new Latest();
  latest.set("a", "1", "old");
  latest.set("a", "1", "new");
  latest.set("a", "2:3", "inside");
  latest.set("b", "1", "elsewhere");
  assert.deepEqual(latest.of("a").map(({ node, message }) => [node, message]), [
    ["1", "new"],
    ["2:3", "inside"],
  ]);
  assert.deepEqual(latest.of("none"), []);
});

test("forgets the oldest beyond its limit", () => {
  const latest = new Latest(null, 2);
  for (const node of ["1", "2", "1", "3"]) latest.set("a", node, node);
  assert.deepEqual(latest.of("a").map(({ node }) => node), ["1", "3"]);
});

class Store {
  items = {};
  getItem(key) {
    return this.items[key] ?? null;
  }
  setItem(key, value) {
    this.items[key] = value;
  }
}

test("messages outlive the page", () => {
  const store = new Store();
  new Latest(store).set("a", "1", { text: "done" });
  assert.deepEqual(new Latest(store).get("a", "1"), { text: "done" });
  assert.equal(new Latest(store).get("a", "2"), null);
});

test("a damaged or full storage does no harm", () => {
  for (const text of ["{", "5", "[null, 1]"]) {
    assert.deepEqual(new Latest({ getItem: () => text, setItem() {} }).of("a"), []);
  }
  const full = { getItem: () => null, setItem() { throw new Error("full"); } };
  const latest = new Latest(full);
  latest.set("a", "1", "text");
  assert.equal(latest.get("a", "1"), "text");
});
