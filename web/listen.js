// Runs a function after one that a node, a widget or the interface already has.

export function chain(target, name, after) {
  const before = target[name];
  target[name] = function (...args) {
    const result = before?.apply(this, args);
    after.apply(this, args);
    return result;
  };
}

/** Calls `changed(widget)` when a user changes a value, `loaded` after a load, `wired` after a wire moved. */
export function watch(node, { changed, loaded, wired }) {
  for (const widget of node.widgets ?? []) chain(widget, "callback", () => changed(widget));
  chain(node, "onConfigure", loaded);
  chain(node, "onConnectionsChange", wired);
}
