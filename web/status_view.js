// The line and the step strip on the node. Text only ever enters through textContent.

import { countKinds, stepStrip } from "./status.js";

const COLORS = { dense: "#8b93a1", search: "#e8a33d", sparse: "#35b597" };
const STYLE = {
  box: "display:flex; flex-direction:column; gap:6px; box-sizing:border-box; width:100%; height:100%; overflow:hidden; padding:4px 2px;",
  strip: "display:flex; gap:1px; height:10px; flex:none; border-radius:3px; overflow:hidden;",
  legend: "display:flex; flex-wrap:wrap; gap:2px 10px; flex:none; font-size:10px; opacity:0.8;",
  text: "flex:1 1 auto; min-height:0; overflow-y:auto; white-space:pre-line; overflow-wrap:anywhere; font-size:11px; line-height:1.35;",
};
const OPACITY = { past: 0.75, now: 1, ahead: 0.28 };

function part(tag, style, parent) {
  const element = document.createElement(tag);
  element.style.cssText = style;
  parent?.append(element);
  return element;
}

export function statusView(hint) {
  const element = part("div", `${STYLE.box} color:var(--input-text, #ddd);`);
  const strip = part("div", STYLE.strip, element);
  const legend = part("div", STYLE.legend, element);
  const line = part("div", STYLE.text, element);

  function setText(text) {
    line.textContent = text || hint;
    line.style.opacity = text ? "1" : "0.6";
  }

  function show(status) {
    const steps = stepStrip(status);
    strip.hidden = legend.hidden = steps.length === 0;
    strip.style.display = legend.style.display = steps.length ? "flex" : "none";
    strip.replaceChildren(...steps.map(segment));
    legend.replaceChildren(...countKinds(status.steps).map(legendEntry));
    setText(status.text);
  }

  show({ steps: [], step: -1, done: false, text: "" });
  return { element, show, setText, text: () => (line.style.opacity === "1" ? line.textContent : "") };
}

function segment({ kind, state, label }) {
  const bar = part("div", `flex:1 1 0; min-width:0; background:${COLORS[kind]}; opacity:${OPACITY[state]};`);
  if (state === "now") bar.style.boxShadow = "inset 0 0 0 1px #fff";
  bar.title = label;
  return bar;
}

function legendEntry({ kind, count }) {
  const entry = part("span", "display:inline-flex; align-items:center; gap:4px;");
  part("span", `width:8px; height:8px; border-radius:2px; background:${COLORS[kind]};`, entry);
  part("span", "", entry).textContent = `${count} ${kind}`;
  return entry;
}
