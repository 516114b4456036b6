// One sweep: its jobs, the best first, and what can be done with it.

import { get, part } from "./api.js";
import { byId, facts, h, put, say, table } from "./dom.js";
import { count, figure, moment, shown } from "./format.js";
import { cancelGroup, deleteGroup } from "./groups.js";
import { actButton, pill } from "./pieces.js";
import { BASE, every, jobPath, lastOfPath, problem } from "./shell.js";

const COMPARED = 12;
const id = lastOfPath();
const path = `sweeps/${part(id)}`;
let sweep = null;
let drawn = "";

document.title = `${id} · MoE training`;
say(byId("title"), id);

function showHead() {
  const runs = ["scheduled", "in_progress"].includes(sweep.status);
  put(byId("facts"), pill(sweep.status), h("span", {}, `${sweep.data.length} jobs`), h("span", {}, `created ${moment(sweep.created_at)}`));
  const best = sweep.data.filter(({ rank }) => rank !== null).slice(0, COMPARED).map((job) => job.job_uuid);
  put(byId("actions"),
    h("a", { class: "button", href: `${BASE}?sweep=${part(id)}` }, "In the list of jobs"),
    best.length > 1 ? h("a", { class: "button", href: `${BASE}/compare?jobs=${best.map(part).join(",")}` }, `Compare the best ${best.length}`) : null,
    runs && !sweep.cancel_requested_at ? actButton("Cancel", () => cancelGroup("sweep", id, load), "danger") : null,
    runs ? null : actButton("Delete", () => deleteGroup("sweep", id, sweep.data.length), "danger"));
}

function ending({ halving }) {
  if (!halving) return "none: each job runs to its end";
  return `by ${halving.pruner.replaceAll("_", " ")}: of ${halving.reduction_factor} jobs that are compared, one goes on`;
}

function row(job, settings) {
  const isBest = job.job_uuid === sweep.best;
  const value = job.figure === null ? "–" : figure(job.figure);
  return [job.rank === null ? "–" : isBest ? h("strong", { class: "best" }, `${job.rank} (best)`) : job.rank,
    h("a", { href: jobPath(job.job_uuid), class: "name" }, job.job_uuid),
    job.ended_early ? pill(job.status, "ended early") : pill(job.status),
    ...settings.map((name) => (name in job.chosen ? h("code", {}, shown(job.chosen[name])) : "–")),
    isBest ? h("strong", { class: "best" }, value) : value, job.step === null ? "–" : count(job.step), count(job.evaluations),
    job.reason ? h("span", { class: "sub wrap" }, job.reason) : ""];
}

function draw() {
  const settings = Object.keys(sweep.parameters);
  const early = sweep.data.filter((job) => job.ended_early).length;
  put(byId("content"),
    facts([["Ranked by", `${sweep.metric} on held-out rows; a ${sweep.direction === "minimize" ? "smaller" : "larger"} one is better`],
      ["Best so far", sweep.best === null ? "no job has completed" : h("a", { href: jobPath(sweep.best) }, sweep.best)],
      ["Combinations", sweep.random ? `${sweep.random} drawn at random, seed ${sweep.seed}` : "all"],
      ["At once", `at most ${sweep.max_parallel} job${sweep.max_parallel === 1 ? "" : "s"}`], ["Early ending", early ? `${ending(sweep)}; ${early} ended early so far` : ending(sweep)]]),
    h("h2", {}, "Jobs, the best first"),
    table("Jobs of this sweep", ["Rank", "Job", "State", ...settings.map((name) => h("code", {}, name)), sweep.metric.replaceAll("_", " "), "At step", "Evaluations", "Why"], sweep.data.map((job) => row(job, settings)), { classes: "card ranked" }),
    h("details", {}, h("summary", {}, "All values to try"), facts(Object.entries(sweep.parameters).map(([name, values]) => [h("code", {}, name), values.map(shown).join(", ")]))));
}

async function load() {
  try {
    sweep = await get(path);
  } catch (error) {
    problem(error);
    if (error.status === 404) put(byId("facts"), "There is no such sweep, or it is another user's.");
    return;
  }
  const key = JSON.stringify(sweep);
  if (drawn === key) return; // a table that is read stays as it is
  drawn = key;
  problem(null);
  showHead();
  draw();
}

load();
every(4000, () => (sweep && ["scheduled", "in_progress"].includes(sweep.status) ? load() : null));
