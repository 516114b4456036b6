// Checkpoints, artifacts and exports of a job, with downloads.

import { address, get, part, request, token } from "./api.js";
import { facts, h, note, put, table } from "./dom.js";
import { bytes, count, figure, moment, shown } from "./format.js";
import { pill } from "./pieces.js";
import { leaves } from "./schema.js";
import { every, jobPath, problem, toast } from "./shell.js";

const EVERY_MS = 3000;
const RUNS = ["scheduled", "in_progress"];
const LARGE = 1e9; // a browser that sends a token must hold the file in memory

export function artifacts(panel, { id, path, job }) {
  const made = h("div");
  const exports = h("div");
  put(panel, made, exports);

  let drawn = "";

  function drawMade(checkpoints) {
    const key = JSON.stringify(checkpoints.map(({ identifier, sha256 }) => [identifier, sha256]));
    if (drawn === key) return; // what somebody has opened stays open
    drawn = key;
    put(made, h("h2", {}, "Checkpoints and results"), checkpoints.length ? checkpoints.map((each) => artifact(each)) : h("p", { class: "empty" }, "Nothing is saved yet."),
      checkpoints.length ? h("p", { class: "muted" }, "In a terminal: ", h("code", {}, `moe-train artifacts ${id} --pull DIR`), " downloads and verifies all of it.") : null,
      h("section", { class: "card" }, h("div", { class: "head small" },
        h("div", { class: "grow" }, h("b", {}, "report.html"), h("span", { class: "sub" }, "one file about the job for people who were not there, as it stands now")),
        download(`${path}/report`, { path: "report.html", bytes: 0 }))));
  }

  function artifact(each) {
    const list = h("div");
    const open = h("details", { class: "card artifact", on: { toggle: () => { if (open.open && !list.children.length) files(list, each); } } },
      h("summary", {}, h("span", { class: "grow" }, h("b", {}, each.name), h("span", { class: "sub" }, `${each.kind}, step ${count(each.step)}, ${moment(each.created_at)}`)),
        each.training_metrics ? h("span", { class: "number" }, h("span", { class: "sub" }, "held-out loss "), figure(each.training_metrics.validation_loss)) : null,
        h("span", { class: "number" }, bytes(each.bytes))),
      list,
      each.verification ? verified(each.verification) : null);
    return open;
  }

  // The comparisons that the artifact passed, as pairs of a name and a figure.
  function verified(found) {
    return h("div", {}, h("h3", {}, "Verified before it was listed"), facts(leaves(found).map(([names, value]) => [
      names.join(", ").replaceAll("_", " "), typeof value === "number" ? figure(value) : shown(value)])));
  }

  async function files(list, each) {
    put(list, h("p", { class: "muted" }, "…"));
    try {
      const found = await get(`${path}/artifacts/${part(each.name)}`);
      put(list, table(`Files of ${each.name}`, ["File", "Size", "SHA-256", ""], found.files.map((file) => [
        h("code", {}, file.path), bytes(file.bytes), h("code", { title: file.sha256 }, file.sha256.slice(0, 12)),
        download(`${path}/artifacts/${part(each.name)}/${file.path.split("/").map(part).join("/")}`, file)])));
    } catch (error) { put(list); problem(error); }
  }

  function download(where, file) {
    const name = file.path.split("/").pop();
    if (!token()) return h("a", { href: address(where), download: name }, "Download");
    return h("button", { type: "button", class: "quiet", on: { click: async (event) => {
      if (file.bytes > LARGE) { toast(`${name} is large: use moe-train artifacts ${id} --pull DIR`, "bad"); return; }
      event.target.disabled = true;
      try {
        const link = URL.createObjectURL(await (await request("GET", where)).blob());
        h("a", { href: link, download: name }).click();
        setTimeout(() => URL.revokeObjectURL(link), 60000);
      } catch (error) { problem(error); }
      event.target.disabled = false;
    } } }, "Download");
  }

  let drawnExports = "";

  function drawExports(found) {
    const key = JSON.stringify(found);
    if (drawnExports === key) return;
    drawnExports = key;
    put(exports, h("h2", {}, "Exports"), found.length ? found.map((each) => h("section", { class: "card" },
      h("div", { class: "head small" }, h("h3", {}, each.job_uuid === id ? "Steps" : h("a", { href: jobPath(each.job_uuid), class: "name" }, each.job_uuid)), pill(each.status)),
      each.reason ? note(each.status === "failed" ? "bad" : "info", each.reason) : null,
      each.steps.length ? table(`Steps of ${each.job_uuid}`, ["Step", "State", "What was done", "Artifact", "Figures"], each.steps.map((step) => [
        step.name, pill(step.state), step.reason ?? step.note ?? "", step.artifact ?? "",
        step.figures ? h("details", {}, h("summary", {}, "figures"), h("pre", { tabindex: 0 }, JSON.stringify(step.figures, null, 2))) : ""]))
        : h("p", { class: "muted" }, "Its steps show once it has begun."))) : h("p", { class: "empty" }, "No exports."));
  }

  const left = new AbortController();

  async function load() {
    try {
      const [steps, saved] = await Promise.all([get(`${path}/exports`, {}, left.signal), get(`${path}/artifacts`, {}, left.signal)]);
      runs = [job().status, ...steps.data.map((each) => each.status)].some((status) => RUNS.includes(status));
      drawExports(steps.data);
      drawMade(saved.checkpoints);
    } catch (error) { problem(error); }
  }

  let runs = true;
  drawMade(job().checkpoints ?? []);
  load();
  const stop = every(EVERY_MS, () => (runs ? load() : null));
  return () => { stop(); left.abort(); };
}
