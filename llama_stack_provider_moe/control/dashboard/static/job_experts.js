// Balance of the experts by layer over the steps, dead experts marked.

import { get } from "./api.js";
import { HeatMap, withoutCharts } from "./charts.js";
import { h, note, put, say } from "./dom.js";
import { figure } from "./format.js";
import { every, problem } from "./shell.js";

const COLUMNS = 160;
const MEASURES = {
  cv: ["Unevenness of each layer", "variation of shares", "0 is perfect balance; above 1 a few experts do most of the work."],
  largest: ["Largest share of one expert", "largest share", "The share of a layer's tokens that its busiest expert gets."],
  dead: ["Dead experts of each layer", "dead experts", "Experts that got no token in a step."],
};

const largest = (rows) => Math.max(1e-9, ...rows.flat().filter((value) => typeof value === "number"));

export function experts(panel, { path, job }) {
  const left = new AbortController();
  let layer = null;
  let measure = "cv";
  const choice = h("select", { id: "measure", on: { change: () => { measure = choice.value; draw(); } } },
    Object.entries(MEASURES).map(([name, [title]]) => h("option", { value: name }, title)));
  const layers = h("select", { id: "layer", on: { change: () => pick(Number(layers.value)) } });
  const about = h("p", { class: "muted" });
  const dead = h("div", { role: "status" });
  const byLayer = new HeatMap("Balance by layer", { rowName: "layer", value: "value", chosen: pick });
  const byExpert = new HeatMap("Share of each expert", { rowName: "expert", value: "share", marked: "dead: no token" });
  const content = h("div", { hidden: true },
    h("div", { class: "filters" }, h("div", { class: "field" }, h("label", { for: "measure" }, "Measure"), choice),
      h("div", { class: "field" }, h("label", { for: "layer" }, "Layer"), layers)),
    about, byLayer.element, dead, byExpert.element);
  const empty = h("p", { class: "empty", hidden: true });
  put(panel, withoutCharts(), empty, content);
  let found = null;

  function pick(number) {
    layer = number;
    load();
  }

  function draw() {
    const [title, value, meaning] = MEASURES[measure];
    say(about, `${meaning} Choose a layer here or in the map to see its experts.`);
    byLayer.value = value;
    byLayer.rename(title);
    byLayer.set({ x: found.steps, y: found.layers, z: found[measure], marks: null, least: 0, most: largest(found[measure]) });
    byExpert.rename(`Share of each expert in layer ${found.layer}`);
    const marks = found.share.map((row) => row.map((share) => (share === 0 ? 1 : null)));
    const any = marks.some((row) => row.some((mark) => mark !== null));
    byExpert.set({ x: found.share_steps, y: found.share.map((_, index) => index), z: found.share, marks: any ? marks : null, least: 0, most: largest(found.share) });
    const last = found.steps.length - 1;
    const table = found.share_steps.length - 1;
    const now = found.share.flatMap((row, expert) => (row[table] === 0 ? [expert] : []));
    const since = found.share_steps[table] === found.steps[last] ? "" : `, in the table of step ${found.share_steps[table]}`;
    const all = found.dead.reduce((sum, row) => sum + row[last], 0);
    const even = figure(1 / Math.max(found.experts, 1));
    put(dead, now.length || all
      ? note("warn", h("strong", {}, `${all} dead in all layers at step ${found.steps[last]}`), now.length ? `; in layer ${found.layer}: expert ${now.join(", ")}${since}. ` : `; none in layer ${found.layer}${since}. `, "They are red in the map below.")
      : note("good", `No dead expert at step ${found.steps[last]}. With perfect balance each expert has a share of ${even}.`));
  }

  async function load() {
    try {
      found = await get(`${path}/routing`, { limit: COLUMNS, layer }, left.signal);
    } catch (error) { problem(error); return; }
    content.hidden = found.layers.length === 0;
    empty.hidden = found.layers.length > 0;
    if (found.layers.length === 0) {
      const runs = ["scheduled", "in_progress"].includes(job().status);
      say(empty, runs ? "No routing figures yet. They come with the first step, if the model has experts." : "This job has no routing figures: its model has no experts, or it took no step.");
      return;
    }
    if (layers.options.length !== found.layers.length) put(layers, found.layers.map((number) => h("option", { value: number }, number)));
    layer = found.layer;
    layers.value = String(layer);
    draw();
  }

  load();
  const stop = every(10000, () => (["scheduled", "in_progress"].includes(job().status) ? load() : null));
  return () => { stop(); left.abort(); byLayer.forget(); byExpert.forget(); };
}
