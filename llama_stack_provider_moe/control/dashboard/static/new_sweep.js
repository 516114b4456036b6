// A sweep from the editor of a new job: the settings to try, one a line.

import { post } from "./api.js";
import { h, note, prose, put } from "./dom.js";
import { problem, sweepPath } from "./shell.js";

// `optimizer.lr = 1e-4, 2e-4` -> ["optimizer.lr", [0.0001, 0.0002]]; as `moe-train sweep --grid` reads it.
export function setting(line) {
  const at = line.indexOf("=");
  const path = line.slice(0, at).trim();
  const text = line.slice(at + 1).trim();
  if (at < 0 || !path || !text) throw new Error(`${JSON.stringify(line)} is not of the form SETTING = VALUE, VALUE.`);
  if (text.startsWith("[")) {
    try { return [path, JSON.parse(text)]; } catch (error) { throw new Error(`${path}: not a JSON list: ${error.message}`, { cause: error }); }
  }
  return [path, text.split(",").map((word) => { try { return JSON.parse(word.trim()); } catch { return word.trim(); } })];
}

export function settings(text) {
  const found = text.split("\n").map((line) => line.trim()).filter(Boolean).map(setting);
  const twice = found.find(([path], index) => found.findIndex(([other]) => other === path) !== index);
  if (twice) throw new Error(`${twice[0]} is there twice; write all its values on one line.`);
  return Object.fromEntries(found);
}

// A block below the editor; `job` returns the job as written, or null.
export function sweepStart(job) {
  const tried = h("textarea", { id: "tried", class: "code", rows: 4, spellcheck: "false", placeholder: "optimizer.lr = 1e-4, 2e-4\nadapter.rank = 8, 16", "aria-describedby": "tried-said" });
  const parallel = h("input", { id: "parallel", type: "number", min: 1, max: 1000, step: 1, value: 2 });
  const halving = h("input", { id: "halving", type: "checkbox" });
  const said = h("div", { id: "tried-said", role: "status" });
  const failed = h("div");
  const start = h("button", { type: "button", class: "primary", disabled: true, on: { click: send } }, "Start sweep");
  let parameters = null;

  function read() {
    start.disabled = true;
    parameters = null;
    put(failed);
    if (!tried.value.trim()) { put(said); return; }
    try {
      parameters = settings(tried.value);
      const number = Object.values(parameters).reduce((product, values) => product * values.length, 1);
      put(said, note("info", number === 1 ? "That is one job." : `That is ${number.toLocaleString("en")} jobs. The server checks each before any starts.`));
      start.disabled = number === 0;
    } catch (error) { put(said, note("bad", error.message)); }
  }
  tried.addEventListener("input", read);

  async function send() {
    start.disabled = true;
    put(failed);
    try {
      const written = job();
      if (!written) throw new Error("The job above is not JSON yet.");
      const { job_uuid: name, ...rest } = written;
      const body = { job: rest, parameters, max_parallel: Number(parallel.value), ...(name ? { sweep_uuid: name } : {}), ...(halving.checked ? { halving: {} } : {}) };
      location.href = sweepPath((await post("sweeps", body)).sweep_uuid);
    } catch (error) {
      if (error.constructor === Error) put(failed, note("bad", error.message)); else problem(error, failed);
      start.disabled = false;
    }
  }

  const block = h("details", { class: "card", id: "sweep", open: location.hash === "#sweep" }, h("summary", {}, "Try several settings: a sweep"),
    h("p", { class: "muted" }, prose("Each line names a setting by its path in the job, and the values to try. Every combination becomes a job; they are ranked by the loss on held-out rows. A `job_uuid` in the job names the sweep.")),
    h("div", { class: "write" }, h("label", { for: "tried" }, "Settings to try"), tried, said),
    h("div", { class: "filters" }, h("div", { class: "field" }, h("label", { for: "parallel" }, "Jobs at once"), parallel),
      h("label", { class: "check" }, halving, " End jobs early that do worse"), h("div", { class: "field push" }, start)), failed);
  return block;
}
