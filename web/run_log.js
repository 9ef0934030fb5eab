// What one execution of a workflow has told our nodes, and what to say of those that it told nothing.

import { line } from "./speak.js";

export class RunLog {
  constructor() {
    this.begin();
  }

  begin() {
    this.told = new Map();
    this.cached = new Set();
    this.executed = new Set();
  }

  /** `how` is "ready" when a node has executed, "ran" when a sampler ran with it. */
  tell(node, how) {
    if (how === "ran" || !this.told.has(node)) this.told.set(node, how);
  }

  cache(nodes) {
    for (const node of nodes) this.cached.add(String(node));
  }

  execute(node) {
    this.executed.add(String(node));
  }

  /** Whether a node, or one inside of it, has executed. */
  hasExecuted(node) {
    return [...this.executed].some((id) => id === node || id.startsWith(`${node}:`));
  }

  /**
   * What to add at the end of an execution: { text }, a line in place of what a node shows, { note }, a line
   * beside it, or null where its own last words hold.
   *
   * @param {string} id - as in the prompt
   * @param {object} node - { mode, known, patches, users }: LiteGraph's mode, whether it shows a message of
   *   an earlier execution, whether it patches a model, and the nodes that take that model on
   * @param {object} end - { how: "success" | "stopped" | "failed", node, message }
   */
  verdict(id, { mode, known, patches, users }, end) {
    if (end.how === "failed" && end.node === id) return { text: { text: String(end.message ?? "").trim() } };
    if (this.told.get(id) === "ran" || (this.told.has(id) && !patches)) return null;
    if (mode === 4) return { text: line("bypassed") };
    if (mode === 2) return { text: line("muted") };
    if (end.how === "success") {
      const reached = this.told.has(id) || this.cached.has(id);
      if (!reached) return { text: line("apart") };
      const passedOn = users.some((user) => this.hasExecuted(user));
      if (patches && (passedOn || !users.length)) return { text: line("unused") };
      // a node that only hands a model on has done its part
      if (passedOn) return null;
      return known ? { note: line("cached") } : { text: line("cached") };
    }
    return { text: line(`${end.how}_before`) };
  }
}

/** Whether a node's widgets hold something else than the settings that it ran with. */
export function haveChanged(settings, widgets, isWired) {
  return (widgets ?? []).some(
    ({ name, value }) => Object.hasOwn(settings ?? {}, name) && !isWired(name) && settings[name] !== value,
  );
}
