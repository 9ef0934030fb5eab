// Reads the messages of a run. Plain values in, plain values out: no app, no DOM.

import { readLine } from "./speak.js";

export const KINDS = ["dense", "search", "sparse", "computed", "forecast"];

/** A message as `adaspa.status` brings it, or null if it names no node. */
export function readStatus(detail) {
  if (detail?.node == null) return null;
  const steps = Array.isArray(detail.steps) ? detail.steps.filter((kind) => KINDS.includes(kind)) : [];
  const done = detail.done === true;
  const step = Number.isInteger(detail.step) ? detail.step : -1;
  return {
    node: String(detail.node),
    workflow: detail.workflow == null ? null : String(detail.workflow),
    said: (Array.isArray(detail.said) ? detail.said : [detail.text]).map(readLine).filter((said) => said?.text),
    steps,
    first: Number.isInteger(detail.first) ? detail.first : 0,
    step: Math.max(-1, Math.min(step, steps.length - 1)),
    done,
    settings: detail.settings && typeof detail.settings === "object" ? detail.settings : null,
  };
}

/** One entry per step: { kind, state: "past" | "now" | "ahead", label }; `first` numbers the first, from 0. */
export function stepStrip({ steps, step, done, first = 0 }) {
  return steps.map((kind, i) => ({
    kind,
    state: i < step || (done && i === step) ? "past" : i === step ? "now" : "ahead",
    label: `step ${first + i + 1}: ${kind}`,
  }));
}

/** What the legend counts: every step of a run, or those before it was stopped. */
export const counted = ({ steps, step, done }) => (done && step >= 0 ? steps.slice(0, step + 1) : steps);

/** ["dense", "search", "sparse", "sparse"] -> [{ kind: "dense", count: 1 }, ...], kinds that occur. */
export function countKinds(steps) {
  return KINDS.map((kind) => ({ kind, count: steps.filter((step) => step === kind).length })).filter(
    ({ count }) => count > 0,
  );
}
