// One job: how it stands, its tabs, and what can be done with it.

import { get, part } from "./api.js";
import { byId, h, note, put, say } from "./dom.js";
import { ago, bytes, duration, figure, moment } from "./format.js";
import { actions } from "./job_actions.js";
import { curves } from "./job_curves.js";
import { data } from "./job_data.js";
import { evaluation } from "./job_evaluation.js";
import { experts } from "./job_experts.js";
import { artifacts } from "./job_files.js";
import { events, log } from "./job_output.js";
import { samples } from "./job_samples.js";
import { settings } from "./job_settings.js";
import { editLabels, labelLinks } from "./labels.js";
import { bar, pill, tabs } from "./pieces.js";
import { WRITE_ANSWERS } from "./recipes.js";
import { every, jobPath, lastOfPath, pipelinePath, problem, sweepPath } from "./shell.js";

const id = lastOfPath();
const RUNS = ["scheduled", "in_progress"];
// name -> [title, draws into an element and returns what ends it]
const TABS = {
  curves: ["Curves", curves], samples: ["Answers", samples], experts: ["Experts", experts], evaluation: ["Evaluation", evaluation],
  settings: ["Settings", settings], data: ["Data", data], log: ["Log", log], events: ["Events", events], files: ["Files", artifacts],
};
// A tab that not each recipe has.
const fits = (name) => (name === "samples" ? WRITE_ANSWERS.includes(job.recipe) : job.recipe !== "export" || !["curves", "experts", "evaluation", "data"].includes(name));
let job = null;
let close = () => {};

document.title = `${id} · MoE training`;
say(byId("title"), id);

function showHead() {
  put(byId("facts"), pill(job.status), h("span", {}, job.recipe.replaceAll("_", " ")), h("span", { class: "model" }, job.model),
    job.parent ? h("span", {}, "of ", h("a", { href: jobPath(job.parent) }, job.parent)) : null,
    job.pipeline ? h("span", {}, "of pipeline ", h("a", { href: pipelinePath(job.pipeline) }, job.pipeline)) : null,
    job.sweep ? h("span", {}, "of sweep ", h("a", { href: sweepPath(job.sweep) }, job.sweep)) : null,
    h("time", { datetime: job.scheduled_at, title: moment(job.scheduled_at) }, `submitted ${ago(job.scheduled_at)}`));
  put(byId("labels"), labelLinks(job.labels),
    h("button", { type: "button", class: "quiet edit", on: { click: edit } }, Object.keys(job.labels).length || job.note ? "Edit labels and note" : "Add labels or a note"));
  put(byId("note"), job.note ?? "");
  byId("note").hidden = !job.note;
  put(byId("actions"), actions(job, load));
  const bad = job.status === "failed" ? "bad" : "info";
  put(byId("problem"), job.reason ? note(bad, h("strong", {}, job.status === "failed" ? "It failed: " : "Reason: "), job.reason) : null);
}

async function edit() {
  const found = await editLabels(job);
  if (!found) return;
  job = { ...job, labels: found.labels, note: found.note };
  showHead();
}

function showStanding() {
  const found = job.resources_allocated ?? {};
  const took = job.started_at ? (Date.parse(job.completed_at ?? new Date().toISOString()) - Date.parse(job.started_at)) / 1000 : null;
  const held = found.evaluation?.last?.metrics ?? {};
  const first = found.evaluation?.first?.metrics ?? {};
  const speed = found.metrics?.tokens_per_s;
  const rewarded = job.recipe === "grpo"; // its loss on held-out prompts is their reward, negated
  const main = rewarded ? "reward" : "validation_loss";
  const change = typeof held[main] === "number" && typeof first[main] === "number" && found.evaluation.first.step !== found.evaluation.last.step
    ? `from ${figure(first[main])}` : "";
  const work = found.work ? `${found.work.done.toLocaleString("en")}${found.work.total ? ` of ${found.work.total.toLocaleString("en")}` : ""} ${found.work.unit}` : "";
  const tiles = [
    ["Now", found.stage ?? job.status, work || (job.waits_for?.length ? `waits for ${job.waits_for.join(", ")}` : "") || (found.queue_position ? `position ${found.queue_position} in the queue` : "")],
    ["Step", found.max_steps ? found.step.toLocaleString("en") : null, found.max_steps ? `of ${found.max_steps.toLocaleString("en")}` : ""],
    [rewarded ? "Held-out reward" : "Held-out loss", main in held ? figure(held[main]) : null, change],
    ["Perplexity", "perplexity" in held ? figure(held.perplexity) : null, "perplexity" in first && change ? `from ${figure(first.perplexity)}` : ""],
    ["Speed", speed ? figure(speed) : null, "tokens a second"],
    [job.completed_at ? "Took" : "Runs for", took === null ? null : duration(took), typeof found.eta_s === "number" ? `${duration(found.eta_s)} left` : ""],
    ["On disk", found.disk_bytes === undefined ? null : bytes(found.disk_bytes), found.devices ? `GPU ${found.devices}` : ""],
  ].filter(([, value]) => value !== null && value !== undefined);
  const percent = found.percent;
  put(byId("standing"),
    percent === null || percent === undefined || !RUNS.includes(job.status) ? null : bar(percent, "Progress of this job"),
    h("dl", { class: "tiles" }, tiles.map(([name, value, more]) => h("div", {}, h("dt", {}, name), h("dd", {}, value, more ? h("small", {}, more) : null)))));
  byId("standing").hidden = false;
}

function open(name) {
  close();
  const panel = byId("panel");
  put(panel);
  close = TABS[name][1](panel, { id, path: `jobs/${part(id)}`, job: () => job }) ?? (() => {});
  if (location.hash !== `#${name}`) history.replaceState(null, "", `#${name}`);
}

async function load() {
  try {
    job = await get(`jobs/${part(id)}`);
  } catch (error) {
    if (error.status === 404) gone();
    problem(error);
    return;
  }
  showHead();
  showStanding();
  if (byId("tabs").hidden) {
    byId("tabs").hidden = false;
    byId("panel").hidden = false;
    const shown = Object.keys(TABS).filter(fits);
    const select = tabs(byId("tabs"), byId("panel"), shown.map((name) => [name, TABS[name][0]]), location.hash.slice(1), open);
    addEventListener("hashchange", () => { const name = location.hash.slice(1); if (job && shown.includes(name)) select(name); });
  }
}

// The job does not exist, or no longer: nothing of it can be shown or done.
function gone() {
  const was = job !== null;
  job = null;
  close();
  close = () => {};
  put(byId("facts"), was ? "This job has been deleted." : "There is no such job, or it is another user's.");
  for (const place of ["actions", "labels", "panel"]) put(byId(place));
  for (const place of ["tabs", "panel", "standing", "note"]) byId(place).hidden = true;
}

// The status is small and cheap; all details are asked for when the state changes.
async function refresh() {
  if (job === null || !RUNS.includes(job.status)) return;
  const found = await get(`jobs/${part(id)}/status`).catch((error) => { if (error.status === 404) gone(); problem(error); });
  if (!found) return;
  if (found.status !== job.status) { await load(); return; }
  job.resources_allocated = { ...found.resources_allocated, disk_bytes: job.resources_allocated?.disk_bytes };
  showStanding();
}

load();
every(2000, refresh);
