// An editor for a job in JSON: help for the field at the caret, and the server's checks while you type.

import { post } from "./api.js";
import { debounced, h, note, prose, put, say } from "./dom.js";
import { about, fieldOf, fieldsOf, kind, schema } from "./schema.js";

// The path of the JSON value at a place of a text, however incomplete the text is.
export function pathAt(text, place) {
  const open = []; // {kind, name, index}
  let string = null;
  let last = null;
  for (let index = 0; index < place; index += 1) {
    const sign = text[index];
    if (string !== null) {
      if (sign === "\\") { string += text[index + 1] ?? ""; index += 1; }
      else if (sign === '"') { last = string; string = null; }
      else string += sign;
      continue;
    }
    const top = open.at(-1);
    if (sign === '"') string = "";
    else if (sign === "{") { open.push({ kind: "{", name: null }); last = null; }
    else if (sign === "[") open.push({ kind: "[", name: 0 });
    else if (sign === "}" || sign === "]") open.pop();
    else if (sign === ":" && top?.kind === "{") top.name = last;
    else if (sign === "," && top) top.name = top.kind === "[" ? top.name + 1 : null;
  }
  // A key that the caret is in: read on to its end.
  const top = open.at(-1);
  if (top?.kind === "{" && top.name === null) {
    const rest = text.slice(place).match(/^[^"\n,{}:]*"\s*:/);
    if (string !== null && rest) top.name = string + rest[0].split('"')[0];
    else if (string === null && last !== null && /^\s*:/.test(text.slice(place))) top.name = last;
  }
  return { path: open.map(({ name }) => name).filter((name) => name !== null), within: open.filter(({ name }) => name !== null).length < open.length };
}

export async function editor(place, text, changed) {
  const whole = await schema();
  const area = h("textarea", { id: "job-text", class: "code", spellcheck: "false", rows: 26, "aria-describedby": "verdict" });
  const help = h("aside", { class: "card help", tabindex: 0, "aria-label": "Help for the field at the cursor" });
  const verdict = h("div", { id: "verdict", role: "status" });
  area.value = text;
  put(place, h("div", { class: "write" }, h("label", { for: "job-text" }, "Job, as JSON"), area, verdict), help);

  const read = () => { try { return JSON.parse(area.value); } catch { return null; } };

  function showHelp() {
    const { path } = pathAt(area.value, area.selectionStart);
    const recipe = area.value.match(/"recipe"\s*:\s*"(\w+)"/)?.[1] ?? "sft";
    const names = path.map(String);
    let found = null;
    let used = names;
    while (used.length && !(found = fieldOf(whole, recipe, used))) used = used.slice(0, -1);
    const inner = fieldsOf(whole, recipe, found ? used : []);
    put(help,
      h("h2", {}, found ? h("code", {}, used.join(".")) : `Recipe ${recipe.replaceAll("_", " ")}`),
      found ? h("p", {}, prose(about(whole, found.field))) : h("p", { class: "muted" }, "Put the cursor on a field to read about it."),
      found ? h("p", { class: "sub" }, "Takes ", kind(whole, found.field), found.field.default === undefined ? "" : `; default ${JSON.stringify(found.field.default)}`) : null,
      inner.length ? h("div", {}, h("h3", {}, found ? "Its fields" : "Fields"), h("dl", { class: "fields" }, inner.map(([name, field]) => [h("dt", {}, h("code", {}, name)), h("dd", {}, prose(short(about(whole, field))))]))) : null);
  }

  let number = 0;
  const check = debounced(async () => {
    const mine = number;
    let body;
    try { body = JSON.parse(area.value); } catch (error) {
      put(verdict, note("bad", `Not JSON yet: ${error.message}`));
      changed(null, null);
      return;
    }
    say(verdict, "The server checks it …");
    changed(body, null);
    try {
      const found = await post("jobs/validate", body);
      if (mine !== number) return;
      const held = found.validation_rows === null ? "" : `, ${found.validation_rows.toLocaleString("en")} held out`;
      put(verdict, note("good", h("strong", {}, "Valid. "), found.train_rows ? `${found.train_rows.toLocaleString("en")} training rows${held}.` : ""),
        found.notes.length ? h("ul", { class: "notes" }, found.notes.map((each) => h("li", {}, each))) : null);
      changed(body, found);
    } catch (error) {
      if (mine !== number) return;
      put(verdict, note("bad", h("strong", {}, "Not valid: "), error.message));
      changed(body, null);
    }
  }, 700);

  area.addEventListener("input", () => { number += 1; showHelp(); check(); }); // an answer about an older text is dropped
  for (const event of ["click", "keyup", "focus"]) area.addEventListener(event, showHelp);
  area.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.isComposing) return;
    event.preventDefault(); // keeps the indentation
    const before = area.value.slice(0, area.selectionStart);
    const indent = before.split("\n").at(-1).match(/^\s*/)[0] + (/[{[]\s*$/.test(before) ? "  " : "");
    area.setRangeText(`\n${indent}`, area.selectionStart, area.selectionEnd, "end");
    area.dispatchEvent(new Event("input"));
  });
  showHelp();
  check();
  return { read, set: (value) => { area.value = value; area.dispatchEvent(new Event("input")); }, area };
}

function short(text) {
  if (text.length <= 160) return text;
  const kept = text.slice(0, 157);
  const isInCode = kept.split("`").length % 2 === 0; // half of a `code` would show its sign
  return `${isInCode ? kept.slice(0, kept.lastIndexOf("`")).trimEnd() : kept}…`;
}
