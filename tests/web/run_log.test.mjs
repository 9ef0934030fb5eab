import assert from "node:assert/strict";
import test from "node:test";

import { RunLog, haveChanged } from "../../web/run_log.js";
import { line } from "../../web/speak.js";

const SUCCESS = { how: "success", node: "" };
const ATTENTION = { mode: 0, known: true, patches: true, users: ["5", "6"] };

function told(...said) {
  const log = new RunLog();
  for (const [node, how] of said) log.tell(node, how);
  return log;
}

test("a node that sampled, or only shows, keeps its own last words", () => {
  const log = told(["1", "ready"], ["1", "ran"], ["2", "ready"]);
  for (const how of ["success", "stopped", "failed"]) {
    assert.equal(log.verdict("1", ATTENTION, { how, node: "9" }), null);
    assert.equal(log.verdict("2", { ...ATTENTION, patches: false }, { how, node: "9" }), null);
  }
});

test("a node whose model another one took, or nobody, says that it did not sample", () => {
  const unused = { text: line("unused") };
  assert.deepEqual(told(["1", "ready"]).verdict("1", { ...ATTENTION, users: [] }, SUCCESS), unused);
  const log = new RunLog();
  log.cache(["1"]);
  assert.deepEqual(log.verdict("1", ATTENTION, SUCCESS), { note: line("cached") });
  log.execute("55");
  assert.deepEqual(log.verdict("1", ATTENTION, SUCCESS), { note: line("cached") });
  // a sampler inside a subgraph
  log.execute("5:3");
  assert.deepEqual(log.verdict("1", ATTENTION, SUCCESS), unused);
  // one that only hands the model on has done its part
  assert.equal(log.verdict("1", { ...ATTENTION, patches: false }, SUCCESS), null);
});

test("an error is shown on the node that made it, and the others say that it came before them", () => {
  const end = { how: "failed", node: "1", message: "`sparsity` must be ...\n" };
  const log = told(["1", "ready"]);
  assert.deepEqual(log.verdict("1", ATTENTION, end), { text: { text: "`sparsity` must be ..." } });
  assert.deepEqual(log.verdict("2", ATTENTION, end), { text: line("failed_before") });
  assert.deepEqual(log.verdict("2", ATTENTION, { how: "stopped" }), { text: line("stopped_before") });
});

test("a node that was not asked says why", () => {
  const log = new RunLog();
  log.cache([3]);
  assert.deepEqual(log.verdict("3", ATTENTION, SUCCESS), { note: line("cached") });
  assert.deepEqual(log.verdict("3", { ...ATTENTION, known: false }, SUCCESS), { text: line("cached") });
  assert.deepEqual(log.verdict("4", ATTENTION, SUCCESS), { text: line("apart") });
  assert.deepEqual(log.verdict("4", { ...ATTENTION, mode: 4 }, SUCCESS), { text: line("bypassed") });
  assert.deepEqual(log.verdict("4", { ...ATTENTION, mode: 2 }, SUCCESS), { text: line("muted") });
});

test("every execution begins anew", () => {
  const log = told(["1", "ran"]);
  log.cache(["2"]);
  log.begin();
  assert.deepEqual(log.verdict("1", ATTENTION, SUCCESS), { text: line("apart") });
  assert.deepEqual(log.verdict("2", ATTENTION, SUCCESS), { text: line("apart") });
});

test("settings have changed when a widget holds another value", () => {
  const widgets = [{ name: "sparsity", value: 0.8 }, { name: "preset", value: "Fast" }, { name: "status", value: "x" }];
  const changed = (settings, wired = []) => haveChanged(settings, widgets, (name) => wired.includes(name));
  assert.equal(changed({ sparsity: 0.8, preset: "Fast" }), false);
  assert.equal(changed({ sparsity: 0.7, preset: "Fast" }), true);
  assert.equal(changed({ sparsity: 0.7, preset: "Fast" }, ["sparsity"]), false);
  assert.equal(changed(null), false);
  assert.equal(haveChanged({ sparsity: 1 }, undefined, () => false), false);
});
