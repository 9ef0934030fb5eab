// The latest message per node and workflow, so that a node shows it again when its tab or the page comes back.

const KEY = "adaspa.latest";

export class Latest {
  /** @param {Storage | null} storage - where the messages outlive the page */
  constructor(storage = null, limit = 64) {
    this.storage = storage;
    this.limit = limit;
    this.entries = new Map();
    for (const entry of read(storage)) this.entries.set(key(entry), entry);
  }

  set(workflow, node, message) {
    const entry = { workflow, node, message };
    this.entries.delete(key(entry));
    this.entries.set(key(entry), entry);
    if (this.entries.size > this.limit) this.entries.delete(this.entries.keys().next().value);
    try {
      this.storage?.setItem(KEY, JSON.stringify([...this.entries.values()]));
    } catch {
      // a full storage loses the messages with the page, and nothing else
    }
  }

  get(workflow, node) {
    return this.entries.get(key({ workflow, node }))?.message ?? null;
  }

  /** Every remembered { node, message } of one workflow. */
  of(workflow) {
    return [...this.entries.values()].filter((entry) => entry.workflow === workflow);
  }
}

const key = ({ workflow, node }) => JSON.stringify([workflow, node]);

function read(storage) {
  try {
    const entries = JSON.parse(storage?.getItem(KEY) ?? "[]");
    return Array.isArray(entries) ? entries.filter((entry) => entry?.message != null) : [];
  } catch {
    return [];
  }
}
