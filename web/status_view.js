// The line and the step strip on the node. Text only ever enters through textContent.

/** On every status box; the nodes that hold one are ours. */
const CLASS = "adaspa-status";

import { line, say } from "./speak.js";
import { countKinds, counted, stepStrip } from "./status.js";

const COLORS = {
  dense: "#8b93a1",
  search: "#e8a33d",
  sparse: "#35b597",
  computed: "#8b93a1",
  forecast: "#8f7fe8",
};
const STYLE = {
  box: "display:flex; flex-direction:column; gap:6px; box-sizing:border-box; width:100%; height:100%; overflow:hidden; padding:4px 2px;",
  strip: "display:flex; gap:1px; height:10px; flex:none; border-radius:3px; overflow:hidden;",
  legend: "display:flex; flex-wrap:wrap; gap:2px 10px; flex:none; font-size:10px; opacity:0.8;",
  note: "flex:none; font-size:11px; line-height:1.35; opacity:0.7; font-style:italic;",
  more: "flex:none; align-self:flex-start; padding:1px 6px; font-size:11px; color:inherit; background:transparent; border:1px solid currentColor; border-radius:4px; opacity:0.7; cursor:pointer;",
  text: "flex:1 1 0; height:0; overflow-y:auto; white-space:pre-line; overflow-wrap:anywhere; font-size:11px; line-height:1.35;",
};
// the box's below its text, and what the interface keeps free above and below the box
const EDGE = 4 + 2 * 10;
const LEAST = 44;
const OPACITY = { past: 0.75, now: 1, ahead: 0.28 };

function part(tag, style, parent) {
  const element = document.createElement(tag);
  element.style.cssText = style;
  parent?.append(element);
  return element;
}

// Nodes 2.0 brings a "Show advanced inputs" of its own, and dims the value of a disabled choice twice
const RULES = [
  `.lg-node .${CLASS} .adaspa-more { display: none; }`,
  `.lg-node:has(.${CLASS}) button[role="combobox"]:disabled { color: inherit; }`,
].join("\n");

export function addStyles() {
  part("style", "", document.head).textContent = RULES;
}

/**
 * @param {object} hint - a line, shown as long as there is nothing else to say
 * @param {() => string} locale - the interface's
 * @param {number} most - pixels of a text; what is longer scrolls
 * @param {null | { label: () => string, press: () => void }} more - a button that folds settings
 */
export function statusView(hint, locale, most, more = null) {
  const element = part("div", `${STYLE.box} color:var(--input-text, #ddd);`);
  element.className = CLASS;
  const button = more && part("button", STYLE.more, element);
  const strip = part("div", STYLE.strip, element);
  const legend = part("div", STYLE.legend, element);
  const remark = part("div", STYLE.note, element);
  const text = part("div", STYLE.text, element);
  let said = [];

  function label() {
    if (button) button.textContent = say(more.label(), locale());
  }

  function setSaid(lines) {
    said = lines;
    text.replaceChildren(...(lines.length ? lines : [hint]).map(sentence));
    fade();
  }

  function sentence(said) {
    const element = part("div", "");
    element.textContent = say(said, locale());
    return element;
  }

  function setNote(note) {
    remark.textContent = note ? say(note, locale()) : "";
    remark.style.display = note ? "" : "none";
    fade();
  }

  // what is not of the settings and the run at hand steps back
  function fade() {
    text.style.opacity = said.length && !remark.textContent ? "1" : "0.6";
  }

  function show(status) {
    const steps = stepStrip(status);
    strip.style.display = legend.style.display = steps.length ? "flex" : "none";
    strip.replaceChildren(...steps.map(segment));
    legend.replaceChildren(...countKinds(counted(status)).map((entry) => legendEntry(entry, locale())));
    setNote(status.note);
    setSaid(status.said);
  }

  /** Pixels in which nothing has to be scrolled; few while nothing is drawn. */
  function height() {
    const [first, last] = [text.firstChild, text.lastChild];
    const lines = last.offsetTop + last.offsetHeight - first.offsetTop;
    // Nodes 2.0 asks the page how high a box is, and not the widget
    text.style.minHeight = `${Math.min(Math.max(LEAST, lines), most)}px`;
    return text.offsetTop - element.offsetTop + lines + EDGE;
  }

  if (button) {
    button.className = "adaspa-more";
    button.addEventListener("click", () => {
      more.press();
      label();
    });
  }
  label();
  show({ steps: [], step: -1, done: false, said: [] });
  return {
    element, show, setSaid, setNote, label, height,
    text: () => said.map(({ text }) => text).join("\n"),
  };
}

function segment({ kind, state, label }) {
  const bar = part("div", `flex:1 1 0; min-width:0; background:${COLORS[kind]}; opacity:${OPACITY[state]};`);
  if (state === "now") bar.style.boxShadow = "inset 0 0 0 1px #fff";
  bar.title = label;
  return bar;
}

function legendEntry({ kind, count }, locale) {
  const entry = part("span", "display:inline-flex; align-items:center; gap:4px;");
  part("span", `width:8px; height:8px; border-radius:2px; background:${COLORS[kind]};`, entry);
  part("span", "", entry).textContent = say(line(`count_${kind}`, { count }), locale);
  return entry;
}
