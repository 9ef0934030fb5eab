import assert from "node:assert/strict";
import test from "node:test";

import { fold, watchFolding } from "../../web/folding.js";
import { chain, watch } from "../../web/listen.js";

test("folds what the server calls advanced, unless a wire leads to it", () => {
  const widgets = [
    { name: "preset", options: {} },
    { name: "sparsity", options: { advanced: true } },
    { name: "warmup", options: { advanced: true } },
  ];
  const node = { widgets, inputs: [{ widget: { name: "warmup" }, link: 4 }] };
  fold(node);
  assert.deepEqual(widgets.map(({ advanced }) => Boolean(advanced)), [false, true, false]);
  node.inputs[0].link = null;
  fold(node);
  assert.equal(widgets[2].advanced, true);
  fold({});
});

test("a folded widget takes no room until the node shows it", () => {
  const widgets = [{ name: "sparsity", options: { advanced: true } }, { name: "enabled", options: {} }];
  const node = { widgets };
  fold(node);
  watchFolding(node);
  assert.deepEqual(widgets.map(({ hidden }) => Boolean(hidden)), [true, false]);
  node.showAdvanced = true;
  assert.ok(!widgets[0].hidden);
  widgets[0].hidden = true;
  assert.ok(widgets[0].hidden);
});

test("folding moves a node's lower edge by what it hides", () => {
  const node = {
    size: [300, 140],
    computeSize() {
      return [200, this.showAdvanced ? 500 : 100];
    },
    toggleAdvanced() {
      this.showAdvanced = !this.showAdvanced;
    },
    setSize(size) {
      this.size = size;
    },
  };
  watchFolding(node);
  node.toggleAdvanced();
  assert.deepEqual(node.size, [300, 540]);
  node.toggleAdvanced();
  assert.deepEqual(node.size, [300, 140]);
  // smaller than it needs, as a graph of another version may be
  node.size = [300, 40];
  node.toggleAdvanced();
  assert.deepEqual(node.size, [300, 500]);
});

test("what listened before still runs, with its result and arguments", () => {
  const seen = [];
  const target = { callback: (value) => seen.push(`first ${value}`) };
  chain(target, "callback", (value) => seen.push(`then ${value}`));
  assert.equal(target.callback("x"), 1);
  chain(target, "absent", () => seen.push("absent"));
  target.absent();
  assert.deepEqual(seen, ["first x", "then x", "absent"]);
});

test("every widget, a load and a wire are noticed", () => {
  const seen = [];
  const node = { widgets: [{ name: "a" }, { name: "b" }] };
  watch(node, {
    changed: ({ name }) => seen.push(name),
    loaded: () => seen.push("loaded"),
    wired: () => seen.push("wired"),
  });
  node.widgets[1].callback();
  node.onConfigure();
  node.onConnectionsChange();
  watch({}, {});
  assert.deepEqual(seen, ["b", "loaded", "wired"]);
});
