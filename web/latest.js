// The latest message per node and workflow, so that a node shows it again when its tab comes back.

export class Latest {
  constructor(limit = 64) {
    this.limit = limit;
    this.entries = new Map();
  }

  set(workflow, node, message) {
    const key = JSON.stringify([workflow, node]);
    this.entries.delete(key);
    this.entries.set(key, { workflow, node, message });
    if (this.entries.size > this.limit) this.entries.delete(this.entries.keys().next().value);
  }

  /** Every remembered { node, message } of one workflow. */
  of(workflow) {
    return [...this.entries.values()].filter((entry) => entry.workflow === workflow);
  }
}
