// Several jobs: curves over each other, settings that differ, final figures, routing. The address names the jobs.

import { get, part } from "./api.js";
import { LineChart, withoutCharts } from "./charts.js";
import { byId, h, note, put, table } from "./dom.js";
import { bytes, duration, figure, moment, shown } from "./format.js";
import { compareRouting } from "./compare_routing.js";
import { Series } from "./job_curves.js";
import { pill } from "./pieces.js";
import { leaves, same } from "./schema.js";
import { every, jobPath, problem, toast } from "./shell.js";

const MOST = 12;
const POINTS = 500;
// Figures with a name for people come first, in this order.
const FIGURES = new Map([
  ["reward", "Reward"], ["reward_std", "Spread of the rewards"], ["kl", "KL divergence from the model before training"],
  ["validation_loss", "Held-out loss"], ["perplexity", "Perplexity on held-out rows"], ["loss", "Training loss, with balance terms"],
  ["ce", "Training loss"], ["preference_loss", "Training loss"], ["breaker_loss", "Training loss"], ["divergence", "Training loss"], ["rewards/margins", "Reward margin"],
  ["rewards/accuracies", "Reward accuracy"], ["mean_token_accuracy", "Token accuracy"], ["train_seconds", "Seconds of training"],
  ["tokens_per_s", "Tokens a second"], ["memory_bytes", "Peak memory"], ["learning_rate", "Learning rate"], ["grad_norm", "Norm of the gradient"],
]);
const LOSS = ["ce", "preference_loss", "breaker_loss", "divergence", "policy_loss", "loss"];
const CURVES = [
  ["Reward", () => "reward", false],
  ["Reward on held-out prompts", () => "reward", true],
  ["Spread of the rewards", () => "reward_std", false],
  ["KL divergence from the model before training", () => "kl", false],
  ["Clipped tokens", (series) => ["clip_ratio/region_mean", "cispo_clip_ratio"].find((name) => series.metrics.has(name)), false],
  ["Changed routes", () => "routing/changed", false],
  ["Mean length of the answers, tokens", () => "completions/mean_length", false],
  ["Training loss", (series) => LOSS.find((name) => series.metrics.has(name)), false],
  ["Held-out loss", (series) => (series.evaluated().has("reward") ? null : "validation_loss"), true],
  ["Perplexity on held-out rows", () => "perplexity", true],
  ["Reward margin", () => "rewards/margins", false],
  ["Reward accuracy", () => "rewards/accuracies", false],
  ["Learning rate", () => "learning_rate", false],
  ["Norm of the gradient", () => "grad_norm", false],
  ["Tokens a second", () => "tokens_per_s", false],
  ["Peak memory", () => "memory_bytes", false, { format: bytes, unit: "B" }],
  ["Balance loss", () => "aux_loss", false],
];
const details = new Map();
const series = new Map();
const charts = new Map();
const asked = () => [...new Set((new URLSearchParams(location.search).get("jobs") ?? "").split(",").filter(Boolean))];

const names = () => asked().slice(0, MOST);

function choose(list) {
  const query = list.length ? `?jobs=${list.map(encodeURIComponent).join(",")}` : location.pathname;
  history.pushState(null, "", query);
  load();
}

function chips(list) {
  put(byId("chosen"), list.map((name, index) => h("li", { class: "chip", "data-line": (index % 8) + 1 },
    h("span", { class: "dot" }), h("a", { href: jobPath(name) }, name), details.has(name) ? pill(details.get(name).status) : null,
    h("button", { type: "button", class: "quiet", "aria-label": `Remove ${name}`, on: { click: () => choose(asked().filter((each) => each !== name)) } }, "×"))));
  byId("copy").disabled = list.length === 0;
  const more = asked().slice(MOST);
  put(byId("left-out"), more.length ? note("warn", `The address names ${list.length + more.length} jobs. This page compares the first ${MOST}; it leaves out ${more.join(", ")}.`) : null);
}

const grid = h("div", { class: "charts" });
const differing = h("section");
const final = h("section");
const routing = h("section");
const isRunning = (name) => ["scheduled", "in_progress"].includes(details.get(name)?.status);

function drawCurves(list) {
  for (const [title, choice, isHeldOut, options] of [...CURVES, ...perGrader(list)]) {
    const lines = list.filter((name) => series.has(name)).map((name) => {
      const found = series.get(name);
      const metric = choice(found);
      if (isHeldOut) return metric === null ? { name, x: [], y: [] } : found.heldOut(metric, name);
      return metric && found.metrics.has(metric) ? { ...found.line(metric), name } : { name, x: [], y: [] };
    });
    if (!lines.some(({ x }) => x.length)) { charts.get(title)?.element.remove(); continue; }
    if (!charts.has(title)) charts.set(title, new LineChart(title, options));
    if (!charts.get(title).element.isConnected) grid.append(charts.get(title).element);
    charts.get(title).set(lines);
  }
}

// A chart for each grader that any of the jobs has.
function perGrader(list) {
  const found = new Set(list.flatMap((name) => [...series.get(name)?.metrics.keys() ?? []]).filter((name) => /^rewards\/.+\/mean$/.test(name)));
  return [...found].map((metric) => [`Reward of ${metric.slice(8, -5)}`, () => metric, false]);
}

