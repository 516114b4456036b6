// The caller's sweeps, newest first.

import { get } from "./api.js";
import { byId, h, put, say, table } from "./dom.js";
import { ago, moment, stateWord } from "./format.js";
import { pill } from "./pieces.js";
import { every, problem, sweepPath } from "./shell.js";

const PAGE = 50;
let after = null;
let drawn = "";

const jobCounts = (jobs) => Object.entries(jobs).filter(([, number]) => number).map(([state, number]) => `${number} ${stateWord(state)}`).join(", ");

function row(each) {
  return [h("a", { href: sweepPath(each.sweep_uuid), class: "name" }, each.sweep_uuid), pill(each.status), jobCounts(each.jobs),
    h("span", {}, h("code", {}, each.metric), h("span", { class: "sub" }, each.direction === "minimize" ? "smaller is better" : "larger is better")),
    h("time", { datetime: each.created_at, title: moment(each.created_at) }, ago(each.created_at))];
}

async function load() {
  try {
    const found = await get("sweeps", { limit: PAGE, after });
    problem(null);
    byId("older").disabled = !found.has_more;
    byId("newest").disabled = after === null;
    byId("older").dataset.after = found.data.at(-1)?.sweep_uuid ?? "";
    const key = JSON.stringify(found.data) + Math.floor(Date.now() / 60000);
    if (drawn === key) return;
    drawn = key;
    put(byId("content"), found.data.length ? table("Sweeps, newest first", ["Sweep", "State", "Jobs", "Ranked by", "Created"], found.data.map(row), { classes: "card" })
      : h("p", { class: "empty" }, h("strong", {}, "No sweeps yet. "), "Start one under New job, or with ", h("code", {}, "moe-train sweep"), "."));
    say(byId("range"), found.data.length ? `${found.data.length} ${found.data.length === 1 ? "sweep" : "sweeps"}` : "");
  } catch (error) { problem(error); }
}

byId("older").addEventListener("click", () => { after = byId("older").dataset.after; load(); });
byId("newest").addEventListener("click", () => { after = null; load(); });
load();
every(5000, load);
