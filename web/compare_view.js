// Two videos in one place: a slider parts them, or their difference is shown. Frames are pictures of `/view`.

import { line, say } from "./speak.js";

const STYLE = {
  box: "display:none; flex-direction:column; gap:4px; box-sizing:border-box; width:100%; height:100%; padding:2px;",
  stage: "position:relative; flex:1 1 0; min-height:0; overflow:hidden; border-radius:4px; background:#000; isolation:isolate; touch-action:none;",
  picture: "position:absolute; inset:0; width:100%; height:100%; object-fit:contain; user-select:none;",
  label: "position:absolute; top:4px; padding:1px 6px; font-size:11px; color:#fff; background:rgba(0,0,0,0.6); border-radius:3px;",
  edge: "position:absolute; top:0; bottom:0; width:2px; margin-left:-1px; background:#fff; pointer-events:none;",
  row: "display:flex; align-items:center; gap:6px; flex:none; font-size:11px;",
  button: "padding:1px 6px; font-size:11px; color:inherit; background:transparent; border:1px solid currentColor; border-radius:4px; cursor:pointer; white-space:nowrap;",
};
// as strong as the node's output `difference`
const AMPLIFIED = 8;
const PER_SECOND = 8;

function part(tag, style, parent) {
  const element = document.createElement(tag);
  element.style.cssText = style;
  parent.append(element);
  return element;
}

function range(parent, name, max, moved) {
  const input = part("input", "flex:1 1 0; min-width:0;", parent);
  Object.assign(input, { type: "range", min: 0, max, className: `adaspa-${name}` });
  input.addEventListener("input", () => moved(Number(input.value)));
  return input;
}

/**
 * @param {() => string} locale - the interface's
 * @param {(file: object) => string} address - of a file that `/view` serves
 */
export function compareView(locale, address) {
  const element = document.createElement("div");
  element.style.cssText = STYLE.box;
  element.className = "adaspa-compare";
  const stage = part("div", STYLE.stage, element);
  const [left, right] = ["dense", "sparse"].map((kind) => {
    const picture = part("img", STYLE.picture, stage);
    picture.className = `adaspa-${kind}`;
    picture.draggable = false;
    return picture;
  });
  const edge = part("div", STYLE.edge, stage);
  const labels = ["left:4px;", "right:4px;"].map((side) => part("span", STYLE.label + side, stage));
  const frames = part("div", STYLE.row, element);
  const play = part("button", STYLE.button, frames);
  const frame = range(frames, "frame", 0, showFrame);
  const number = part("span", "min-width:3.5em; text-align:right;", frames);
  const parts = part("div", STYLE.row, element);
  const edgeAt = range(parts, "edge", 100, placeEdge);
  const mode = part("button", STYLE.button, parts);
  let shown = null;
  let difference = false;
  let timer = null;

  function showFrame(i) {
    frame.value = i;
    left.src = address(shown.dense[i]);
    right.src = address(shown.sparse[i]);
    number.textContent = String(shown.frames[i]);
  }

  function placeEdge(percent) {
    edgeAt.value = percent;
    right.style.clipPath = difference ? "" : `inset(0 0 0 ${percent}%)`;
    edge.style.left = `${percent}%`;
  }

  function setMode(on) {
    difference = on;
    right.style.mixBlendMode = on ? "difference" : "";
    stage.style.filter = on ? `brightness(${AMPLIFIED})` : "";
    for (const entry of [edge, ...labels]) entry.style.display = on ? "none" : "";
    edgeAt.disabled = on;
    mode.textContent = say(line(on ? "show_both" : "show_difference", { times: AMPLIFIED }), locale());
    placeEdge(Number(edgeAt.value));
  }

  function setPlaying(on) {
    clearInterval(timer);
    // a node that was removed is no longer connected
    const next = () => (element.isConnected ? showFrame((Number(frame.value) + 1) % shown.frames.length) : setPlaying(false));
    timer = on ? setInterval(next, 1000 / PER_SECOND) : null;
    play.textContent = say(line(on ? "stop_playing" : "play"), locale());
  }

  play.addEventListener("click", () => setPlaying(timer === null));
  mode.addEventListener("click", () => setMode(!difference));
  stage.addEventListener("pointermove", (event) => {
    const { left: start, width } = stage.getBoundingClientRect();
    if (!difference && width) placeEdge(Math.round(Math.min(1, Math.max(0, (event.clientX - start) / width)) * 100));
  });

  /** @param {null | { frames: number[], dense: object[], sparse: object[] }} videos */
  function show(videos) {
    shown = videos;
    setPlaying(false);
    element.style.display = videos ? "flex" : "none";
    if (!videos) return;
    frame.max = videos.frames.length - 1;
    frames.style.display = videos.frames.length > 1 ? "flex" : "none";
    labels.forEach((label, i) => (label.textContent = say(line(["label_dense", "label_sparse"][i]), locale())));
    setMode(false);
    placeEdge(50);
    showFrame(0);
  }

  return { element, show };
}