function drawSettings(list) {
  const found = list.filter((name) => details.get(name)?.spec);
  const flat = new Map(found.map((name) => [name, new Map(leaves({ ...details.get(name).spec, job_uuid: null }).map(([path, value]) => [path.join("."), value]))]));
  const paths = [...new Set([...flat.values()].flatMap((each) => [...each.keys()]))];
  const differ = paths.filter((path) => found.some((name) => !same(flat.get(name).get(path), flat.get(found[0]).get(path))));
  put(differing, h("h2", {}, "Settings that differ"),
    found.length < 2 ? h("p", { class: "empty" }, "Add a second job to compare settings.")
      : differ.length ? table("Settings that differ", ["Setting", ...found], differ.map((path) => [h("code", {}, path), ...found.map((name) => (flat.get(name).has(path) ? h("code", {}, shown(flat.get(name).get(path))) : "–"))]))
        : h("p", { class: "empty" }, "All settings are the same."));
}

function drawFinal(list) {
  const found = list.filter((name) => details.has(name)).map((name) => details.get(name));
  const took = (job) => (job.started_at && job.completed_at ? duration((Date.parse(job.completed_at) - Date.parse(job.started_at)) / 1000) : "–");
  const last = new Map(found.map((job) => [job.job_uuid, { ...job.resources_allocated?.metrics, ...job.summary, ...job.resources_allocated?.evaluation?.last.metrics }]));
  const health = (job, name) => job.resources_allocated?.routing?.[name];
  const metrics = [...new Set([...last.values()].flatMap((each) => Object.keys(each)))].sort((one, other) => rank(one) - rank(other) || one.localeCompare(other));
  const least = (metric) => {
    const values = found.map((job) => last.get(job.job_uuid)[metric]).filter((value) => typeof value === "number");
    return values.length > 1 && ["validation_loss", "perplexity"].includes(metric) ? Math.min(...values) : null;
  };
  const balance = [["min_share", "Smallest share of an expert"], ["max_share", "Largest share of an expert"], ["max_cv", "Most uneven layer (variation)"], ["dead_experts", "Dead experts"], ["load_entropy", "Entropy of the load"]];
  const rows = [
    ["State", ...found.map((job) => pill(job.status))],
    ["Model", ...found.map((job) => job.model)],
    ["Submitted", ...found.map((job) => moment(job.scheduled_at))],
    ["Took", ...found.map(took)],
    ...metrics.map((metric) => [FIGURES.get(metric) ?? h("code", {}, metric), ...found.map((job) => {
      const value = last.get(job.job_uuid)[metric];
      if (metric === "memory_bytes") return bytes(value);
      return value !== undefined && value === least(metric) ? h("strong", { class: "best" }, figure(value), " (lowest)") : figure(value);
    })]),
    ...balance.filter(([name]) => found.some((job) => health(job, name) !== undefined)).map(([name, title]) => [title, ...found.map((job) => figure(health(job, name)))]),
  ];
  put(final, h("h2", {}, "Final figures"), found.length ? table("Final figures", ["Figure", ...found.map((job) => job.job_uuid)], rows) : null);
}
const rank = (name) => (FIGURES.has(name) ? [...FIGURES.keys()].indexOf(name) : FIGURES.size);

async function load() {
  const list = names();
  chips(list);
  problem(null);
  if (!list.length) { put(byId("content"), h("p", { class: "empty" }, "Add jobs here, or select them in the list of jobs.")); return; }
  if (!grid.isConnected) put(byId("content"), withoutCharts(), grid, differing, final, routing);
  const results = await Promise.allSettled(list.map(async (name) => {
    const old = details.get(name);
    if (old && !isRunning(name) && series.has(name)) return;
    details.set(name, await get(`jobs/${part(name)}`));
    series.set(name, new Series(await get(`jobs/${part(name)}/metrics`, { limit: POINTS })));
  }));
  const failed = results.findIndex(({ status }) => status === "rejected");
  if (failed >= 0) {
    const error = results[failed].reason;
    error.message = `${list[failed]}: ${error.message}`;
    problem(error);
  }
  chips(list);
  drawCurves(list);
  drawSettings(list);
  drawFinal(list);
  await compareRouting(routing, list.filter((name) => details.has(name)), isRunning).catch((error) => problem(error, routing));
}

byId("add").addEventListener("submit", (event) => {
  event.preventDefault();
  const name = byId("job").value.trim();
  const list = asked();
  if (name && !list.includes(name) && list.length >= MOST) {
    put(byId("left-out"), note("warn", `This page compares at most ${MOST} jobs. Remove one before you add ${name}.`));
    return;
  }
  if (name && !list.includes(name)) choose([...list, name]);
  byId("job").value = "";
});
byId("copy").addEventListener("click", async () => {
  try { await navigator.clipboard.writeText(location.href); toast("The link is copied."); } catch { toast(`Copy it from the address bar: ${location.href}`); }
});
addEventListener("popstate", load);
get("jobs", { limit: 100 }).then(({ data }) => put(byId("known"), data.map((job) => h("option", { value: job.job_uuid }, job.model))), () => {});
load();
every(5000, () => {
  return names().some(isRunning) ? load() : null;
});
