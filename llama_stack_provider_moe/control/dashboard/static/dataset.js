// One data set: versions, profile, rows.

import { get, part, remove } from "./api.js";
import { byId, facts, h, put, say, table } from "./dom.js";
import { bytes, count, moment } from "./format.js";
import { showProfile } from "./profile.js";
import { PROFILED } from "./recipes.js";
import { BASE, lastOfPath, problem, question } from "./shell.js";

const name = lastOfPath();
const path = `datasets/${part(name)}`;
let version = null;
document.title = `${name} · MoE training`;
say(byId("title"), name);

const versions = h("section");
const profile = h("section");
const rows = h("section");
put(byId("content"), versions, profile, rows);

async function load() {
  const found = await get(path);
  version = found.versions[0].sha256;
  const now = found.versions[0];
  put(byId("actions"), h("button", { type: "button", class: "danger", on: { click: removeAll } }, "Delete"));
  put(versions, facts([["Rows", count(now.rows)], ["Size", bytes(now.bytes)], ["Columns", Object.entries(now.columns).map(([column, filled]) => `${column} (${count(filled)})`).join(", ")]]),
    h("h2", {}, "Versions"),
    table("Versions", ["Version", "Rows", "Size", "Uploaded", ""], found.versions.map((each, index) => [
      h("code", { title: each.sha256 }, each.sha256.slice(0, 12)), count(each.rows), bytes(each.bytes), moment(each.created_at),
      index === 0 ? "current" : h("button", { type: "button", class: "quiet", on: { click: () => showRows(each.sha256) } }, "Show its rows")])));
  askProfile();
  showRows(version);
}

async function removeAll() {
  if (!(await question(`Delete ${name}?`, h("p", {}, "All its versions go. Jobs keep the rows that they copied."), "Delete", "danger"))) return;
  try {
    await remove(path);
    location.href = `${BASE}/data`;
  } catch (error) { problem(error); }
}

// The address may say for which job: `?recipe=sft&model=NAME&max_length=2048&version=3fa8c1`, as the page of a job does.
function askProfile() {
  const asked = new URLSearchParams(location.search);
  const recipe = h("select", { id: "recipe" }, PROFILED.map((each) => h("option", { value: each }, each.replaceAll("_", " "))));
  if (PROFILED.includes(asked.get("recipe"))) recipe.value = asked.get("recipe");
  const model = h("input", { id: "model", maxlength: 1024, spellcheck: "false", placeholder: "without a model, no token is counted", value: asked.get("model") ?? "" });
  const length = h("input", { id: "max-length", type: "number", min: 8, step: 1, placeholder: "default", value: asked.get("max_length") ?? "" });
  const found = h("div");
  const show = () => showProfile(found, path, { recipe: recipe.value, model: model.value.trim(), max_length: length.value, version: asked.get("version") });
  const form = h("form", { class: "filters", on: { submit: (event) => { event.preventDefault(); show(); } } },
    h("div", { class: "field" }, h("label", { for: "recipe" }, "For recipe"), recipe),
    h("div", { class: "field grow" }, h("label", { for: "model" }, "Model"), model),
    h("div", { class: "field" }, h("label", { for: "max-length" }, "Longest sequence, tokens"), length), h("div", { class: "field" }, h("button", {}, "Profile")));
  put(profile, h("h2", {}, "What a job would make of it"), form, found);
  if (asked.has("model")) show();
}

async function showRows(sha256) {
  const list = h("ol", { class: "dataset-rows" });
  const more = h("button", { type: "button", on: { click: next } }, "More rows");
  let cursor = 0;
  put(rows, h("h2", {}, sha256 === version ? "Rows" : `Rows of version ${sha256.slice(0, 12)}`), list, h("div", { class: "buttons" }, more));
  async function next() {
    more.disabled = true;
    try {
      const found = await get(`${path}/rows`, { version: sha256, cursor, limit: 20 });
      cursor = found.cursor;
      list.append(...found.rows.map((row) => h("li", {}, h("pre", { tabindex: 0 }, JSON.stringify(row, null, 2)))));
      more.disabled = !found.has_more;
    } catch (error) { problem(error); }
  }
  await next();
}

load().catch(problem);
