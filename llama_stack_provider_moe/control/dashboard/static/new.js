// A new job: from a template or from another job, with the server's checks, and a plan of memory and time.

import { get, part, post } from "./api.js";
import { byId, h, note, put, table } from "./dom.js";
import { bytes, duration, figure } from "./format.js";
import { editor } from "./editor.js";
import { sweepStart } from "./new_sweep.js";
import { jobPath, problem } from "./shell.js";

const GB = 1e9;
const asked = new URLSearchParams(location.search);
const pretty = (job) => JSON.stringify(job, null, 2);

// A job's complete settings, as somebody would write them: without its name and what the server resolved.
function cloned(spec) {
  const { job_uuid: _, model_from: from, ...rest } = spec;
  return { ...rest, model: from ?? rest.model };
}

async function start() {
  const [templates, sets] = await Promise.all([get("templates"), get("datasets", { limit: 100 }).catch(() => ({ data: [] }))]);
  const from = asked.get("from");
  const names = templates.data.map(({ name }) => name);
  const first = names.includes(asked.get("template")) ? asked.get("template") : names.includes("granite_moe_sft") ? "granite_moe_sft" : names[0];
  const byName = new Map(templates.data.map((each) => [each.name, each]));
  const choice = h("select", { id: "template" }, from ? h("option", { value: "" }, `job ${from}`) : null,
    templates.data.map(({ name, summary }) => h("option", { value: name }, `${name}: ${summary}`)));
  choice.value = from ? "" : first;
  const data = h("select", { id: "dataset" }, h("option", { value: "" }, "as written below"), sets.data.map(({ name }) => h("option", { value: name }, name)));
  const memory = h("input", { id: "memory", type: "number", min: 0.1, max: 10000, step: "any", value: 80 });
  const plan = h("button", { type: "button" }, "Plan memory and time");
  const send = h("button", { type: "button", class: "primary", disabled: true }, "Start job");
  const planned = h("div");
  let written = null;
  const place = h("div", { class: "editor-body" });
  put(byId("content"),
    h("div", { class: "filters" }, h("div", { class: "field grow" }, h("label", { for: "template" }, "Start from"), choice),
      h("div", { class: "field" }, h("label", { for: "dataset" }, "Data set"), data)),
    place,
    h("div", { class: "filters send" }, h("div", { class: "field" }, h("label", { for: "memory" }, "Memory of a GPU (of the machine on the CPU), GB"), memory), h("div", { class: "field" }, plan), h("div", { class: "field push" }, send)),
    planned, sweepStart(() => written?.read() ?? null));
  if (location.hash === "#sweep") byId("sweep").scrollIntoView();

  const text = from ? pretty(cloned((await get(`jobs/${part(from)}`)).spec)) : pretty(byName.get(first).job);
  let body = null;
  let edits = 0; // what was planned or checked before an edit says nothing about the job after it
  written = await editor(place, text, (job, valid) => { body = job; send.disabled = valid === null; });
  const edited = () => { edits += 1; put(planned); };
  written.area.addEventListener("input", () => { edited(); send.disabled = true; });
  memory.addEventListener("input", edited);
  choice.addEventListener("change", () => { if (byName.has(choice.value)) written.set(pretty(byName.get(choice.value).job)); });
  data.addEventListener("change", () => {
    const job = written.read();
    if (job && data.value) written.set(pretty({ ...job, data: { ...job.data, dataset_id: data.value } }));
  });
  plan.addEventListener("click", async () => {
    const job = written.read();
    if (job === null) { put(planned, note("bad", "The job is not JSON yet, so there is nothing to plan.")); return; }
    const mine = edits;
    plan.disabled = true;
    put(planned, h("p", { class: "muted", role: "status" }, "The planner computes; the first time takes half a minute …"));
    try {
      const [found, here] = await Promise.all([post("jobs/plan", job, { memory_bytes: Math.round(Number(memory.value) * GB) }), get("activity")]);
      if (mine === edits) put(planned, shownPlan(found, here.devices.length > 0));
    } catch (error) { if (mine === edits) problem(error, planned); }
    plan.disabled = false;
  });
  send.addEventListener("click", async () => {
    send.disabled = true;
    try {
      const made = await post("jobs", body);
      location.href = jobPath(made.job_uuid);
    } catch (error) { problem(error); send.disabled = false; scrollTo(0, 0); }
  });
}

// How long training will take. `source` says whether like jobs were measured or the planner computed it, `basis` says
// from what, or why there is no estimate.
function shownTime(time) {
  if (time === undefined) return null; // a server without estimates
  if (time === null) return h("p", { class: "muted" }, "The server can't say how long it will take.");
  if (typeof time.seconds !== "number") return h("p", { class: "muted" }, `No time estimate: ${time.basis}`);
  const isMeasured = time.source === "measured";
  return h("p", { class: "time" }, h("span", { class: "pill", "data-state": isMeasured ? "completed" : "scheduled" }, isMeasured ? "measured" : "estimated"),
    " Training takes about ", h("strong", {}, duration(time.seconds)), typeof time.tokens_per_s === "number" ? ` at ${figure(time.tokens_per_s)} tokens a second` : "", ` (${time.basis}).`);
}

function shownPlan({ job, plan, changes, time, vision }, hasGpu) {
  const words = { fits: ["good", `It fits, with ${plan.strategy}.`], tight: ["warn", "It may not fit: the estimate is more than the usable memory."] };
  const [kind, text] = words[plan.verdict] ?? ["bad", "It can't fit: what is certain alone is more than the memory."];
  return h("section", { class: "card" }, h("h2", {}, "Memory plan"), note(kind, text),
    plan.device === "cuda" && !hasGpu ? note("warn", `The plan is for GPUs of ${bytes(plan.device_bytes)}, and this server has none.`) : null, shownTime(time),
    h("p", {}, `${job.recipe} of ${job.model}, ${job.trains}; micro-batches of ${job.batch_size} rows with ${job.max_length} tokens, ${job.dtype}. ${plan.processes} ${plan.processes === 1 ? "process" : "processes"} of ${bytes(plan.device_bytes)}, of which ${bytes(plan.usable_bytes)} can be used.`),
    vision ? h("p", {}, `Vision tower: ${vision}.`) : null,
    table("Memory by strategy", ["Strategy", "Verdict", "Peak", "Certain", "Largest parts"], plan.options.map((option) => [option.strategy, option.verdict,
      option.estimate ? bytes(option.peak_bytes) : "–", option.estimate ? bytes(option.certain_bytes) : option.refused ?? "",
      option.estimate ? Object.entries(option.estimate.terms).filter(([, value]) => value).sort(([, one], [, other]) => other - one).slice(0, 3).map(([name, value]) => `${name.replaceAll("_", " ")} ${bytes(value)}`).join(", ") : ""])),
    changes.length ? h("div", {}, h("p", {}, "Each of these changes alone makes it fit:"), h("ul", {}, changes.map((change) => h("li", {}, change.text)))) : null);
}

start().catch(problem);
