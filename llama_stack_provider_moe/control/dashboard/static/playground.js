// A playground: the owner's one, prompts to it, and answers of both sides as they come. A result that the host's
// inference serves can be asked there instead, without a playground.

import { ApiError, follow, get, part, post, remove } from "./api.js";
import { byId, h, note, printable, put, say } from "./dom.js";
import { count, duration } from "./format.js";
import { pill } from "./pieces.js";
import { WRITE_TEXT } from "./recipes.js";
import { answered, servedAs } from "./served.js";
import { Strip } from "./strip.js";
import { every, jobPath, problem, question, toast } from "./shell.js";

const NAMES = { on: "With its adapter", off: "Base, without the adapter" };
const ENDS = { stop: "ended by the model", length: "reached the limit of tokens", positions: "reached the model's last position", stopped: "stopped" };
let job = null; // name of the playground
let state = null; // the playground, as the server tells
let number = null; // of the prompt that is answered
let left = null;
let served = null; // id in the host's inference of the model that the page talks to; null: the playground
let isAsking = false; // whether the page asks if another model should replace the loaded one
const RUNS = ["scheduled", "in_progress"];
// Whether the loaded model is what the address asks for: a bare job means one of its artifacts.
const isOf = (wanted, model) => ["", "/model", "/merged", "/adapter"].some((artifact) => model === `${wanted}${artifact}`)
  || (wanted.startsWith("/") && wanted.endsWith(`/${model}`)); // a path, which lists do not show

async function find() {
  const { owner } = await get("quota"); // an administrator's list has the playgrounds of others
  const found = await get("jobs", { recipe: "playground", state: RUNS, limit: 100 });
  return found.data.find((line) => line.owner === owner)?.job_uuid ?? null;
}

// Looks at the playground; returns its job, or nothing if there is none.
async function look() {
  const asked = job;
  if (asked === null || served !== null) return;
  try {
    const before = state;
    const found = await get(`jobs/${part(asked)}/prompts`);
    const about = await get(`jobs/${part(asked)}`);
    if (job !== asked || served !== null) return; // another one was started meanwhile
    state = found;
    draw(about);
    if (!before?.loaded && state.loaded) opened(before !== null);
    return about;
  } catch (error) {
    if (job !== asked) return;
    if (!(error instanceof ApiError) || error.status !== 404) { problem(error); return; }
    job = null;
    state = null;
    put(byId("standing"), note("info", `The playground ${asked} has been deleted. Start another to go on.`));
    put(byId("replace"));
    byId("ask").hidden = true;
  }
}

function draw(about) {
  const place = byId("standing");
  const loaded = state.loaded;
  const stage = about.resources_allocated?.stage;
  const what = loaded === null ? (state.is_open ? `${stage ?? "starting"} …` : null)
    : loaded.moe_layers.length ? `${loaded.moe_layers.length} layers of ${loaded.experts} experts, ${loaded.top_k} for each token` : "a dense model";
  const room = loaded?.positions ? `${count(loaded.positions)} positions` : null;
  put(place, h("div", { class: "head small" },
    h("div", { class: "grow" }, h("h2", {}, h("a", { href: jobPath(job), class: "name" }, about.model)),
      h("p", { class: "facts" }, isEnding() ? pill(state.status, "ending") : pill(state.status), what ? h("span", {}, what) : null, room ? h("span", {}, room) : null,
        state.is_open ? h("span", {}, `ends after ${duration(state.idle_s)} without a prompt`) : null)),
    state.is_open ? h("button", { type: "button", class: "danger", on: { click: end } }, "End") : null),
  state.is_open ? null : note(state.status === "failed" ? "bad" : "info", isEnding() ? "This playground takes no more prompts; it is ending." : about.reason ?? "This playground has ended. Start another to go on."));
  place.hidden = false;
  byId("ask").hidden = !state.is_open || isAsking;
  if (!state.is_open) put(byId("replace"));
}

// Closed to prompts, while the store does not have its end yet.
const isEnding = () => !state.is_open && RUNS.includes(state.status);

