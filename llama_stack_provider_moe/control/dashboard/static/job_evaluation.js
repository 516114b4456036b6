// What `eval` measured before and after training, with the answers side by side, and the held-out figures.

import { request, part } from "./api.js";
import { h, note, put, table } from "./dom.js";
import { figure } from "./format.js";
import { pill } from "./pieces.js";
import { problem } from "./shell.js";

const LIMIT = 16e6;
const STATES = {
  before: "Before", after: "After", before_masked: "Before, without masked experts", after_masked: "After, without masked experts",
  before_ablated: "Before, without the directions", after_ablated: "After, without the directions",
};
const stateName = (name) => STATES[name] ?? name.replaceAll("_", " ");
const wide = (found) => (found ? h("span", {}, figure(found.value), h("span", { class: "sub" }, `${figure(found.low)} to ${figure(found.high)}, n ${found.n}`)) : "–");

export function evaluation(panel, { path, job }) {
  const left = new AbortController();
  const place = h("div");
  put(panel, heldOut(job()), place);

  async function load() {
    const made = (job().checkpoints ?? []).find((each) => each.kind === "evaluation" && each.bytes < LIMIT);
    if (!made) {
      const safety = job().resources_allocated?.safety;
      put(place, safety ? measured(safety.measured, safety.differences) : h("p", { class: "empty" }, ...why(job())));
      return;
    }
    const report = await (await request("GET", `${path}/artifacts/${part(made.name)}/eval.json`, { signal: left.signal })).json();
    put(place, gate(report.gate ?? []), measured(report.measured, report.differences), skipped(report.skipped ?? []), answers(report.examples ?? []));
  }
  load().catch(problem);
  return () => left.abort();
}

function why(job) {
  if (job.spec?.eval) return ["The evaluation has not measured anything yet."];
  return ["This job has no ", h("code", {}, "eval"), " block, which measures refusals, capability and tool calls before and after training."];
}

function heldOut(job) {
  const found = job.resources_allocated?.evaluation;
  if (!found) return null;
  const names = Object.keys(found.last.metrics).filter((name) => name in found.first.metrics);
  const isOne = found.first.step === found.last.step;
  const rows = names.map((name) => isOne ? [name, figure(found.last.metrics[name])] : [name, figure(found.first.metrics[name]), figure(found.last.metrics[name]), change(found.first.metrics[name], found.last.metrics[name])]);
  return h("section", {}, h("h2", {}, "Held-out rows"),
    table("Figures on held-out rows", isOne ? ["Figure", `Step ${found.last.step}`] : ["Figure", found.first.step === 0 ? "Before training" : `Step ${found.first.step}`, `Step ${found.last.step}`, "Change"], rows));
}

function change(first, last) {
  if (typeof first !== "number" || typeof last !== "number") return "–";
  return (last > first ? "+" : last < first ? "−" : "") + figure(Math.abs(last - first));
}

function gate(verdicts) {
  if (!verdicts.length) return null;
  return h("section", {}, h("h2", {}, "Limits of the gate"), table("Limits of the gate", ["Limit", "Before", "After", "Value", "Greatest allowed", "Verdict"],
    verdicts.map((each) => [each.name.replaceAll("_", " "), figure(each.before), figure(each.after), figure(each.value), figure(each.limit), pill(each.exceeded ? "failed" : "completed", each.exceeded ? "exceeded" : "kept")])));
}

function measured(states, differences) {
  const columns = Object.keys(STATES).filter((name) => name in states).concat(Object.keys(states).filter((name) => !(name in STATES)));
  const names = [...new Set(columns.flatMap((name) => Object.keys(states[name])))];
  const changes = differences?.["after - before"] ?? {};
  const rows = names.map((name) => [name.replaceAll("_", " "), ...columns.map((state) => wide(states[state][name])), wide(changes[name] ?? changes[`${name}_ratio`])]);
  return h("section", {}, h("h2", {}, "Before and after training"),
    h("p", { class: "muted" }, "Each figure with its 95% interval. The change of a perplexity is a ratio."),
    table("Figures before and after", ["Figure", ...columns.map(stateName), "Change"], rows));
}

function skipped(list) {
  return list.length ? note("warn", h("strong", {}, "Not measured: "), list.join("; ")) : null;
}

function answers(examples) {
  if (!examples.length) return null;
  return h("section", {}, h("h2", {}, "Answers"), examples.map((each) => {
    const states = Object.keys(STATES).filter((name) => each[name] && typeof each[name] === "object");
    return h("article", { class: "card example" },
      h("p", { class: "sub" }, `${each.set}, row ${each.row}`),
      (each.messages ?? []).map((message) => h("p", { class: "prompt" }, h("b", {}, message.role), " ", typeof message.content === "string" ? message.content : JSON.stringify(message.content))),
      h("div", { class: "sides" }, states.map((name) => h("div", {}, h("h3", {}, stateName(name), " ", "refusal" in each[name] ? h("span", { class: "sub" }, each[name].refusal ? "a refusal" : "no refusal") : null),
        h("pre", { class: "answer", tabindex: 0 }, each[name].answer ?? JSON.stringify(each[name], null, 2))))));
  }));
}
