import assert from "node:assert/strict";
import test from "node:test";

import { applyPreset, beginPreset, chosenPreset, displayText } from "../../web/preset_widgets.js";

const DECIDED = {
  sparsity: 0.8, block_size: "64", warmup: 0.2, search_points: "0.6", head_adaptive: false, tail: "pooled",
  token_order: "similarity",
};
const PRESETS = {
  Fast: { ...DECIDED, sparsity: 0.9 },
  Paper: { ...DECIDED, head_adaptive: true, tail: "none", recall: 0 },
};

class Declared {
  static nodeData = {
    input: {
      required: {
        preset: ["COMBO", { presets: PRESETS, earlier: { Fast: { warmup: 0.06 } } }],
        sparsity: ["FLOAT", {}],
        head_adaptive: ["BOOLEAN", { replaces: ["recall"] }],
      },
      optional: { recall: ["FLOAT", { replaces: ["sparsity", "head_adaptive"] }] },
    },
  };
}

const OWN = {
  sparsity: 0.55, block_size: "128", warmup: 0.3, search_points: "0.4", head_adaptive: true, tail: "none",
  token_order: "position",
};

function node(preset, values = {}) {
  const named = { preset, ...OWN, recall: 0, dense_layers: "0", enabled: true, ...values };
  return Object.assign(new Declared(), {
    properties: {},
    inputs: [{ name: "model", link: 3 }, { name: "preset", widget: { name: "preset" }, link: null }],
    widgets: Object.entries(named).map(([name, value]) => ({ name, value, options: {} })),
  });
}

const widget = (owner, name) => owner.widgets.find((candidate) => candidate.name === name);
const read = (owner) => Object.fromEntries(Object.keys(OWN).map((name) => [name, widget(owner, name).value]));

for (const preset of Object.keys(PRESETS)) {
  test(`${preset} shows its values and locks them`, () => {
    const owner = node(preset);
    beginPreset(owner);
    const { recall, ...decided } = PRESETS[preset];
    assert.deepEqual(read(owner), decided);
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
    beginPreset(owner);
    assert.deepEqual(read(owner), OWN);
    for (const name of Object.keys(OWN)) assert.ok(!widget(owner, name).disabled);
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

const pick = (owner, preset) => {
  widget(owner, "preset").value = preset;
  applyPreset(owner);
};

test("Custom begins with the preset's values, and later gets the user's back", () => {
  const owner = node("Fast");
  beginPreset(owner);
  pick(owner, "Custom");
  assert.equal(widget(owner, "sparsity").value, 0.9);
  widget(owner, "sparsity").value = 0.85;
  for (const preset of ["Paper", "Fast", "Custom"]) pick(owner, preset);
  assert.equal(widget(owner, "sparsity").value, 0.85);
  assert.equal(widget(owner, "head_adaptive").value, false);
  assert.deepEqual(owner.properties, {});
});

test("what the user had set is saved with the graph and outlives a load", () => {
  const owner = node("Custom");
  beginPreset(owner);
  pick(owner, "Fast");
  const loaded = node("Fast", PRESETS.Fast);
  loaded.properties = structuredClone(owner.properties);
  beginPreset(loaded);
  pick(loaded, "Custom");
  assert.deepEqual(read(loaded), OWN);
});

test("a preset that is another than when the graph was saved says so once, and Custom has its old values", () => {
  const before = node("Fast");
  beginPreset(before);
  assert.equal(beginPreset(before, before.properties), null);
  const loaded = node("Fast", PRESETS.Fast);
  loaded.properties = structuredClone(before.properties);
  Object.assign(loaded.properties.adaspa_preset_values.values, { sparsity: 0.95, search_points: "0.3" });
  const saved = structuredClone(loaded.properties);
  // a front end connects the inputs before it has set the widgets
  pick(loaded, "Paper");
  pick(loaded, "Fast");
  assert.deepEqual(beginPreset(loaded, saved), { preset: "Fast", values: "sparsity 0.95, search_points 0.3" });
  assert.equal(widget(loaded, "sparsity").value, 0.9);
  const again = node("Fast", PRESETS.Fast);
  again.properties = structuredClone(loaded.properties);
  assert.equal(beginPreset(again, loaded.properties), null);
  pick(again, "Custom");
  assert.deepEqual(read(again), { ...PRESETS.Fast, sparsity: 0.95, search_points: "0.3" });
  assert.deepEqual(again.properties, {});
});

test("a graph of 0.1.0, which kept no values, is known by all of its preset's", () => {
  const of01 = { ...PRESETS.Fast, warmup: 0.06 };
  const owner = node("Fast", of01);
  assert.deepEqual(beginPreset(owner), {
    preset: "Fast",
    values: "warmup 0.06",
  });
  assert.equal(widget(owner, "warmup").value, PRESETS.Fast.warmup);
  // written by hand, of another preset, or saved since
  for (const value of [{}, { ...of01, sparsity: 0.5 }, PRESETS.Fast]) assert.equal(beginPreset(node("Fast", value)), null);
  assert.equal(beginPreset(node("Paper", of01)), null);
  assert.equal(beginPreset(node("Fast", of01), { adaspa_preset_values: { preset: "Fast", values: PRESETS.Fast } }), null);
});

test("a graph of a time without such a note, or with another preset, says nothing", () => {
  for (const saved of [undefined, { preset: "Paper", values: { sparsity: 0.1 } }]) {
    const loaded = node("Fast");
    if (saved) loaded.properties.adaspa_preset_values = saved;
    assert.equal(beginPreset(loaded, { ...loaded.properties }), null);
    pick(loaded, "Custom");
    assert.equal(widget(loaded, "sparsity").value, 0.9);
  }
});

test("a preset that decides the recall gives it back", () => {
  const owner = node("Fast", { recall: 0.95 });
  beginPreset(owner);
  pick(owner, "Paper");
  assert.deepEqual([widget(owner, "recall").value, widget(owner, "recall").disabled], [0, true]);
  pick(owner, "Fast");
  assert.deepEqual([widget(owner, "recall").value, widget(owner, "recall").disabled], [0.95, false]);
});

test("a recall greys what it replaces, and the other way round", () => {
  const owner = node("Custom", { head_adaptive: false });
  const disabled = () => ["sparsity", "head_adaptive", "recall"].filter((name) => widget(owner, name).disabled);
  beginPreset(owner);
  assert.deepEqual(disabled(), []);
  widget(owner, "recall").value = 0.9;
  applyPreset(owner);
  assert.deepEqual(disabled(), ["sparsity", "head_adaptive"]);
  Object.assign(widget(owner, "recall"), { value: 0 });
  Object.assign(widget(owner, "head_adaptive"), { value: true });
  applyPreset(owner);
  assert.deepEqual(disabled(), ["recall"]);
  // an older graph may hold both; either can be switched off
  widget(owner, "recall").value = 0.9;
  applyPreset(owner);
  assert.deepEqual(disabled(), ["sparsity"]);
});
