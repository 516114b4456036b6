// The rows of a job: where they come from, what was read of them, and which of their tokens are learnt.

import { get, part } from "./api.js";
import { facts, h, put, table } from "./dom.js";
import { count } from "./format.js";
import { legend, marked, showProfile } from "./profile.js";
import { PROFILED, WRITE_ANSWERS } from "./recipes.js";
import { BASE, problem } from "./shell.js";

const HEAD_LINES = 2000; // training writes its first rows soon after its start
const ROW = /^row {2,}(.*):$/;

export function data(panel, { path, job }) {
  const left = new AbortController();
  const { sources, rows } = job();
  const learnt = h("section");
  const profile = h("section");
  put(panel, origin(job(), sources), counted(rows), learnt, profile);
  shownRows(path, left.signal).then((found) => { if (found.length) put(learnt, h("h2", {}, WRITE_ANSWERS.includes(job().recipe) ? "Rows as the model reads them" : "Rows as training learns them"), legend(job().recipe), h("ol", { class: "sequences" }, found.map(row))); }, problem);
  offer(profile, job(), sources, left.signal);
  return () => left.abort();
}

// The query of a profile with this job's settings; null for a data set that the server can't profile.
function profiledAs({ recipe, spec, model }, source) {
  if (source.kind !== "data" || !PROFILED.includes(recipe) || !spec || spec.unreadable) return null;
  return { recipe, model: spec.model_from ?? model, max_length: spec.options?.max_length, max_completion_length: (spec.rl ?? spec.generation)?.max_completion_length, version: source.version };
}

function origin(job, sources) {
  const entries = Object.entries(sources ?? {});
  if (!entries.length) return h("p", { class: "empty" }, "This job reads no rows, or an older version of the server made it.");
  return h("section", {}, h("h2", {}, "Data sets"), table("Data of this job", ["Part", "Data set", "Version", "Rows"], entries.map(([name, source]) => [
    name, source.kind === "data" ? h("a", { href: `${BASE}/data/${part(source.id)}` }, source.id) : h("span", {}, source.id, h("span", { class: "sub" }, source.kind)),
    source.version ? h("code", { title: source.version }, source.version.slice(0, 12)) : "–", count(source.rows)])));
}

const COUNTS = { rows: "Rows", formats: "Formats", read: "Columns read", not_read: "Columns not read", notes: "Noticed" };
const listed = (found) => Object.entries(found).map(([name, number]) => `${name} (${count(number)})`).join(", ");

function counted(rows) {
  if (!rows || rows.unreadable) return null;
  return h("section", {}, h("h2", {}, "Formats and columns"), Object.entries(rows).map(([name, found]) => h("div", {}, h("h3", {}, name),
    facts(Object.entries(found ?? {}).map(([what, value]) => [COUNTS[what] ?? what.replaceAll("_", " "), value !== null && typeof value === "object" ? listed(value) : value])))));
}

// The rows that training wrote to its output, as runs of text that are learnt or not.
async function shownRows(path, signal) {
  const { log_lines: lines } = await get(`${path}/logs`, { offset: 0 }, signal);
  const found = [];
  lines.slice(0, HEAD_LINES).forEach((line, index) => {
    const title = ROW.exec(line);
    if (title) found.push({ title: title[1], parts: split(lines[index + 1] ?? "") });
  });
  return found;
}

// Training puts ⟦ and ⟧ around what is learnt.
function split(text) {
  return text.split(/⟦([^⟧]*)⟧/).map((piece, index) => [piece, index % 2 === 1]).filter(([piece]) => piece);
}

const row = ({ title, parts }) => h("li", { class: "card sequence" }, h("p", { class: "sub" }, title), marked(parts));

function offer(place, job, sources, signal) {
  const entries = Object.entries(sources ?? {}).map(([name, source]) => [name, source, profiledAs(job, source)]).filter(([, , query]) => query);
  if (!entries.length) return;
  const result = h("div");
  put(place, h("h2", {}, "Profile with this job's model"), h("p", { class: "muted" }, "The server counts the tokens of all rows, finds duplicates, and shows the first rows with their learnt tokens."),
    h("div", { class: "buttons" }, entries.map(([name, source, query]) => h("button", { type: "button", on: { click: () => showProfile(result, `datasets/${part(source.id)}`, query, signal) } }, `Profile ${source.id} (${name})`))), result);
}
