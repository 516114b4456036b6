// The list of jobs: filters, pages, and rows that follow the server.

import { activity } from "./activity.js";
import { get } from "./api.js";
import { byId, debounced, h, put, say } from "./dom.js";
import { ago, duration, figure, moment, stateWord } from "./format.js";
import { editLabels, filterChips, labelLinks } from "./labels.js";
import { bar, pill } from "./pieces.js";
import { BASE, every, jobPath, pipelinePath, problem, sweepPath } from "./shell.js";

const PAGE = 50;
const STATES = ["in_progress", "scheduled", "completed", "failed", "cancelled"];
const body = byId("jobs").tBodies[0];
const rows = new Map();
const figures = new Map();
const FIGURES_AT_ONCE = 30; // the longest names of so many jobs fit into a request line
const picked = new Set();
let asked = new URLSearchParams(location.search);
let shown = { data: [], has_more: false };
let sent = 0;
let readsEveryOwner = false;

const query = () => ({
  limit: PAGE, after: asked.get("after"), state: asked.getAll("state"), recipe: asked.get("recipe"), text: asked.get("text"),
  label: asked.getAll("label"), sweep: asked.get("sweep"), pipeline: asked.get("pipeline"),
});

function change(edit, keepsPage = false) {
  edit(asked);
  if (!keepsPage) asked.delete("after");
  const words = asked.toString();
  history[keepsPage ? "pushState" : "replaceState"](null, "", words ? `?${words}` : location.pathname);
  load();
}

function row(job, shows) {
  const link = h("a", { href: jobPath(job.job_uuid), class: "name" }, job.job_uuid);
  const box = h("input", { type: "checkbox", "aria-label": `Select ${job.job_uuid} to compare`, on: { change: () => {
    if (box.checked) picked.add(job.job_uuid); else picked.delete(job.job_uuid);
    showPicked();
  } } });
  box.checked = picked.has(job.job_uuid);
  const cells = {
    recipe: h("span", { class: "sub" }, job.recipe.replaceAll("_", " "), job.parent ? ` of ${job.parent}` : ""),
    labels: h("span", { class: "labels" }),
    state: h("span"), model: h("span", { class: "model" }, job.model), progress: h("div", { class: "progress" }),
    loss: h("span"), time: h("time", { datetime: job.scheduled_at, title: moment(job.scheduled_at) }),
  };
  const element = h("tr", {},
    h("td", { class: "pick" }, box),
    h("th", { scope: "row" }, link, h("div", { class: "about" }, cells.recipe, cells.labels)),
    h("td", { "data-head": "State" }, cells.state), h("td", { "data-head": "Model" }, cells.model),
    h("td", { "data-head": "Progress" }, cells.progress), h("td", { class: "number", "data-head": "Held-out loss" }, cells.loss),
    h("td", { "data-head": "Submitted" }, cells.time),
    shows ? h("td", { class: "owner", "data-head": "Owner", title: job.owner }, (job.owner ?? "").slice(0, 8)) : null);
  return { element, cells, drawn: "", written: "" };
}

function fill(each, job) {
  const found = figures.get(job.job_uuid);
  const written = JSON.stringify([job.labels, job.note]);
  if (each.written !== written) { // apart from the rest, so that a row that changes leaves the focus alone
    each.written = written;
    drawLabels(each.cells.labels, job);
  }
  const key = JSON.stringify([job.status, found]);
  say(each.cells.time, ago(job.scheduled_at));
  if (each.drawn === key) return;
  each.drawn = key;
  put(each.cells.state, pill(job.status));
  put(each.cells.progress, ...progress(job, found));
  say(each.cells.loss, found ? figure(found.held_out_loss) : "");
}

function drawLabels(place, job) {
  put(place, labelLinks(job.labels), job.sweep ? h("a", { class: "label sweep", href: sweepPath(job.sweep) }, h("span", {}, "sweep"), h("b", {}, job.sweep)) : null,
    job.pipeline ? h("a", { class: "label sweep", href: pipelinePath(job.pipeline) }, h("span", {}, "pipeline"), h("b", {}, job.pipeline)) : null,
    h("button", { type: "button", class: "quiet edit", "aria-label": `Edit labels and note of ${job.job_uuid}`, title: "Edit labels and note", on: { click: () => edit(job) } }, "✎"),
    job.note ? h("p", { class: "sub said", title: job.note }, job.note) : null);
}

async function edit(job) {
  if (await editLabels(job)) await load();
}

function progress(job, found) {
  if (!found) return [h("span", { class: "sub" }, "…")];
  const steps = found.max_steps ? `${found.step.toLocaleString("en")} / ${found.max_steps.toLocaleString("en")}` : "";
  if (job.status === "scheduled") {
    return [h("span", { class: "sub" }, job.waits_for?.length ? `waits for ${job.waits_for.join(", ")}` : found.queue_position ? `position ${found.queue_position} in the queue` : "waits")];
  }
  if (job.status !== "in_progress") {
    return [h("span", { class: job.status === "failed" ? "sub why" : "sub", title: found.reason }, job.status === "failed" ? found.reason ?? steps : steps || "–")];
  }
  const left = typeof found.eta_s === "number" ? `${duration(found.eta_s)} left` : "";
  return [found.percent === null ? null : bar(found.percent, `Progress of ${job.job_uuid}`),
    h("span", { class: "sub" }, [found.stage, steps, left].filter(Boolean).join(" · "))];
}