// The address asks for one model, and another is loaded: says so before somebody talks to the wrong one.
function offerToReplace(wanted, loaded) {
  isAsking = true;
  byId("ask").hidden = true;
  const chosen = () => { isAsking = false; put(byId("replace")); byId("ask").hidden = !state?.is_open; };
  put(byId("replace"), note("warn", h("p", {}, `Your playground has ${loaded}, not ${wanted}. You can have only one playground at a time.`),
    h("div", { class: "buttons" },
      h("button", { type: "button", class: "danger", on: { click: () => { chosen(); start(wanted, true); } } }, `Replace it with ${wanted}`),
      h("button", { type: "button", on: { click: chosen } }, `Keep ${loaded}`))));
}

// A job whose result the host's inference serves needs no playground to be talked to.
async function offerServed(wanted) {
  const model = wanted ? await servedAs(wanted) : null;
  if (served !== null || byId("model").value.trim() !== wanted) return; // chosen, or another name was typed meanwhile
  put(byId("served"), model === null ? null : note("info",
    h("p", {}, `This server's inference serves ${wanted} as ${model}. It answers without a playground, but has no adapter to switch off and does not tell its experts.`),
    h("div", { class: "buttons" }, h("button", { type: "button", on: { click: () => talkTo(model) } }, "Talk to the served model"))));
}

// Talks to a model of the host's inference from now on; null: to the playground again.
function talkTo(model) {
  if (byId("send").disabled) left?.abort(); // an answer of the other one still comes
  served = model;
  isAsking = false;
  for (const each of ["answers", "replace"]) put(byId(each));
  for (const each of document.querySelectorAll(".loaded")) each.hidden = model !== null;
  say(byId("said"), "");
  byId("standing").hidden = true;
  byId("ask").hidden = model === null;
  put(byId("served"), model === null ? null : note("info", h("p", {}, `You talk to ${model} in this server's inference.`),
    h("div", { class: "buttons" }, h("button", { type: "button", on: { click: () => talkTo(null) } }, "Back"))));
  if (model === null) look();
}

async function askServed() {
  const asked = prompt();
  const model = served;
  const text = h("pre", { tabindex: 0, role: "log", "aria-label": `Answer: ${model}` });
  const facts = h("p", { class: "muted" });
  const began = performance.now();
  const ended = (reason) => say(facts, `${((performance.now() - began) / 1000).toFixed(1)} s, ${ENDS[reason] ?? reason}`);
  problem(null);
  put(byId("answers"), h("section", { class: "card" }, h("h2", {}, model), text, facts));
  byId("send").disabled = true;
  byId("stop").disabled = false;
  say(byId("said"), "Answering …");
  left = new AbortController();
  try {
    for await (const piece of answered(model, asked, left.signal)) {
      if (piece.text === undefined) ended(piece.reason);
      else text.append(printable(piece.text));
    }
    say(byId("said"), "Answered.");
  } catch (error) {
    say(byId("said"), "");
    if (error.name === "AbortError") ended("stopped");
    else problem(error);
  }
  byId("send").disabled = false;
  byId("stop").disabled = true;
}

// What the loaded model can do decides what the form offers.
function opened(isNew) {
  const { has_adapter: hasAdapter, moe_layers: layers } = state.loaded;
  for (const option of byId("adapter").options) option.disabled = option.value !== "on" && !hasAdapter;
  byId("adapter").value = hasAdapter ? "both" : "on";
  byId("routing").disabled = layers.length === 0;
  byId("routing").checked = layers.length > 0;
  byId("max-tokens").max = state.max_new_tokens;
  byId("max-tokens").value = Math.min(256, state.max_new_tokens);
  if (isNew) toast("The playground is ready.");
}

async function end() {
  try {
    await post(`jobs/${part(job)}/cancel`);
    await look();
  } catch (error) { problem(error); }
}

async function start(model, replace = false) {
  problem(null);
  if (served !== null) talkTo(null);
  try {
    const made = await post("jobs", { recipe: "playground", model, playground: { replace } });
    job = made.job_uuid;
    state = null;
    put(byId("answers"));
    await look();
  } catch (error) {
    if (!(error instanceof ApiError) || error.status !== 409 || replace || !(await find())) { problem(error); return; }
    if (await question("Replace your playground?", h("p", {}, error.message), "Replace it", "danger")) await start(model, true);
  }
}

