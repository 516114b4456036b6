// Curves of a job's figures, as they come.

import { follow, get } from "./api.js";
import { LineChart, withoutCharts } from "./charts.js";
import { h, put } from "./dom.js";
import { bytes } from "./format.js";
import { problem } from "./shell.js";

const MOST_POINTS = 1000;
const LOSSES = ["ce", "preference_loss", "breaker_loss", "divergence", "reroute_loss", "retain_loss"];
const CLIPPED = ["clip_ratio/region_mean", "cispo_clip_ratio"];
const LENGTHS = ["completions/mean_length", "completions/max_length"];
const perGrader = (name) => /^rewards\/.+\/mean$/.test(name);
const starts = (...heads) => (name) => heads.some((head) => name.startsWith(head));
// title, which figures of the steps, which of the evaluations, more
const GROUPS = [
  ["Reward", (name) => name === "reward", (name) => name === "reward", {}],
  ["Reward by grader", perGrader, perGrader, {}],
  ["Spread of the rewards", (name) => name === "reward_std", () => false, {}],
  ["Groups whose rewards are equal", (name) => name === "frac_reward_zero_std", () => false, {}],
  ["KL divergence from the model before training", (name) => name === "kl", (name) => name === "kl", {}],
  ["Clipped tokens", (name) => CLIPPED.includes(name), () => false, {}],
  ["Changed routes", (name) => name === "routing/changed", () => false, {}],
  ["Length of the answers, tokens", (name) => LENGTHS.includes(name), (name) => name === LENGTHS[0], {}],
  ["Answers cut at the largest length", (name) => name === "completions/clipped_ratio", (name) => name === "completions/clipped_ratio", {}],
  ["Policy loss", (name) => name === "policy_loss", () => false, {}],
  ["Loss", (name) => LOSSES.slice(0, 4).includes(name), (name) => name === "validation_loss", {}],
  ["Loss by domain", starts("loss/"), starts("validation_loss/"), {}],
  ["Perplexity by domain", () => false, starts("perplexity/"), {}],
  ["Rewards", (name) => ["rewards/chosen", "rewards/rejected", "rewards/margins"].includes(name), () => false, {}],
  ["Reward accuracy", (name) => name === "rewards/accuracies", (name) => name === "rewards/accuracies", {}],
  ["Cosine with the base model", starts("cosine/"), () => false, {}],
  ["Reroute and retain loss", (name) => ["reroute_loss", "retain_loss"].includes(name), () => false, {}],
  ["Coefficients", starts("reroute_coefficient", "retain_coefficient"), () => false, {}],
  ["Learning rate", (name) => name === "learning_rate", () => false, {}],
  ["Norm of the gradient", (name) => name === "grad_norm", () => false, {}],
  ["Tokens a second", (name) => name === "tokens_per_s", () => false, {}],
  ["Peak memory", (name) => name === "memory_bytes", () => false, { format: bytes, unit: "B" }],
  ["Balance loss", (name) => ["aux_loss", "router_z_loss"].includes(name), (name) => name === "aux_loss", {}],
  ["Token accuracy", (name) => name === "mean_token_accuracy", (name) => name === "mean_token_accuracy", {}],
];
const NAMES = {
  ce: "training", preference_loss: "training", breaker_loss: "training", divergence: "training", policy_loss: "training", reward: "training", validation_loss: "held out",
  reward_std: "deviation", frac_reward_zero_std: "share of the groups", kl: "training", "clip_ratio/region_mean": "share", cispo_clip_ratio: "share",
  "routing/changed": "share of tokens and layers", "completions/mean_length": "mean", "completions/max_length": "longest", "completions/clipped_ratio": "training",
};
const named = (name) => NAMES[name] ?? (perGrader(name) ? name.replace(/\/mean$/, "") : name).replace(/^(rewards|cosine|loss|validation_loss|perplexity)\//, "");
// Of figures of one domain, the domain too.
const heldOutLabel = (name) => (starts("validation_loss/", "perplexity/", "rewards/")(name) ? `${named(name)}, held out` : "held out");
// Not drawn alone: the first is the sum of a loss that is drawn and of balance terms.
const HIDDEN = new Set(["tokens", "tokens_per_s_per_device", "loss"]);

const number = (value) => (typeof value === "number" ? value : null);

// The columns of `metrics`, and what later events add to them.
export class Series {
  constructor(found) {
    this.steps = found.steps;
    this.metrics = new Map(Object.entries(found.metrics).map(([name, values]) => [name, values.map(number)]));
    this.evaluations = found.evaluations;
    this.odd = Object.entries(found.metrics).filter(([, values]) => values.some((value) => typeof value === "string")).map(([name]) => name);
  }

  step({ step, metrics }) {
    this.cut(step - 1);
    for (const name of Object.keys(metrics)) if (!this.metrics.has(name)) this.metrics.set(name, this.steps.map(() => null));
    this.steps.push(step);
    for (const [name, values] of this.metrics) values.push(number(metrics[name]));
  }

  evaluation(event) {
    this.evaluations = [...this.evaluations.filter(({ step }) => step < event.step), event];
  }

  // A resumption undoes the steps after it.
  cut(step) {
    let kept = this.steps.length;
    while (kept > 0 && this.steps[kept - 1] > step) kept -= 1;
    if (kept === this.steps.length) return;
    this.steps.length = kept;
    for (const values of this.metrics.values()) values.length = kept;
  }

  line(name) {
    return { name: named(name), x: this.steps, y: this.metrics.get(name) };
  }

  heldOut(name, label = heldOutLabel(name)) {
    const found = this.evaluations.filter(({ metrics }) => name in metrics);
    return { name: label, x: found.map(({ step }) => step), y: found.map(({ metrics }) => number(metrics[name])), points: true };
  }

  evaluated() {
    return new Set(this.evaluations.flatMap(({ metrics }) => Object.keys(metrics)));
  }
}

export function curves(panel, { path, job }) {
  const left = new AbortController();
  const grid = h("div", { class: "charts" });
  const rest = h("div", { class: "charts" });
  const others = h("details", { class: "others" }, h("summary", {}, "All other figures"), rest);
  const empty = h("p", { class: "empty" }, "No figures yet. They come with the first step.");
  const charts = new Map();
  let series = null;
  put(panel, withoutCharts(), empty, grid, others);

  function chart(title, options, place) {
    if (!charts.has(title)) {
      charts.set(title, new LineChart(title, options));
      place.append(charts.get(title).element);
    }
    return charts.get(title);
  }

  function draw() {
    const drawn = new Set(HIDDEN);
    const evaluated = series.evaluated();
    for (const [title, ofStep, ofEvaluation, options] of GROUPS) {
      const names = [...series.metrics.keys()].filter(ofStep);
      const held = [...evaluated].filter((name) => ofEvaluation(name) && !(name === "validation_loss" && evaluated.has("reward"))); // then it is the reward, negated
      names.forEach((name) => drawn.add(name));
      if (!names.length && !held.length) continue;
      chart(title, options, grid).set([...names.map((name) => series.line(name)),
        ...held.map((name) => series.heldOut(name))].filter(({ x }) => x.length));
    }
    const more = [...series.metrics.keys()].filter((name) => !drawn.has(name)).sort();
    if (others.open) for (const name of more) chart(name, {}, rest).set([series.line(name)]);
    others.hidden = more.length === 0;
    empty.hidden = charts.size > 0;
    if (empty.hidden === false && job().recipe === "routing_analysis") put(empty, "A routing analysis has no curves; see its files.");
  }
  others.addEventListener("toggle", () => { if (series) draw(); });

  async function run() {
    for (;;) {
      const found = await get(`${path}/metrics`, { limit: MOST_POINTS }, left.signal);
      series = new Series(found);
      draw();
      if (!["scheduled", "in_progress"].includes(job().status)) return;
      const ended = await listen(found.cursor);
      if (ended) return;
    }
  }

  // Adds what comes; returns false where the curves are to be read again, true once the job has ended.
  async function listen(cursor) {
    const query = { cursor, types: "step,evaluation,resumed" };
    for await (const { name, data } of follow(`${path}/events`, { query, signal: left.signal })) {
      if (name === "end") return true;
      for (const event of data.events) {
        if (event.type === "step") series.step(event);
        else if (event.type === "evaluation") series.evaluation(event);
        else return false;
      }
      if (series.steps.length > 2 * MOST_POINTS) return false;
      draw();
    }
    return true;
  }

  run().catch((error) => problem(error));
  return () => { left.abort(); charts.forEach((each) => each.forget()); };
}
