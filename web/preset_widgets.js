// Greys out the widgets that the chosen preset decides, and shows the preset's values in them.

/** What each preset puts into which widgets, as the server declares it beside the preset's options. */
export function presetsOf(node) {
  return node.constructor?.nodeData?.input?.required?.preset?.[1]?.presets ?? {};
}

/** The name of the preset in force, or null when another node supplies it. */
export function chosenPreset(node) {
  const linked = node.inputs?.some((input) => input.widget?.name === "preset" && input.link != null);
  return linked ? null : node.widgets?.find((widget) => widget.name === "preset")?.value ?? null;
}

export function applyPreset(node) {
  const presets = presetsOf(node);
  const chosen = chosenPreset(node);
  // Custom, and a name from elsewhere, leave the values to the user
  const values = Object.hasOwn(presets, chosen) ? presets[chosen] : null;
  for (const name of new Set(Object.values(presets).flatMap(Object.keys))) {
    const widget = node.widgets?.find((candidate) => candidate.name === name);
    if (!widget) continue;
    if (values && widget.value !== values[name]) widget.value = values[name];
    widget.disabled = Boolean(values);
    showWhileDisabled(widget, Boolean(values));
  }
}

// the canvas renderer blanks the value of a disabled widget; here it is what the user must see
function showWhileDisabled(widget, disabled) {
  if (!disabled) {
    delete widget._displayValue;
    return;
  }
  Object.defineProperty(widget, "_displayValue", {
    configurable: true,
    get: () => displayText(widget.value, widget.options?.precision),
  });
}

export function displayText(value, precision) {
  return typeof value === "number" && precision != null ? value.toFixed(precision) : String(value);
}

/** Calls `changed` whenever a user picks another preset, a graph is loaded or a wire moves. */
export function watchPreset(node, changed) {
  const preset = node.widgets?.find((widget) => widget.name === "preset");
  if (preset) chain(preset, "callback", changed);
  chain(node, "onConfigure", changed);
  chain(node, "onConnectionsChange", changed);
}

function chain(target, name, after) {
  const before = target[name];
  target[name] = function (...args) {
    const result = before?.apply(this, args);
    after();
    return result;
  };
}
