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
  const latest = new Latest(2);
  for (const node of ["1", "2", "1", "3"]) latest.set("a", node, node);
  assert.deepEqual(latest.of("a").map(({ node }) => node), ["1", "3"]);
});
