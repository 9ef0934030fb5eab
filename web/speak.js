// Says a line { text, code, values } in the interface's language: the English text where it has no words.

import en from "./sentences/en.js";
import ja from "./sentences/ja.js";
import ko from "./sentences/ko.js";
import zh from "./sentences/zh.js";

const SENTENCES = { en, ja, ko, zh };

/** A line of the page's own. */
export const line = (code, values = {}) => ({
  code,
  values,
  text: fill(SENTENCES.en[code], (name) => String(values[name])),
});

/** A line of a message, or null if it has no text. */
export function readLine(said) {
  if (typeof said === "string") return { text: said };
  if (typeof said?.text !== "string") return null;
  const values = Object.entries(said.values ?? {}).map(([name, value]) => [name, readLine(value) ?? { text: "" }]);
  return typeof said.code === "string" ? { text: said.text, code: said.code, values: Object.fromEntries(values) } : { text: said.text };
}

/** @param {string} locale - such as "zh-TW"; a language stands for its regions */
export function say(said, locale) {
  if (typeof said !== "object" || said === null) return String(said ?? "");
  const words = SENTENCES[String(locale).split("-")[0]] ?? {};
  if (!Object.hasOwn(words, said.code)) return said.text;
  return fill(words[said.code], (name) => say(said.values?.[name], locale));
}

const fill = (words, value) => words.replace(/\{(\w+)\}/g, (_, name) => value(name));
