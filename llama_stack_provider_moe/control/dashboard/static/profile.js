// What a job would make of a data set: the server's profile, with the first sequences as they are learnt.

import { get } from "./api.js";
import { facts, h, note, put, table } from "./dom.js";
import { count } from "./format.js";
import { WRITE_ANSWERS } from "./recipes.js";
import { problem } from "./shell.js";

const AGAIN_MS = 2000;
const IGNORED = -100; // the label of a token without a loss
const listed = (found) => Object.entries(found).map(([each, rows]) => `${each} (${count(rows)})`).join(", ");

// Asks for the profile until the server has made it, and draws it into `place`.
export async function showProfile(place, path, query, signal) {
  put(place, h("p", { class: "muted", role: "status" }, "The server reads the rows …"));
  try {
    for (;;) {
      const answer = await get(`${path}/profile`, query, signal);
      if (answer.is_ready) { put(place, profiled(answer.profile)); return; }
      put(place, h("p", { class: "muted", role: "status" }, "It takes longer; the page asks again."));
      await new Promise((done) => setTimeout(done, AGAIN_MS));
    }
  } catch (error) {
    put(place);
    problem(error, place);
  }
}

function lengths(title, found) {
  if (!found) return null;
  const most = Math.max(...found.histogram.map((bucket) => bucket.rows), 1);
  return h("div", { class: "card" }, h("h3", {}, title),
    facts([["Total", count(found.total)], ["Shortest", count(found.smallest)], ["Median", count(found.median)], ["95% have at most", count(found.p95)], ["Longest", count(found.largest)]]),
    table(title, ["Length", "Rows", ""], found.histogram.map((bucket) => [`${count(bucket.least)} to ${count(bucket.most)}`, count(bucket.rows), h("meter", { min: 0, max: most, value: bucket.rows, "aria-label": `${bucket.rows} rows` })])));
}

function duplicates(found) {
  if (!found.duplicates) return null;
  const rest = found.duplicates - found.duplicate_rows.length;
  return h("section", {}, h("h3", {}, "Duplicates"), note("warn", `${count(found.duplicates)} of ${count(found.rows)} rows repeat an earlier row. A job learns them more often than the others.`),
    table("Duplicates", ["Row", "Same as row"], found.duplicate_rows.map((each) => [count(each.row), count(each.same_as)])),
    rest > 0 ? h("p", { class: "sub" }, `and ${count(rest)} more`) : null);
}

// Runs of tokens that are learnt or not, as [text, is learnt].
export function runs({ labels, pieces }) {
  const found = [];
  labels.forEach((label, index) => {
    const isLearnt = label !== IGNORED;
    if (found.length && found.at(-1)[1] === isLearnt) found.at(-1)[0] += pieces[index];
    else found.push([pieces[index], isLearnt]);
  });
  return found;
}

function sequence(row, which, recipe) {
  const learnt = row.labels.slice(1).filter((label) => label !== IGNORED).length;
  const told = WRITE_ANSWERS.includes(recipe) ? `${count(row.labels.length)} tokens` : `${count(learnt)} of ${count(row.labels.length)} tokens are learnt`;
  return h("li", { class: "card sequence" },
    h("p", { class: "sub" }, `Row ${count(row.row)}${which}: ${told}${row.length > row.labels.length ? `; these are the first of its ${count(row.length)} tokens` : ""}`),
    marked(runs(row)));
}

// A text with its learnt runs marked; the words for screen readers are hidden.
export function marked(parts) {
  return h("pre", { class: "tokens", tabindex: 0 }, parts.map(([text, isLearnt]) => (isLearnt ? h("mark", {}, text) : text)));
}

export const legend = (recipe) => (WRITE_ANSWERS.includes(recipe) ? h("p", { class: "muted" }, "The model reads these prompts, and learns from the answers that it writes to them.")
  : h("p", { class: "muted" }, h("mark", {}, "Marked"), " tokens are learnt. The others are read, and no loss is computed for them."));

function sequences({ shown, recipe }) {
  if (!shown.length) return null;
  const which = (index) => (["dpo", "reward"].includes(recipe) ? [", chosen", ", rejected"][index % 2] : "");
  return h("section", {}, h("h3", {}, WRITE_ANSWERS.includes(recipe) ? "The first prompts as the model reads them" : "The first rows as they are learnt"), legend(recipe), h("ol", { class: "sequences" }, shown.map((row, index) => sequence(row, which(index), recipe))));
}

function profiled(found) {
  const tokens = found.tokens;
  const refused = [...found.refused_rows, ...(tokens?.refused_rows ?? []), ...(tokens?.dropped_rows ?? [])];
  return h("div", {},
    found.refused ? note("bad", `${count(found.refused)} of ${count(found.rows)} rows are not valid for this recipe.`) : note("good", `All ${count(found.rows)} rows are valid for this recipe.`),
    facts([["Formats", listed(found.formats)], ["Columns read", listed(found.columns_read)], ["Columns not read", listed(found.columns_not_read)], ["Noticed", listed(found.notes)],
      ["Duplicates", found.duplicates ? count(found.duplicates) : "none"]]),
    tokens ? facts([["How rows are rendered", tokens.plan.join("; ")], ["Tokens of an epoch", count(tokens.tokens)], ...(WRITE_ANSWERS.includes(found.recipe) ? [] : [["Tokens with a loss", count(tokens.learnt)]]), ["Cut to the length", count(tokens.cut)],
      ["Steps of an epoch", count(tokens.steps)]]) : null,
    sequences(found),
    duplicates(found),
    refused.length ? h("section", {}, h("h3", {}, "Rows that are refused or left out"), table("Rows that are refused or left out", ["Row", "Reason"], refused.map((each) => [each.row, each.reason]))) : null,
    h("div", { class: "sides" }, lengths("Characters of a row", found.characters), lengths("Tokens of a sequence", tokens?.lengths)));
}
