import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";
import { findNode } from "./find_node.js";
import { Latest } from "./latest.js";
import { applyPreset, watchPreset } from "./preset_widgets.js";
import { readStatus } from "./status.js";
import { statusView } from "./status_view.js";

const ATTENTION = "AdaSpaAttention";
const PAIR = "AdaSpaAttentionPair";
const REPORT = "AdaSpaReport";
const HINTS = {
  [ATTENTION]: "Run the workflow: the steps and what they saved appear here.",
  [PAIR]: "Run the workflow: the steps of both experts and what they saved appear here.",
  [REPORT]: "Run the workflow: what was kept appears here.",
};
// under this name the interface looks for a node's progress text; owning it shows one line, not two
const STATUS_WIDGET = "$$node-text-preview";

const graph = () => app.rootGraph ?? app.graph;
const workflowId = () => graph()?.id ?? null;

const views = new WeakMap();
const latest = new Latest();

function addView(node) {
  const view = statusView(HINTS[node.comfyClass]);
  const widget = node.addDOMWidget(STATUS_WIDGET, "adaspa_status", view.element, {
    serialize: false,
    hideOnZoom: false,
    getValue: view.text,
    setValue: (text) => view.setText(String(text ?? "")),
    getMinHeight: () => 84,
    // the report's picture gets the rest of the node
    getMaxHeight: node.comfyClass === REPORT ? () => 110 : undefined,
  });
  widget.serialize = false;
  const needed = node.computeSize();
  node.setSize([Math.max(node.size[0], needed[0]), Math.max(node.size[1], needed[1])]);
  views.set(node, view);
}

function show(node, status) {
  views.get(node)?.show(status);
  node?.setDirtyCanvas?.(true, true);
}

function receive(status) {
  const here = workflowId();
  const workflow = status.workflow ?? here;
  latest.set(workflow, status.node, status);
  if (workflow === here) show(findNode(graph(), status.node), status);
}

app.registerExtension({
  name: "AdaSpa.Node",

  setup() {
    api.addEventListener("adaspa.status", ({ detail }) => {
      const status = readStatus(detail);
      if (status) receive(status);
    });
    // what a node says when it has executed: "ready" or why not, and the report
    api.addEventListener("executed", ({ detail }) => {
      const id = detail?.display_node ?? detail?.node;
      const text = detail?.output?.text;
      if (text == null || !(findNode(graph(), id)?.comfyClass in HINTS)) return;
      receive(readStatus({ node: id, text: [text].flat().join("\n") }));
    });
  },

  nodeCreated(node) {
    if (!(node.comfyClass in HINTS)) return;
    if (node.comfyClass === ATTENTION || node.comfyClass === PAIR) {
      watchPreset(node, () => {
        applyPreset(node);
        node.setDirtyCanvas?.(true, true);
      });
      applyPreset(node);
    }
    addView(node);
  },

  afterConfigureGraph() {
    for (const { node, message } of latest.of(workflowId())) {
      show(findNode(graph(), node), message);
    }
  },
});
