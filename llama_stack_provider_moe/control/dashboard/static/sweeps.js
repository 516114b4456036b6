// The caller's sweeps, newest first.

import { h } from "./dom.js";
import { ago, moment } from "./format.js";
import { jobCounts, listGroups } from "./groups.js";
import { pill } from "./pieces.js";
import { sweepPath } from "./shell.js";

function row(each) {
  return [h("a", { href: sweepPath(each.sweep_uuid), class: "name" }, each.sweep_uuid), pill(each.status), jobCounts(each.jobs),
    h("span", {}, h("code", {}, each.metric), h("span", { class: "sub" }, each.direction === "minimize" ? "smaller is better" : "larger is better")),
    h("time", { datetime: each.created_at, title: moment(each.created_at) }, ago(each.created_at))];
}

listGroups({ kind: "sweep", heads: ["Sweep", "State", "Jobs", "Ranked by", "Created"], row,
  command: ["Start one under New job, or with ", h("code", {}, "moe-train sweep"), "."] });
