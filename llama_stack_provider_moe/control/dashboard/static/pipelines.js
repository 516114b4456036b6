// The caller's pipelines, newest first.

import { h } from "./dom.js";
import { ago, moment } from "./format.js";
import { jobCounts, listGroups } from "./groups.js";
import { pill } from "./pieces.js";
import { pipelinePath } from "./shell.js";

function row(each) {
  return [h("a", { href: pipelinePath(each.pipeline_uuid), class: "name" }, each.pipeline_uuid), pill(each.status), jobCounts(each.jobs),
    h("time", { datetime: each.created_at, title: moment(each.created_at) }, ago(each.created_at))];
}

listGroups({ kind: "pipeline", heads: ["Pipeline", "State", "Jobs", "Created"], row,
  command: ["Start one with ", h("code", {}, "moe-train pipeline"), "."] });
