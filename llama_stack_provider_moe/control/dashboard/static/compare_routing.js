// How differently the routers of several jobs use their experts, layer by layer.

import { get, part } from "./api.js";
import { h, note, put, table } from "./dom.js";
import { figure } from "./format.js";
import { jobPath } from "./shell.js";

const known = new Map();
let drawn = "";

// Half the sum of the differences: the part of the tokens that would have to go to other experts. 0 is the same, 1 is
// none in common.
export const distance = (one, other) => one.reduce((sum, share, expert) => sum + Math.abs(share - other[expert]), 0) / 2;

function largestChange(one, other) {
  let found = 0;
  one.forEach((share, expert) => { if (Math.abs(other[expert] - share) > Math.abs(other[found] - one[found])) found = expert; });
  return `expert ${found}: ${figure(one[found])} → ${figure(other[found])}`;
}

function fits(one, other) {
  return one.layers.length === other.layers.length && one.layers.every((layer, row) => layer === other.layers[row] && one.share[row].length === other.share[row].length);
}

const average = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;
const between = (one, other) => one.layers.map((_, row) => distance(one.share[row], other.share[row]));

// Every job with every other, as the mean over the layers.
function pairs(found) {
  return table("Routing difference of each two jobs", ["Mean over layers", ...found.map(({ job_uuid: id }) => id)], found.map((one, row) => [
    h("a", { href: jobPath(one.job_uuid) }, one.job_uuid),
    ...found.map((other, column) => (row === column ? "–" : fits(one, other) ? figure(average(between(one, other))) : "other experts"))]));
}

function byLayer(first, others) {
  const distances = others.map((other) => between(first, other));
  const most = Math.max(...distances.flat(), 1e-9);
  return table(`Routing difference from ${first.job_uuid}, by layer`, ["Layer", ...others.map(({ job_uuid: id }) => id)], first.layers.map((layer, row) => [
    layer, ...others.map((other, index) => h("div", { class: "difference" }, h("span", {}, figure(distances[index][row])),
      h("meter", { min: 0, max: most, value: distances[index][row], "aria-label": `Layer ${layer}: ${figure(distances[index][row])}` }),
      h("span", { class: "sub" }, largestChange(first.share[row], other.share[row]))))]));
}

async function load(list, isRunning) {
  await Promise.all(list.map(async (name) => {
    if (known.has(name) && !isRunning(name)) return;
    known.set(name, await get(`jobs/${part(name)}/routing/shares`));
  }));
}

// Draws the comparison of the jobs of `list`, the first of which the others are compared to by layer.
export async function compareRouting(place, list, isRunning) {
  await load(list, isRunning);
  const found = list.map((name) => known.get(name));
  const key = JSON.stringify(found);
  if (key === drawn) return; // what somebody has opened stays open
  drawn = key;
  const measured = found.filter(({ layers }) => layers.length);
  const without = found.filter(({ layers }) => !layers.length).map(({ job_uuid: id }) => id);
  const head = h("h2", {}, "Routing difference");
  if (list.length < 2) { put(place); return; }
  if (measured.length < 2) {
    put(place, head, h("p", { class: "empty" }, `Routing is compared between jobs with routing figures; ${without.join(", ")} ${without.length === 1 ? "has" : "have"} none.`));
    return;
  }
  const [first, ...rest] = measured;
  const comparable = rest.filter((other) => fits(first, other));
  const counts = measured.map(({ covered }) => covered);
  put(place, head,
    h("p", { class: "muted" }, `The part of a layer's tokens that goes to other experts than in the other job: 0 is the same, 1 is none in common. It is half the sum of the differences of the experts' shares, over the last ${Math.min(...counts) === Math.max(...counts) ? counts[0] : `${Math.min(...counts)} to ${Math.max(...counts)}`} steps of each job. Other rows in those steps alone make a small difference.`),
    without.length ? note("info", `Without routing figures: ${without.join(", ")}.`) : null,
    pairs(measured),
    comparable.length ? h("details", { open: comparable.length < 4 }, h("summary", {}, `By layer, against ${first.job_uuid}`), byLayer(first, comparable)) : null);
}
