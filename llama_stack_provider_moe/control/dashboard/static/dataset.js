// One data set: versions, profile, rows.

import { get, part, remove } from "./api.js";
import { byId, facts, h, note, put, say, table } from "./dom.js";
import { bytes, count, moment } from "./format.js";
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

function askProfile() {
  const recipe = h("select", { id: "recipe" }, ["sft", "dpo", "circuit_breaker"].map((each) => h("option", { value: each }, each.replaceAll("_", " "))));
  const model = h("input", { id: "model", maxlength: 1024, spellcheck: "false", placeholder: "without a model, no token is counted" });
  const found = h("div");
  const form = h("form", { class: "filters", on: { submit: async (event) => {
    event.preventDefault();
    await showProfile(found, recipe.value, model.value.trim());
  } } }, h("div", { class: "field" }, h("label", { for: "recipe" }, "For recipe"), recipe),
    h("div", { class: "field grow" }, h("label", { for: "model" }, "Model"), model), h("div", { class: "field" }, h("button", {}, "Profile")));
  put(profile, h("h2", {}, "What a job would make of it"), form, found);
}

async function showProfile(place, recipe, model) {
  put(place, h("p", { class: "muted", role: "status" }, "The server reads the rows …"));
  try {
    for (;;) {
      const answer = await get(`${path}/profile`, { recipe, model });
      if (answer.is_ready) { put(place, profiled(answer.profile)); return; }
      put(place, h("p", { class: "muted", role: "status" }, "It takes longer; the page asks again."));
      await new Promise((done) => setTimeout(done, 2000));
    }
  } catch (error) {
    put(place);
    problem(error, place);
  }
}

const listed = (found) => Object.entries(found).map(([each, rows]) => `${each} (${count(rows)})`).join(", ");

function lengths(title, found) {
  if (!found) return null;
  const most = Math.max(...found.histogram.map((bucket) => bucket.rows), 1);
  return h("div", { class: "card" }, h("h3", {}, title),
    facts([["Total", count(found.total)], ["Shortest", count(found.smallest)], ["Median", count(found.median)], ["95% have at most", count(found.p95)], ["Longest", count(found.largest)]]),
    table(title, ["Length", "Rows", ""], found.histogram.map((bucket) => [`${count(bucket.least)} to ${count(bucket.most)}`, count(bucket.rows), h("meter", { min: 0, max: most, value: bucket.rows, "aria-label": `${bucket.rows} rows` })])));
}

function profiled(found) {
  const tokens = found.tokens;
  const refused = [...found.refused_rows, ...(tokens?.refused_rows ?? []), ...(tokens?.dropped_rows ?? [])];
  return h("div", {},
    found.refused ? note("bad", `${count(found.refused)} of ${count(found.rows)} rows are not valid for this recipe.`) : note("good", `All ${count(found.rows)} rows are valid for this recipe.`),
    facts([["Formats", listed(found.formats)], ["Columns read", listed(found.columns_read)], ["Columns not read", listed(found.columns_not_read)], ["Noticed", listed(found.notes)],
      ["Duplicates", found.duplicates ? `${count(found.duplicates)} (${found.duplicate_rows.slice(0, 5).map((each) => `row ${each.row} = row ${each.same_as}`).join(", ")})` : "none"]]),
    tokens ? facts([["How rows are rendered", tokens.plan.join("; ")], ["Tokens of an epoch", count(tokens.tokens)], ["Tokens with a loss", count(tokens.learnt)], ["Cut to the length", count(tokens.cut)],
      ["Steps of an epoch", count(tokens.steps)]]) : null,
    refused.length ? table("Rows that are refused or left out", ["Row", "Reason"], refused.map((each) => [each.row, each.reason])) : null,
    h("div", { class: "sides" }, lengths("Characters of a row", found.characters), lengths("Tokens of a sequence", tokens?.lengths)));
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
