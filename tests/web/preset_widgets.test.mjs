import assert from "node:assert/strict";
import test from "node:test";

import { applyPreset, chosenPreset, displayText, watchPreset } from "../../web/preset_widgets.js";
import { PRESETS, presetValues } from "../../web/presets.js";

const OWN = {
  sparsity: 0.55, block_size: "128", warmup: 0.3, search_points: "0.4", head_adaptive: true, tail: "none",
  token_order: "position",
};

function node(preset, values = OWN) {
  const named = { preset, ...values, dense_layers: "0", enabled: true };
  return {
    inputs: [{ name: "model", link: 3 }, { name: "preset", widget: { name: "preset" }, link: null }],
    widgets: Object.entries(named).map(([name, value]) => ({ name, value, options: {} })),
  };
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

test("every preset decides the same widgets", () => {
  for (const values of Object.values(PRESETS)) assert.deepEqual(Object.keys(values), Object.keys(OWN));
});

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
  assert.equal(presetValues("Custom"), null);
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
  widget(owner, "preset").callback("Quality");
  owner.onConfigure("graph");
  owner.onConnectionsChange();
  assert.deepEqual(seen, ["picked Quality", "changed", "configured graph", "changed", "changed"]);
});
