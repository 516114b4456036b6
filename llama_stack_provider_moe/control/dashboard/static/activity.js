// What runs on which device with its use and memory, and the queue in its order; it follows the server.

import { get } from "./api.js";
import { h, put, say } from "./dom.js";
import { bytes, count } from "./format.js";
import { every, jobPath, problem } from "./shell.js";

const EVERY_MS = 5000;
const KEY = "moe-activity";
const link = (id) => h("a", { href: jobPath(id), class: "name" }, id);
const cores = (value) => (value === null ? null : `${Number(value.toPrecision(2))} ${value === 1 ? "core" : "cores"}`);

function meter(label, share, text) {
  return h("div", { class: "use" }, h("span", {}, label), h("meter", { min: 0, max: 1, value: share, "aria-label": `${label}: ${text}` }), h("span", {}, text));
}

function device(each) {
  const holder = each.job_uuid ? link(each.job_uuid) : each.is_taken ? "a job of another owner" : "free";
  return h("li", { class: "device", "data-taken": String(each.is_taken) },
    h("h3", {}, `GPU ${each.device}`, each.name ? h("span", { class: "sub" }, each.name) : null),
    h("p", {}, holder),
    each.use === null ? null : meter("Use", each.use, `${Math.round(each.use * 100)}%`),
    each.memory_bytes === null || !each.total_bytes ? null : meter("Memory", each.memory_bytes / each.total_bytes, `${bytes(each.memory_bytes)} of ${bytes(each.total_bytes)}`),
    each.use === null && each.memory_bytes === null ? h("p", { class: "sub" }, "not measured on the server's machine") : null);
}

function running(each) {
  const step = each.step === null || each.max_steps === null ? "" : `step ${count(each.step)} of ${count(each.max_steps)}`;
  const machine = each.cpu === null ? "" : `${cores(each.cpu)}, ${bytes(each.memory_bytes)} of memory`;
  return h("li", {}, link(each.job_uuid), h("span", { class: "sub" }, [each.stage, step, each.devices ? `GPU ${each.devices}` : "", machine].filter(Boolean).join(" · ")));
}

function waiting(each) {
  const gpus = each.gpus === null ? "" : each.gpus === 0 ? "on the CPU" : `${each.gpus} GPU${each.gpus === 1 ? "" : "s"}`;
  return h("li", { value: each.position }, link(each.job_uuid), h("span", { class: "sub" }, [each.recipe.replaceAll("_", " "), gpus, each.sweep ? `sweep ${each.sweep}` : "", each.pipeline ? `pipeline ${each.pipeline}` : "", each.waits_for.length ? `waits for ${each.waits_for.join(", ")}` : ""].filter(Boolean).join(" · ")));
}

function summary({ devices, running: runs, waiting: waits, more_waiting: more }) {
  const taken = devices.filter((each) => each.is_taken).length;
  const gpus = devices.length ? `${taken} of ${devices.length} GPU${devices.length === 1 ? "" : "s"} in use` : "no GPU";
  return `${gpus} · ${runs.length} of your jobs run · ${waits.length + more} wait`;
}

// Draws into `place` and asks again every few seconds while the panel is open.
export function activity(place) {
  const words = h("span", { class: "sub" });
  const content = h("div", { class: "activity" });
  const panel = h("details", { class: "card", on: { toggle } }, h("summary", {}, h("h2", {}, "Devices and queue"), words), content);
  put(place, panel);
  let drawn = "";
  try { panel.open = localStorage.getItem(KEY) !== "closed"; } catch { panel.open = true; }
  let known = panel.open; // the browser also tells of the line above, and nobody chose that

  function toggle() {
    if (panel.open === known) return;
    known = panel.open;
    try { localStorage.setItem(KEY, panel.open ? "open" : "closed"); } catch { /* storage is off: for this page alone */ }
    if (panel.open && drawn) load();
  }

  function draw(found) {
    const key = JSON.stringify(found);
    if (drawn === key) return;
    drawn = key;
    say(words, summary(found));
    put(content,
      h("div", {}, h("h3", {}, "Devices"), found.devices.length ? h("ul", { class: "devices", "aria-label": "Devices" }, found.devices.map(device))
        : h("p", { class: "muted" }, "The server found no GPU that jobs may use. Jobs run on the machine's processors.")),
      h("div", {}, h("h3", {}, "Running"), found.running.length ? h("ul", { class: "plain-list", "aria-label": "Running jobs" }, found.running.map(running)) : h("p", { class: "muted" }, "None of your jobs runs.")),
      h("div", {}, h("h3", {}, "Queue"), found.waiting.length ? h("ol", { class: "plain-list queue", "aria-label": "Queue" }, found.waiting.map(waiting)) : h("p", { class: "muted" }, "None of your jobs waits."),
        found.more_waiting ? h("p", { class: "sub" }, `and ${count(found.more_waiting)} more`) : null));
  }

  async function load() {
    try {
      draw(await get("activity"));
      place.hidden = false;
    } catch (error) { problem(error); }
  }
  load();
  every(EVERY_MS, () => (panel.open ? load() : null));
}
