import assert from "node:assert/strict";
import test from "node:test";

import { findNode } from "../../web/find_node.js";

const graph = (...nodes) => ({ getNodeById: (id) => nodes.find((node) => node.id === id) ?? null });

const deep = { id: 9 };
const inner = { id: 5 };
const nested = { id: 6, subgraph: graph(deep) };
const outer = { id: "12", subgraph: graph(inner, nested) };
const root = graph({ id: 7 }, outer);

test("finds nodes on the canvas, whether ids are numbers or text", () => {
  assert.equal(findNode(root, "7").id, 7);
  assert.equal(findNode(root, 7).id, 7);
  assert.equal(findNode(root, "12"), outer);
});

test("follows a path into subgraphs", () => {
  assert.equal(findNode(root, "12:5"), inner);
  assert.equal(findNode(root, "12:6:9"), deep);
});

test("answers null for what is gone", () => {
  for (const id of ["8", "12:8", "7:5", "1:2:3", "", null]) assert.equal(findNode(root, id), null);
  assert.equal(findNode(undefined, "7"), null);
});
