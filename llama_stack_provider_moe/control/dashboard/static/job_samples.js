// The answers that a job generated, by step, with the value of each grader, as they come.

import { get } from "./api.js";
import { facts, h, put, say, table } from "./dom.js";
import { figure } from "./format.js";
import { every, problem } from "./shell.js";

const MOST = 500; // the API's limit for one request
const SHOWN = 40;
const ORDERS = {
  prompt: ["By prompt", null],
  highest: ["Highest reward first", (one, other) => worth(other, -Infinity) - worth(one, -Infinity)],
  lowest: ["Lowest reward first", (one, other) => worth(one, Infinity) - worth(other, Infinity)],
};
// Answers without a reward come last in both orders; equal infinities have no difference.
const worth = ({ reward }, none) => (typeof reward === "number" ? reward : Math.sign(none) * Number.MAX_VALUE);
const graded = ({ rewards }) => Object.keys(rewards).length > 0; // else its job has no graders
const number = (count, one) => `${count.toLocaleString("en")} ${one}${count === 1 ? "" : "s"}`;

export function samples(panel, { path, job }) {
  const left = new AbortController();
  const step = h("select", { id: "sample-step", on: { change: () => load(true) } }, h("option", { value: "" }, "The newest"));
  const order = h("select", { id: "sample-order", on: { change: () => { many = SHOWN; draw(); } } },
    Object.entries(ORDERS).map(([name, [title]]) => h("option", { value: name }, title)));
  const about = h("p", { class: "muted", role: "status" });
  const list = h("div", { class: "samples" });
  const more = h("button", { type: "button", hidden: true, on: { click: () => { const first = many; many += SHOWN; draw(); list.querySelectorAll("article")[first]?.focus(); } } }, "More answers");
  const filters = h("div", { class: "filters", hidden: true }, h("div", { class: "field" }, h("label", { for: "sample-step" }, "Step"), step),
    h("div", { class: "field" }, h("label", { for: "sample-order" }, "Order"), order));
  const empty = h("p", { class: "empty", hidden: true });
  put(panel, filters, about, empty, list, h("div", { class: "buttons" }, more));
  let found = [], of = null, many = SHOWN;

  function offer(steps) {
    const chosen = step.value;
    const wanted = ["", ...steps.toReversed().map(String)];
    if (wanted.join() === [...step.options].map(({ value }) => value).join()) return;
    put(step, wanted.map((value) => h("option", { value }, value === "" ? "The newest" : value)));
    step.value = wanted.includes(chosen) ? chosen : "";
  }

  function draw() {
    const compare = ORDERS[order.value][1];
    const shown = compare ? found.toSorted(compare) : found;
    put(list, shown.slice(0, many).map((each, index) => card(each, compare !== null || index === 0 || shown[index - 1].group !== each.group)));
    more.hidden = shown.length <= many;
    say(about, told(of, found));
  }

  // `changed`: the person chose; else nothing that they read or have chosen in the list moves away from them.
  async function load(changed = false) {
    try {
      const { steps, data: [first] } = await get(`${path}/samples`, { limit: 1 }, left.signal);
      filters.hidden = steps.length === 0;
      empty.hidden = steps.length > 0;
      if (!steps.length) { say(empty, why(job())); return; }
      offer(steps);
      const asked = step.value === "" ? first?.step ?? steps.at(-1) : Number(step.value);
      if (asked === of && !changed) return;
      const held = list.contains(document.activeElement) || list.contains(getSelection().anchorNode) && !getSelection().isCollapsed;
      if (held && !changed) { say(about, `${told(of, found)} Those of step ${asked.toLocaleString("en")} appear when you leave the list.`); return; }
      const answers = await get(`${path}/samples`, { step: asked, limit: MOST }, left.signal);
      [found, of, many] = [numbered(answers.data), asked, SHOWN];
      draw();
      problem(null);
    } catch (error) { if (!left.signal.aborted) problem(error); }
  }

  load(true);
  const stop = every(3000, () => (["scheduled", "in_progress"].includes(job().status) || of === null ? load() : null));
  return () => { stop(); left.abort(); };
}

// Each answer with its number among those to its prompt.
function numbered(answers) {
  const seen = new Map();
  return answers.map((each) => {
    seen.set(each.group, (seen.get(each.group) ?? 0) + 1);
    return { ...each, number: seen.get(each.group) };
  });
}

function why(job) {
  for (const block of ["rl", "generation"]) if (job.spec?.[block]?.keep_samples === 0) return `This job keeps no answers: its ${block}.keep_samples is 0.`;
  return ["scheduled", "in_progress"].includes(job.status) ? "No answers yet. They come with the first step." : "This job has no answers: it generated none.";
}

function told(step, found) {
  const rewards = found.map(({ reward }) => reward).filter((each) => typeof each === "number");
  const mean = rewards.reduce((sum, each) => sum + each, 0) / rewards.length;
  const spread = rewards.length ? ` Mean reward ${figure(mean)}, from ${figure(Math.min(...rewards))} to ${figure(Math.max(...rewards))}.` : found.some(graded) ? " None has a reward." : "";
  const without = found.length - rewards.length;
  const prompts = new Set(found.map(({ group }) => group)).size;
  return `Step ${step.toLocaleString("en")}: ${number(found.length, "answer")} to ${number(prompts, "prompt")}.${spread}`
    + (without && rewards.length ? ` ${number(without, "answer")} without a reward, from which nothing is learnt.` : "");
}

function card(each, withPrompt) {
  const name = `Answer ${each.number} to prompt ${each.group + 1}`;
  const rows = Object.entries(each.rewards).map(([grader, value]) => [grader, figure(value), each.failures[grader] ?? ""]);
  return h("article", { class: "card example", tabindex: -1, "aria-label": name },
    withPrompt ? h("div", {}, h("h2", {}, `Prompt ${each.group + 1}`), h("pre", { class: "answer", tabindex: 0, "aria-label": `Prompt of answer ${each.number} to prompt ${each.group + 1}` }, each.prompt)) : null,
    h("h3", {}, `Answer ${each.number}`),
    h("pre", { class: "answer", tabindex: 0, "aria-label": name }, each.completion),
    h("div", { class: "graded" },
      facts([...(graded(each) ? [["Reward", figure(each.reward)], ["Advantage", `${each.advantage > 0 ? "+" : ""}${figure(each.advantage)}`]] : []),
        ["Tokens", `${each.tokens.toLocaleString("en")}${each.truncated ? ", cut at the largest length" : ""}`]]),
      rows.length ? table(`Graders of answer ${each.number} to prompt ${each.group + 1}`, ["Grader", "Value", ...(Object.keys(each.failures).length ? ["Why it has none"] : [])],
        Object.keys(each.failures).length ? rows : rows.map((row) => row.slice(0, 2))) : null));
}
