// Greys out the widgets that something else decides, and shows what holds in them: the chosen preset's
// values, or that a recall takes the place of the sparsity. What the user had set comes back.

// in the node's properties, which are saved with a graph
const OWN = "adaspa_own_values";
const SAVED = "adaspa_preset_values";

const decidedBefore = new WeakMap();

const widgetOf = (node, name) => node.widgets?.find((widget) => widget.name === name);

/** What each preset puts into which widgets, as the server declares it beside the preset's options. */
export function presetsOf(node) {
  return declared(node, "preset")?.presets ?? {};
}

/** The names of the widgets that a widget takes the place of while it is on. */
function replacedBy(node, name) {
  return declared(node, name)?.replaces ?? [];
}

function declared(node, name) {
  const { required, optional } = node.constructor?.nodeData?.input ?? {};
  return (required?.[name] ?? optional?.[name])?.[1];
}

/** The name of the preset in force, or null when another node supplies it. */
export function chosenPreset(node) {
  return isWired(node, "preset") ? null : widgetOf(node, "preset")?.value ?? null;
}

export function isWired(node, name) {
  return node.inputs?.some((input) => input.widget?.name === name && input.link != null) ?? false;
}

/**
 * Call it when a node was made or loaded: what its preset decides is then none of the user's values.
 *
 * @param {object} properties - the node's as they were saved; while it is loaded, its own are written anew
 * @returns {null | { preset: string, values: string }} what was otherwise in the preset when the graph
 *   was saved. Custom then begins with those values.
 */
export function beginPreset(node, properties = {}) {
  const [decided, preset, saved] = [decidedBy(node), chosenPreset(node), properties[SAVED]];
  const known = !saved ? earlier(node, preset, decided) : saved.preset === preset ? saved.values : {};
  const other = Object.keys(decided).filter((name) => name in known && known[name] !== decided[name]);
  if (other.length) node.properties[OWN] = { ...node.properties[OWN], ...known };
  decidedBefore.set(node, new Set(Object.keys(decided)));
  applyPreset(node);
  return other.length ? { preset, values: other.map((name) => `${name} ${known[name]}`).join(", ") } : null;
}

/** What a preset had in the version before its values were saved, if a loaded node has just that. */
function earlier(node, preset, decided) {
  const before = { ...decided, ...declared(node, "preset")?.earlier?.[preset] };
  return Object.entries(before).every(([name, value]) => widgetOf(node, name)?.value === value) ? before : {};
}

export function applyPreset(node) {
  const decided = decidedBy(node);
  const before = decidedBefore.get(node) ?? new Set();
  const own = { ...node.properties?.[OWN] };
  for (const name of new Set(Object.values(presetsOf(node)).flatMap(Object.keys))) {
    const widget = widgetOf(node, name);
    if (!widget) continue;
    if (name in decided) {
      if (!before.has(name)) own[name] = widget.value;
      set(widget, decided[name]);
    } else if (before.has(name) && name in own) {
      set(widget, own[name]);
      delete own[name];
    }
  }
  decidedBefore.set(node, new Set(Object.keys(decided)));
  remember(node, OWN, own);
  remember(node, SAVED, Object.keys(decided).length ? { preset: chosenPreset(node), values: decided } : {});
  const replaced = new Set((node.widgets ?? []).filter(isOn).flatMap(({ name }) => replacedBy(node, name)));
  for (const widget of node.widgets ?? []) {
    // two that exclude each other stay free, so that one can be switched off
    const free = replacedBy(node, widget.name).length && isOn(widget);
    disable(widget, widget.name in decided || (replaced.has(widget.name) && !free));
  }
}

// Custom, and a name from elsewhere, leave the values to the user
function decidedBy(node) {
  const presets = presetsOf(node);
  const chosen = chosenPreset(node);
  return Object.hasOwn(presets, chosen) ? presets[chosen] : {};
}

const isOn = (widget) => widget.value === true || (typeof widget.value === "number" && widget.value !== 0);

function set(widget, value) {
  if (widget.value !== value) widget.value = value;
}

function remember(node, name, values) {
  if (!Object.keys(values).length) delete node.properties?.[name];
  else if (node.properties) node.properties[name] = values;
}

// the canvas renderer blanks the value of a disabled widget; here it is what the user must see
function disable(widget, disabled) {
  if (Boolean(widget.disabled) !== disabled) widget.disabled = disabled;
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
