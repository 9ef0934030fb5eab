import assert from "node:assert/strict";
import test from "node:test";

import { downstream, everyNode, findNode } from "../../web/find_node.js";

const graph = (...nodes) => ({ nodes, getNodeById: (id) => nodes.find((node) => node.id === id) ?? null });

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

test("lists every node by its id in a prompt", () => {
  const ids = everyNode(root).map(({ id, node }) => [id, node.id]);
  assert.deepEqual(ids, [["7", 7], ["12", "12"], ["12:5", 5], ["12:6", 6], ["12:6:9", 9]]);
  assert.deepEqual(everyNode(null), []);
});

test("follows a model to all nodes that take it on", () => {
  const targets = { 1: 2, 2: 3, 3: 4, 4: -20, 5: 9 };
  const nodes = [
    { id: 1, outputs: [{ type: "MODEL", links: [1, 2] }, { type: "ADASPA", links: [5] }] },
    { id: 2, outputs: [{ type: "MODEL", links: [3] }, { type: "MODEL", links: null }] },
    { id: 3, outputs: [{ type: "LATENT", links: [5] }] },
    // out of the subgraph: where the model goes there is not looked up
    { id: 4, outputs: [{ type: "MODEL", links: [4, 1] }] },
    { id: 9, outputs: [] },
  ];
  const inside = { ...graph(...nodes), getLink: (link) => ({ target_id: targets[link] }) };
  for (const node of nodes) node.graph = inside;
  assert.deepEqual(downstream("1", nodes[0], "MODEL").sort(), ["-20", "2", "3", "4"]);
  assert.deepEqual(downstream("12:1", nodes[0], "ADASPA"), ["12:9"]);
  assert.deepEqual(downstream("9", nodes[4], "MODEL"), []);
});
