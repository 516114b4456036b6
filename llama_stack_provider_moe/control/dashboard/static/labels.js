// Labels and notes of jobs: shown as links that filter the list, and edited in a dialogue.

import { part, patch } from "./api.js";
import { h, put } from "./dom.js";
import { BASE, question, toast } from "./shell.js";

// As the server counts: characters, not UTF-16 units.
const LIMITS = { key: 63, value: 256, note: 4000 };
const word = ([key, value]) => `${key}=${value}`;

// The labels of a job; each leads to the jobs that have it.
export function labelLinks(labels) {
  return Object.entries(labels).map((label) => h("a", { class: "label", href: `${BASE}?label=${encodeURIComponent(word(label))}` },
    h("span", {}, label[0]), label[1] === "" ? null : h("b", {}, label[1])));
}

function entry(key, value, focus) {
  const element = h("li", {},
    h("input", { class: "key", value: key, spellcheck: "false", "aria-label": "Key of a label", placeholder: "key" }),
    h("input", { class: "value", value, spellcheck: "false", "aria-label": `Value of ${key || "the new label"}`, placeholder: "value" }),
    h("button", { type: "button", class: "quiet", "aria-label": `Remove ${key || "the new label"}`, on: { click: () => element.remove() } }, "×"));
  if (focus) requestAnimationFrame(() => element.querySelector("input").focus());
  return element;
}

// What differs between two sets of labels, as the API takes it: null removes a label.
export function labelChange(before, after) {
  const changed = Object.entries(after).filter(([key, value]) => before[key] !== value);
  const gone = Object.keys(before).filter((key) => !(key in after)).map((key) => [key, null]);
  return Object.fromEntries([...changed, ...gone]);
}

// A field with a limit of its own would cut what somebody pastes.
function mustFit(what, text, limit) {
  const length = [...text].length;
  if (length > limit) throw new Error(`The ${what} has ${length.toLocaleString("en")} characters; at most ${limit.toLocaleString("en")} are possible.`);
}

function written(list) {
  const pairs = [...list.children].map((element) => [element.querySelector(".key").value.trim(), element.querySelector(".value").value.trim()]);
  const kept = pairs.filter(([key, value]) => key || value);
  for (const [key, value] of kept) {
    mustFit(`key ${JSON.stringify(`${key.slice(0, 20)}…`)}`, key, LIMITS.key);
    mustFit(`value of ${JSON.stringify(key)}`, value, LIMITS.value);
  }
  const unnamed = kept.find(([key]) => !key);
  if (unnamed) throw new Error(`The label with the value ${JSON.stringify(unnamed[1])} has no key.`);
  const twice = kept.find(([key], index) => kept.findIndex(([other]) => other === key) !== index);
  if (twice) throw new Error(`The key ${JSON.stringify(twice[0])} is there twice; a job has one label of a key.`);
  return Object.fromEntries(kept);
}

// Lets the person change the labels and the note of a job; resolves to the new ones, or to null if nothing changed.
export async function editLabels({ job_uuid: id, labels, note }) {
  const list = h("ul", { class: "label-list" }, Object.entries(labels).map(([key, value]) => entry(key, value)));
  const more = h("button", { type: "button", on: { click: () => list.append(entry("", "", true)) } }, "Add a label");
  const text = h("textarea", { id: "note-text", rows: 4 });
  text.value = note ?? "";
  if (!list.children.length) list.append(entry("", ""));
  let found = null;
  const content = h("div", { class: "write" }, h("p", { class: "muted" }, "They help to find the job again. They change nothing about its training.", ` A key has at most ${LIMITS.key} characters, a value ${LIMITS.value}, the note ${LIMITS.note.toLocaleString("en")}.`),
    list, h("div", {}, more), h("label", { for: "note-text" }, "Note"), text);
  const done = await question(`Labels and note of ${id}`, content, "Save", "primary", async () => {
    const body = { labels: labelChange(labels, written(list)) };
    const said = text.value.trim() === "" ? null : text.value;
    mustFit("note", said ?? "", LIMITS.note);
    if (said !== (note ?? null)) body.note = said;
    if (!Object.keys(body.labels).length && !("note" in body)) return;
    found = await patch(`jobs/${part(id)}`, body);
    toast(`Labels and note of ${id} are saved.`);
  });
  return done ? found : null;
}

// The filters of the list that the address has and no other field shows, each with a button that removes it.
export function filterChips(place, filters, remove) {
  put(place, filters.map(([name, value]) => h("li", { class: "chip" }, h("span", {}, name, " ", h("b", {}, value)),
    h("button", { type: "button", class: "quiet", "aria-label": `Remove the filter ${name} ${value}`, on: { click: () => remove(name, value) } }, "×"))));
  place.hidden = filters.length === 0;
}
