import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";
import { compareView } from "./compare_view.js";
import { downstream, everyNode, findNode } from "./find_node.js";
import { fold, watchFolding } from "./folding.js";
import { Latest } from "./latest.js";
import { chain, watch } from "./listen.js";
import { applyPreset, beginPreset, isWired } from "./preset_widgets.js";
import { RunLog, haveChanged } from "./run_log.js";
import { line } from "./speak.js";
import { readStatus } from "./status.js";
import { addStyles, statusView } from "./status_view.js";

const [REPORT, COMPARE] = ["AdaSpaReport", "AdaSpaCompare"];
// nodes that patch a model, and all of ours with what they say before the first run
const PATCHES = new Set(["AdaSpaAttention", "AdaSpaAttentionPair"]);
const HINTS = {
  AdaSpaAttention: line("hint_attention"),
  AdaSpaAttentionPair: line("hint_pair"),
  [REPORT]: line("hint_report"),
  [COMPARE]: line("hint_compare"),
  AdaSpaSavePattern: line("hint_save"),
  AdaSpaLoadPattern: line("hint_load"),
  AdaSpaForecast: line("hint_forecast"),
};
// under this name the interface looks for a node's progress text; owning it shows one line, not two
const STATUS_WIDGET = "$$node-text-preview";
const SHOW_ALL = "Comfy.Node.AlwaysShowAdvancedWidgets";

const graph = () => app.rootGraph ?? app.graph;
const workflowId = () => graph()?.id ?? null;
const locale = () => app.extensionManager?.setting?.get("Comfy.Locale") ?? "en";

const views = new WeakMap();
// what a loaded node's preset was otherwise, until a setting is changed
const presetNews = new WeakMap();
const latest = new Latest(window.sessionStorage);
const log = new RunLog();
// the workflow that executes, and the settings with which its nodes of ours do
let running = null;
const used = new Map();

function addView(node) {
  const folds = PATCHES.has(node.comfyClass) && {
    label: () => line(node.showAdvanced ? "hide_settings" : "show_settings"),
    press: () => node.toggleAdvanced(),
  };
  const pictures = [REPORT, COMPARE].includes(node.comfyClass);
  const view = statusView(HINTS[node.comfyClass], locale, pictures ? 110 : 220, folds || null);
  const height = () => Math.min(Math.max(folds ? 140 : 84, view.height()), pictures ? 150 : 320);
  const widget = node.addDOMWidget(STATUS_WIDGET, "adaspa_status", view.element, {
    serialize: false,
    hideOnZoom: false,
    hideInPanel: true,
    getValue: view.text,
    setValue: (text) => write(node, view, String(text ?? "")),
    getMinHeight: height,
    // the picture gets the rest of the node
    getMaxHeight: pictures ? height : undefined,
  });
  widget.serialize = false;
  views.set(node, view);
}

/** The two videos of a node that compares; hidden until there are any. */
function addVideos(node) {
  const view = compareView(locale, (file) => api.apiURL(`/view?${new URLSearchParams(file)}`));
  let shown = false;
  const widget = node.addDOMWidget("adaspa_videos", "adaspa_videos", view.element, {
    serialize: false,
    hideOnZoom: false,
    hideInPanel: true,
    getValue: () => "",
    setValue: () => {},
    getMinHeight: () => (shown ? 240 : 0),
    getMaxHeight: () => (shown ? 4096 : 0),
  });
  widget.serialize = false;
  chain(node, "onExecuted", ({ adaspa_compare: videos }) => {
    if (!videos?.[0]) return;
    const first = !shown;
    shown = true;
    view.show(videos[0]);
    if (first) node.setSize([Math.max(node.size[0], 420), Math.max(node.size[1], node.computeSize()[1])]);
  });
}

/** Show the interface's own progress text, which reaches nodes outside of a sampler's run, too. */
function write(node, view, text) {
  // our own messages bring the same text, and how to say it in other languages
  if (text === view.text()) return;
  // a node with this id in another tab's workflow
  if (running && running !== workflowId()) return;
  const said = text ? [{ text }] : [];
  view.setSaid(said);
  const id = idOf(node);
  const known = latest.get(workflowId(), id) ?? (running && id && readStatus({ node: id }));
  if (known) latest.set(workflowId(), id, { ...known, said });
}

function show(node, status) {
  const view = views.get(node);
  if (!view) return;
  view.show(status);
  noteChanges(node, status);
  const [width, height] = node.size;
  // only ever higher: the user may have made room
  node.setSize([width, Math.max(height, node.computeSize()[1])]);
  node.setDirtyCanvas?.(true, true);
}