function draw(listed) {
  const shows = readsEveryOwner;
  document.querySelectorAll("th.owner").forEach((head) => { head.hidden = !shows; });
  for (const job of listed.data) {
    if (!rows.has(job.job_uuid)) rows.set(job.job_uuid, row(job, shows));
    fill(rows.get(job.job_uuid), job);
  }
  const wanted = listed.data.map((job) => rows.get(job.job_uuid).element);
  if (wanted.length !== body.rows.length || wanted.some((element, index) => body.rows[index] !== element)) put(body, wanted);
  for (const id of rows.keys()) if (!listed.data.some((job) => job.job_uuid === id)) rows.delete(id);
  byId("jobs").hidden = listed.data.length === 0;
  byId("empty").hidden = listed.data.length !== 0;
  const filters = ["state", "recipe", "text", "label", "sweep", "pipeline"].some((name) => asked.has(name));
  put(byId("empty"), filters ? "No job matches these filters." : [h("strong", {}, "No jobs yet. "), h("a", { href: `${BASE}/new` }, "Make the first one"), "."]);
  byId("older").disabled = !listed.has_more;
  byId("newest").disabled = !asked.has("after");
  say(byId("range"), listed.data.length ? `${listed.data.length} ${listed.data.length === 1 ? "job" : "jobs"}, the newest from ${moment(listed.data[0].scheduled_at)}` : "");
}

// Jobs that have ended keep their figures; the others are asked for again.
async function refreshFigures(again) {
  const names = shown.data.filter((job) => {
    const found = figures.get(job.job_uuid);
    return !found || found.status !== job.status || (again && ["scheduled", "in_progress"].includes(job.status));
  }).map((job) => job.job_uuid);
  if (!names.length) return;
  for (let start = 0; start < names.length; start += FIGURES_AT_ONCE) {
    const some = names.slice(start, start + FIGURES_AT_ONCE);
    for (const found of (await get("figures", { jobs: some.join(",") })).data) figures.set(found.job_uuid, found);
  }
}

async function load() {
  sent += 1;
  const mine = sent;
  try {
    const listed = await get("jobs", query());
    if (mine !== sent) return;
    shown = listed;
    draw(shown);
    problem(null);
    await refreshFigures(true);
    if (mine === sent) draw(shown);
  } catch (error) { problem(error); }
}

const states = new Map(STATES.map((state) => {
  const number = h("span", { class: "big" }, "–");
  const button = h("button", { type: "button", class: "state", "data-state": state, "aria-pressed": "false", on: { click: () => choose(state) } },
    number, h("span", {}, stateWord(state)));
  return [state, { number, button }];
}));
put(byId("states"), [...states.values()].map(({ button }) => button));

function choose(state) {
  change((words) => {
    const before = words.getAll("state");
    words.delete("state");
    const after = before.includes(state) ? before.filter((each) => each !== state) : [...before, state];
    after.forEach((each) => words.append("state", each));
  });
  showFilters();
}

function showFilters() {
  const chosen = asked.getAll("state");
  for (const [state, { button }] of states) button.setAttribute("aria-pressed", String(chosen.includes(state)));
  byId("recipe").value = asked.get("recipe") ?? "";
  filterChips(byId("chosen"), ["label", "sweep", "pipeline"].flatMap((name) => asked.getAll(name).map((value) => [name, value])), (name, value) => {
    change((words) => {
      const kept = words.getAll(name).filter((each) => each !== value);
      words.delete(name);
      kept.forEach((each) => words.append(name, each));
    });
    showFilters();
  });
}

async function showCounts() {
  const found = await get("overview");
  if (found.reads_every_owner !== readsEveryOwner) {
    readsEveryOwner = found.reads_every_owner;
    rows.clear();
    draw(shown);
  }
  for (const [state, { number }] of states) say(number, (found.jobs[state] ?? 0).toLocaleString("en"));
  const recipe = byId("recipe");
  if (recipe.options.length === 1) recipe.append(...found.recipes.map((name) => h("option", { value: name }, name.replaceAll("_", " "))));
  showFilters();
}

function showPicked() {
  const link = byId("compare-link");
  const ready = picked.size > 0;
  link.setAttribute("aria-disabled", String(!ready));
  say(link, ready ? `Compare ${picked.size}` : "Compare");
  link.href = `${BASE}/compare${ready ? `?jobs=${[...picked].map(encodeURIComponent).join(",")}` : ""}`;
}

byId("text").value = asked.get("text") ?? "";
byId("text").addEventListener("input", debounced(() => change((words) => {
  if (byId("text").value.trim()) words.set("text", byId("text").value.trim()); else words.delete("text");
}), 250));
byId("recipe").addEventListener("change", () => change((words) => {
  if (byId("recipe").value) words.set("recipe", byId("recipe").value); else words.delete("recipe");
}));
byId("filters").addEventListener("submit", (event) => {
  event.preventDefault();
  const label = byId("label").value.trim();
  if (!label) return;
  byId("label").value = "";
  if (!asked.getAll("label").includes(label)) change((words) => words.append("label", label));
  showFilters();
});
byId("older").addEventListener("click", () => { change((words) => words.set("after", shown.data.at(-1).job_uuid), true); scrollTo(0, 0); });
byId("newest").addEventListener("click", () => change((words) => words.delete("after"), true));
addEventListener("popstate", () => {
  asked = new URLSearchParams(location.search);
  byId("text").value = asked.get("text") ?? "";
  showFilters();
  load();
});

showFilters();
activity(byId("activity"));
load();
showCounts().catch(problem);
every(3000, load);
every(5000, () => showCounts().catch(problem));
