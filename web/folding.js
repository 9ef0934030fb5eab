// Folds what the server calls advanced, in the canvas renderer too, which by itself folds nothing.

import { isWired } from "./preset_widgets.js";

/** Mark the widgets that fold; one with a wire stays in sight. */
export function fold(node) {
  for (const widget of node.widgets ?? []) {
    const folds = Boolean(widget.options?.advanced) && !isWired(node, widget.name);
    if (Boolean(widget.advanced) !== folds) widget.advanced = folds;
  }
}

/** Let folded widgets take no room, and keep the height that the user gave to the rest. */
export function watchFolding(node) {
  for (const widget of node.widgets ?? []) {
    let hidden = widget.hidden;
    Object.defineProperty(widget, "hidden", {
      configurable: true,
      enumerable: true,
      // the other renderer unfolds by this property of the node alone
      get: () => hidden || (widget.advanced && !node.showAdvanced),
      set: (value) => {
        hidden = value;
      },
    });
  }
  const toggle = node.toggleAdvanced;
  node.toggleAdvanced = function (...args) {
    const spare = Math.max(0, this.size[1] - this.computeSize()[1]);
    toggle?.apply(this, args);
    this.setSize([this.size[0], this.computeSize()[1] + spare]);
  };
}