function noteChanges(node, status) {
  const changed = haveChanged(status?.settings, node.widgets, (name) => isWired(node, name));
  views.get(node)?.setNote(presetNews.get(node) ?? (changed ? line("changed") : status?.note));
}

/** The id of a node of the canvas, as a prompt names it. */
const idOf = (node) => everyNode(graph()).find((entry) => entry.node === node)?.id;

function keep(workflow, id, status) {
  latest.set(workflow, id, status);
  if (workflow === workflowId()) show(findNode(graph(), id), status);
}

function receive(status) {
  if (status.settings) used.set(status.node, status.settings);
  keep(status.workflow ?? running ?? workflowId(), status.node, { ...status, settings: used.get(status.node) ?? null });
}

function ourNodes() {
  return everyNode(graph()).filter(({ node }) => node.comfyClass in HINTS);
}

function end(how, detail) {
  const workflow = running ?? workflowId();
  running = null;
  // the nodes of another tab's workflow are not at hand
  if (workflow !== workflowId()) return;
  const outcome = { how, node: String(detail?.node_id ?? ""), message: detail?.exception_message };
  for (const { id, node } of ourNodes()) {
    const known = latest.get(workflow, id);
    const patches = PATCHES.has(node.comfyClass);
    const users = downstream(id, node, "MODEL");
    const said = log.verdict(id, { mode: node.mode, known: known !== null, patches, users }, outcome);
    const settings = used.get(id) ?? settingsOf(node);
    if (said?.text) keep(workflow, id, readStatus({ node: id, said: [said.text], settings }));
    else if (said?.note) keep(workflow, id, { ...known, note: said.note });
  }
}

// a node that ComfyUI's cache answers for does not say what it was asked for
function settingsOf(node) {
  const widgets = (node.widgets ?? []).filter(({ name }) => name !== STATUS_WIDGET);
  return Object.fromEntries(widgets.map(({ name, value }) => [name, value]));
}

function foldSettings(node) {
  fold(node);
  views.get(node)?.label();
}

app.registerExtension({
  name: "AdaSpa.Node",

  setup() {
    addStyles();
    api.addEventListener("adaspa.status", ({ detail }) => {
      const status = readStatus(detail);
      if (!status) return;
      log.tell(status.node, "ran");
      receive(status);
    });
    // what a node says when it has executed: "ready" or why not, and the report
    api.addEventListener("executed", ({ detail }) => {
      const node = String(detail?.display_node ?? detail?.node);
      const { text, said, settings } = detail?.output ?? {};
      if (text == null || !(findNode(graph(), node)?.comfyClass in HINTS)) return;
      log.tell(node, "ready");
      receive(readStatus({ node, said: said?.[0], text: [text].flat().join("\n"), settings: settings?.[0] }));
    });
    api.addEventListener("execution_start", () => {
      running = workflowId();
      log.begin();
      used.clear();
      for (const { id, node } of ourNodes()) used.set(id, settingsOf(node));
    });
    api.addEventListener("execution_cached", ({ detail }) => log.cache(detail?.nodes ?? []));
    api.addEventListener("executing", ({ detail }) => log.execute(detail?.node ?? detail));
    api.addEventListener("execution_success", () => end("success"));
    api.addEventListener("execution_interrupted", ({ detail }) => end("stopped", detail));
    api.addEventListener("execution_error", ({ detail }) => end("failed", detail));
  },

  nodeCreated(node) {
    if (!(node.comfyClass in HINTS)) return;
    // of an empty list, which the interface would show as "undefined"
    for (const widget of node.widgets ?? []) widget.value ??= "";
    if (PATCHES.has(node.comfyClass)) {
      const changed = (widget) => {
        if (widget) presetNews.delete(node);
        applyPreset(node);
        noteChanges(node, latest.get(workflowId(), idOf(node)));
        node.setDirtyCanvas?.(true, true);
      };
      watch(node, {
        changed,
        loaded: (saved) => {
          const other = beginPreset(node, saved?.properties);
          if (other) presetNews.set(node, line("preset_changed", other));
          noteChanges(node, null);
          foldSettings(node);
        },
        wired: () => {
          foldSettings(node);
          changed();
        },
      });
      beginPreset(node);
      fold(node);
      watchFolding(node);
      if (app.extensionManager?.setting?.get(SHOW_ALL)) node.showAdvanced = true;
      chain(node, "toggleAdvanced", () => views.get(node)?.label());
    }
    addView(node);
    if (node.comfyClass === COMPARE) addVideos(node);
    // a new node's height still counts what has been folded
    const [width, height] = node.computeSize();
    node.setSize([Math.max(node.size[0], width), height]);
  },

  afterConfigureGraph() {
    for (const { node, message } of latest.of(workflowId())) show(findNode(graph(), node), message);
  },
});
