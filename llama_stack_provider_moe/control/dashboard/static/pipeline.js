// One pipeline: its parts in their order, and what can be done with it.

import { get, part, post } from "./api.js";
import { byId, h, put, say, table } from "./dom.js";
import { count, moment } from "./format.js";
import { cancelGroup, deleteGroup } from "./groups.js";
import { actButton, pill } from "./pieces.js";
import { BASE, every, jobPath, lastOfPath, problem, toast } from "./shell.js";

const id = lastOfPath();
const path = `pipelines/${part(id)}`;
let pipeline = null;
let drawn = "";

document.title = `${id} · MoE training`;
say(byId("title"), id);

const goesOn = () => ["scheduled", "in_progress"].includes(pipeline.status);
const links = (jobs) => jobs.flatMap((job, at) => [at ? ", " : "", h("a", { href: jobPath(job) }, job)]);

async function resume() {
  const found = await post(`${path}/resume`);
  toast(`${found.jobs.length} ${found.jobs.length === 1 ? "job is" : "jobs are"} scheduled again.`);
  await load();
}

function showHead() {
  const ended = pipeline.jobs.failed || pipeline.jobs.cancelled;
  put(byId("facts"), pill(pipeline.status), h("span", {}, `${pipeline.parts.length + pipeline.lost.length} parts`), pipeline.lost.length ? h("span", {}, `${pipeline.lost.length} lost`) : null, h("span", {}, `created ${moment(pipeline.created_at)}`));
  put(byId("actions"),
    h("a", { class: "button", href: `${BASE}?pipeline=${part(id)}` }, "In the list of jobs"),
    ended && !goesOn() && !pipeline.lost.length ? actButton("Resume", resume) : null,
    goesOn() && !pipeline.cancel_requested_at ? actButton("Cancel", () => cancelGroup("pipeline", id, load), "danger") : null,
    goesOn() ? null : actButton("Delete", () => deleteGroup("pipeline", id, pipeline.parts.length), "danger"));
}

function now(each) {
  if (each.waits_for.length) return h("span", {}, "waits for ", links(each.waits_for));
  if (each.status !== "in_progress") return "";
  return each.step === null ? each.stage : `${each.stage}, step ${count(each.step)} of ${count(each.max_steps)}`;
}

function row(each) {
  const exported = each.exports.map((one) => one.job_uuid);
  return [h("strong", {}, each.name), h("a", { href: jobPath(each.job_uuid), class: "name" }, each.job_uuid), each.recipe.replaceAll("_", " "),
    pill(each.status), now(each), exported.length ? h("span", {}, links(exported)) : "", each.attempts ? count(each.attempts) : "–",
    each.reason ? h("span", { class: "sub wrap" }, each.reason) : ""];
}

// A part whose job was deleted before it had completed.
const lostRow = (name) => [h("strong", {}, name), "–", "–", "deleted", "", "", "–",
  h("span", { class: "sub wrap" }, "its job was deleted before it had completed, so the pipeline can't be resumed")];

async function load() {
  try {
    pipeline = await get(path);
  } catch (error) {
    problem(error);
    if (error.status === 404) put(byId("facts"), "There is no such pipeline, or it is another user's.");
    return;
  }
  const key = JSON.stringify(pipeline);
  if (drawn === key) return; // a table that is read stays as it is
  drawn = key;
  problem(null);
  showHead();
  put(byId("content"), table("Parts of this pipeline", ["Part", "Job", "Recipe", "State", "Now", "Exports", "Starts", "Why"], [...pipeline.parts.map(row), ...pipeline.lost.map(lostRow)], { classes: "card" }));
}

load();
every(4000, () => (pipeline && goesOn() ? load() : null));
