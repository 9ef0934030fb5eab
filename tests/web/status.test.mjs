import assert from "node:assert/strict";
import test from "node:test";

import { countKinds, counted, readStatus, stepStrip } from "../../web/status.js";

const MESSAGE = { node: 7, text: "step 2", steps: ["dense", "search", "sparse"], step: 2, done: false };

test("a message is read with its node as text", () => {
  assert.deepEqual(readStatus(MESSAGE), {
    node: "7",
    workflow: null,
    said: [{ text: "step 2" }],
    steps: ["dense", "search", "sparse"],
    first: 0,
    step: 2,
    done: false,
    settings: null,
  });
  assert.deepEqual(readStatus({ ...MESSAGE, settings: { preset: "Fast" } }).settings, { preset: "Fast" });
  assert.equal(readStatus({ ...MESSAGE, settings: "Fast" }).settings, null);
});

test("a message without a node is ignored", () => {
  for (const detail of [undefined, null, {}, { node: null, text: "x" }, "text"]) {
    assert.equal(readStatus(detail), null);
  }
});

test("steps that were forecast are a kind of their own", () => {
  const steps = ["computed", "forecast", "computed", "forecast"];
  assert.deepEqual(readStatus({ ...MESSAGE, steps }).steps, steps);
  assert.deepEqual(countKinds(["dense", "search", "sparse", "forecast"]).at(-1), { kind: "forecast", count: 1 });
});

test("malformed fields become harmless ones", () => {
  const status = readStatus({ node: "12:5", steps: ["dense", "<b>", 3], step: 99, done: "yes" });
  assert.deepEqual(status.steps, ["dense"]);
  assert.equal(status.step, 0);
  assert.equal(status.done, false);
  assert.deepEqual(status.said, []);
  assert.equal(readStatus({ node: 1, steps: "dense", step: "x" }).step, -1);
});

test("the strip marks past, current and coming steps", () => {
  const strip = stepStrip({ ...readStatus(MESSAGE), step: 1 });
  assert.deepEqual(strip.map(({ state }) => state), ["past", "now", "ahead"]);
});

test("a finished run has no current step, and a stopped one shows how far it came", () => {
  const finished = stepStrip(readStatus({ ...MESSAGE, done: true }));
  assert.deepEqual(finished.map(({ state }) => state), ["past", "past", "past"]);
  const stopped = stepStrip(readStatus({ ...MESSAGE, step: 0, done: true }));
  assert.deepEqual(stopped.map(({ state }) => state), ["past", "ahead", "ahead"]);
});

test("labels count from the run's first step, as people do", () => {
  const strip = stepStrip(readStatus({ ...MESSAGE, first: 10 }));
  assert.deepEqual(strip.map(({ label }) => label), ["step 11: dense", "step 12: search", "step 13: sparse"]);
});

test("the legend lists the kinds that occur, in order", () => {
  assert.deepEqual(countKinds(["sparse", "search", "sparse"]), [
    { kind: "search", count: 1 },
    { kind: "sparse", count: 2 },
  ]);
  assert.deepEqual(countKinds([]), []);
});

test("the legend of a stopped run counts the steps that it came to", () => {
  const status = readStatus(MESSAGE);
  assert.deepEqual(counted({ ...status, step: 0, done: false }), ["dense", "search", "sparse"]);
  assert.deepEqual(counted({ ...status, step: 0, done: true }), ["dense"]);
  assert.deepEqual(counted({ ...status, step: 2, done: true }), ["dense", "search", "sparse"]);
  assert.deepEqual(counted({ ...status, step: -1, done: true }), ["dense", "search", "sparse"]);
});