function side(name, layers) {
  const text = h("pre", { tabindex: 0, role: "log", "aria-label": `Answer: ${NAMES[name]}` });
  const facts = h("p", { class: "muted" });
  const strip = new Strip(`Experts: ${NAMES[name]}`, layers);
  return { name, text, facts, strip, element: h("section", { class: "card" }, h("h2", {}, NAMES[name]), text, facts, strip.element) };
}

function show(sides, piece) {
  const place = sides[piece.side];
  switch (piece.type) {
    case "begun": say(byId("said"), "Answering …"); break;
    case "text": place.text.append(printable(piece.text)); break;
    case "routed": place.strip.add(piece); break;
    case "answered":
      say(place.text, piece.text);
      say(place.facts, `${count(piece.tokens)} tokens in ${piece.seconds.toFixed(1)} s, ${ENDS[piece.reason]}`);
      break;
    case "ended": if (piece.error) problem(new ApiError(0, piece.error)); break;
    default: break; // of a later version
  }
}

function prompt() {
  const system = byId("system").value.trim();
  const messages = [{ role: "user", content: byId("prompt").value }];
  if (system) messages.unshift({ role: "system", content: system });
  return {
    messages, adapter: byId("adapter").value, seed: Number(byId("seed").value), temperature: Number(byId("temperature").value),
    max_tokens: Number(byId("max-tokens").value), routing: byId("routing").checked && !byId("routing").disabled,
  };
}

async function ask() {
  const asked = prompt();
  const path = `jobs/${part(job)}/prompts`;
  problem(null);
  byId("send").disabled = true;
  say(byId("said"), "Sent; it waits for its turn …");
  try {
    const sent = await post(path, asked);
    number = sent.number;
    const names = asked.adapter === "both" ? ["on", "off"] : [asked.adapter];
    const sides = Object.fromEntries(names.map((name) => [name, side(name, state.loaded?.moe_layers ?? [])]));
    put(byId("answers"), Object.values(sides).map((each) => each.element));
    byId("stop").disabled = false;
    left = new AbortController();
    for await (const { name, data } of follow(`${path}/${number}`, { signal: left.signal })) {
      if (name !== "end") for (const piece of data.pieces) show(sides, piece);
      else if (data.status === "failed") problem(new ApiError(0, (await get(`${path}/${number}`)).error));
    }
    say(byId("said"), "Answered.");
  } catch (error) {
    say(byId("said"), "");
    if (error.name !== "AbortError") problem(error); // it was withdrawn, or the page talks to another model now
  }
  byId("send").disabled = false;
  byId("stop").disabled = true;
  number = null;
  look();
}

byId("start").addEventListener("submit", (event) => { event.preventDefault(); start(byId("model").value.trim()); });
byId("model").addEventListener("change", () => { offerServed(byId("model").value.trim()).catch(problem); });
byId("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  if (byId("send").disabled) return;
  if (served === null) ask();
  else askServed();
});
byId("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) byId("ask").requestSubmit();
});
byId("stop").addEventListener("click", async () => {
  byId("stop").disabled = true;
  if (served !== null) { left.abort(); return; }
  try {
    const found = await remove(`jobs/${part(job)}/prompts/${number}`);
    if (found?.status === "withdrawn") left.abort();
  } catch (error) { problem(error); }
});

async function load() {
  const wanted = new URLSearchParams(location.search).get("of") ?? "";
  byId("model").value = wanted;
  try {
    job = await find();
    const done = await get("jobs", { state: "completed", limit: 200 });
    put(byId("known"), done.data.filter((line) => WRITE_TEXT.includes(line.recipe)).map((line) => h("option", { value: line.job_uuid })));
    const about = await look();
    if (wanted && about && state.is_open && !isOf(wanted, about.model)) offerToReplace(wanted, about.model);
    await offerServed(wanted);
  } catch (error) { problem(error); }
}
load();
every(2000, () => (job !== null && (state === null || state.is_open || isEnding()) ? look() : null));
