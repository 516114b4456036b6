// A job's log and its events, as they come.

import { follow, get } from "./api.js";
import { h, printable, put, say } from "./dom.js";
import { moment } from "./format.js";
import { problem } from "./shell.js";

const MOST_LINES = 5000;

export function log(panel, { path }) {
  const left = new AbortController();
  const lines = [];
  const find = h("input", { id: "find", type: "search", spellcheck: "false", on: { input: draw } });
  const stick = h("input", { type: "checkbox", checked: true, id: "stick", on: { change: draw } });
  const output = h("pre", { class: "log", tabindex: 0, role: "log", "aria-label": "Output of the job" });
  const status = h("p", { class: "muted", role: "status" }, "Waiting for output …");
  put(panel, h("div", { class: "filters" },
    h("div", { class: "field grow" }, h("label", { for: "find" }, "Lines with"), find),
    h("label", { class: "check" }, stick, " Stay at the end")), output, status);
  let due = 0;

  function draw() {
    if (due) return;
    due = requestAnimationFrame(() => {
      due = 0;
      const wanted = find.value.toLowerCase();
      const found = wanted ? lines.filter((line) => line.toLowerCase().includes(wanted)) : lines;
      output.textContent = printable(found.join("\n"));
      if (stick.checked) output.scrollTop = output.scrollHeight;
    });
  }

  async function run() {
    for await (const { name, data } of follow(`${path}/logs`, { query: { tail: 2000 }, signal: left.signal })) {
      if (name === "end") { say(status, lines.length ? "The job has ended; this is all of its output." : "The job has written nothing."); return; }
      lines.push(...data.log_lines);
      if (lines.length > MOST_LINES) lines.splice(0, lines.length - MOST_LINES);
      say(status, "New lines appear here.");
      draw();
    }
  }
  run().catch((error) => { say(status, ""); problem(error); });
  return () => { left.abort(); cancelAnimationFrame(due); };
}

const PAGE = 200;
const OFTEN = new Set(["step", "routing", "progress"]);
const TYPES = ["started", "resumed", "plan", "evaluation", "assessed", "saved", "export", "message", "failed", "cancelled", "finished", "progress", "step", "routing"];

function summary(event) {
  switch (event.type) {
    case "message": case "failed": return event.text ?? event.reason;
    case "started": return Object.entries(event.versions ?? {}).map(([name, version]) => `${name} ${version}`).join(", ");
    case "resumed": return event.checkpoint ? `from ${event.checkpoint}, step ${event.step}` : "from the beginning";
    case "progress": return `${event.stage}: ${event.done}${event.total ? ` of ${event.total}` : ""} ${event.unit}`;
    case "saved": return event.artifact?.identifier ?? "";
    case "export": return `${event.step}: ${event.state}${event.reason ? `, ${event.reason}` : ""}`;
    case "evaluation": case "step": return `step ${event.step}`;
    default: return event.step === undefined ? "" : `step ${event.step}`;
  }
}

export function events(panel, { path }) {
  const left = new AbortController();
  const often = h("input", { type: "checkbox", id: "often", on: { change: () => { cursor = 0; list.replaceChildren(); load(); } } });
  const list = h("ol", { class: "events" });
  const more = h("button", { type: "button", on: { click: () => load() } }, "Later events");
  const status = h("p", { class: "muted", role: "status" });
  let cursor = 0;
  put(panel, h("div", { class: "filters" }, h("label", { class: "check" }, often, " Also steps, routing and progress")), list, h("div", { class: "buttons" }, more), status);

  async function load() {
    more.disabled = true;
    try {
      const types = TYPES.filter((type) => often.checked || !OFTEN.has(type)).join(",");
      const found = await get(`${path}/events`, { cursor, limit: PAGE, types }, left.signal);
      const moved = found.cursor !== cursor;
      cursor = found.cursor;
      list.append(...found.events.map((event) => h("li", { "data-type": event.type },
        h("details", {}, h("summary", {}, h("time", { datetime: event.time }, moment(event.time)), h("b", {}, event.type), h("span", {}, summary(event))),
          h("pre", { tabindex: 0 }, JSON.stringify(event, null, 2))))));
      const unread = found.unreadable ? ` ${found.unreadable} lines can't be read.` : "";
      say(status, (list.children.length ? `${list.children.length} events.` : "No events yet.") + (moved ? "" : " No later ones so far.") + unread);
    } catch (error) { problem(error); }
    more.disabled = false;
  }
  load();
  return () => left.abort();
}
