import assert from "node:assert/strict";
import test from "node:test";

import { applyPreset, chosenPreset, displayText, watchPreset } from "../../web/preset_widgets.js";

const DECIDED = {
  sparsity: 0.8, block_size: "64", warmup: 0.2, search_points: "0.6", head_adaptive: false, tail: "pooled",
  token_order: "similarity",
};
const PRESETS = { Fast: { ...DECIDED, sparsity: 0.9 }, Paper: { ...DECIDED, head_adaptive: true, tail: "none" } };

class Declared {
  static nodeData = { input: { required: { preset: ["COMBO", { presets: PRESETS }] } } };
}

const OWN = {
  sparsity: 0.55, block_size: "128", warmup: 0.3, search_points: "0.4", head_adaptive: true, tail: "none",
  token_order: "position",
};

function node(preset, values = OWN) {
  const named = { preset, ...values, dense_layers: "0", enabled: true };
  return Object.assign(new Declared(), {
    inputs: [{ name: "model", link: 3 }, { name: "preset", widget: { name: "preset" }, link: null }],
    widgets: Object.entries(named).map(([name, value]) => ({ name, value, options: {} })),
  });
}

const widget = (owner, name) => owner.widgets.find((candidate) => candidate.name === name);
const read = (owner) => Object.fromEntries(Object.keys(OWN).map((name) => [name, widget(owner, name).value]));

for (const preset of Object.keys(PRESETS)) {
  test(`${preset} shows its values and locks them`, () => {
    const owner = node(preset);
    applyPreset(owner);
    assert.deepEqual(read(owner), PRESETS[preset]);
    for (const name of Object.keys(OWN)) assert.equal(widget(owner, name).disabled, true);
  });
}

test("other widgets are left alone", () => {
  const owner = node("Fast");
  applyPreset(owner);
  for (const name of ["preset", "dense_layers", "enabled"]) assert.ok(!widget(owner, name).disabled);
  assert.equal(widget(owner, "dense_layers").value, "0");
});

test("Custom and unknown presets keep the user's values and free them", () => {
  for (const preset of ["Custom", "toString", "From a later version"]) {
    const owner = node(preset);
    applyPreset(owner);
    assert.deepEqual(read(owner), OWN);
    for (const name of Object.keys(OWN)) assert.equal(widget(owner, name).disabled, false);
  }
});

test("a preset that comes over a wire leaves the widgets free", () => {
  const owner = node("Fast");
  owner.inputs[1].link = 8;
  applyPreset(owner);
  assert.equal(chosenPreset(owner), null);
  assert.deepEqual(read(owner), OWN);
});

test("a locked widget still says its value", () => {
  const owner = node("Paper");
  widget(owner, "sparsity").options = { precision: 2 };
  applyPreset(owner);
  assert.equal(widget(owner, "sparsity")._displayValue, "0.80");
  assert.equal(widget(owner, "search_points")._displayValue, "0.6");
  widget(owner, "preset").value = "Custom";
  applyPreset(owner);
  assert.equal(Object.hasOwn(widget(owner, "sparsity"), "_displayValue"), false);
  assert.equal(displayText(0.125), "0.125");
});

test("a node of a server that declares no presets is left alone", () => {
  const owner = Object.setPrototypeOf(node("Fast"), Object.prototype);
  applyPreset(owner);
  assert.deepEqual(read(owner), OWN);
  assert.ok(!widget(owner, "sparsity").disabled);
});

test("a node with none of the widgets is no trouble", () => {
  applyPreset({});
  applyPreset({ widgets: [] });
});

test("changes are noticed, and what listened before still runs", () => {
  const owner = node("Fast");
  const seen = [];
  owner.onConfigure = (data) => seen.push(`configured ${data}`);
  widget(owner, "preset").callback = (value) => seen.push(`picked ${value}`);
  watchPreset(owner, () => seen.push("changed"));
  widget(owner, "preset").callback("Paper");
  owner.onConfigure("graph");
  owner.onConnectionsChange();
  assert.deepEqual(seen, ["picked Paper", "changed", "configured graph", "changed", "changed"]);
});
