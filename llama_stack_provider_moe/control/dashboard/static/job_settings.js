// A job's settings against the defaults, and what was decided from the model.

import { facts, h, prose, put, table } from "./dom.js";
import { shown } from "./format.js";
import { fieldOf, leaves, same, schema } from "./schema.js";
import { problem } from "./shell.js";

export function settings(panel, { job }) {
  const only = h("input", { type: "checkbox", checked: true, id: "only", on: { change: draw } });
  const place = h("div");
  let whole = null;
  put(panel, h("div", { class: "filters" }, h("label", { class: "check" }, only, " Only settings that differ from the defaults")), place);

  function draw() {
    const { spec, recipe, resolved } = job();
    if (!spec || spec.unreadable) { put(place, h("p", { class: "empty" }, spec?.unreadable ?? "This job has no settings.")); return; }
    const found = leaves(spec).map(([path, value]) => {
      const field = fieldOf(whole, recipe, path)?.field ?? null;
      const usual = field?.default;
      const differs = !["job_uuid", "recipe"].includes(path[0]) && (usual === undefined ? value !== null && !same(value, {}) && !same(value, []) : !same(value, usual));
      return { name: path.join("."), value, usual, differs, about: field?.description ?? "" };
    }).filter(({ differs }) => differs || !only.checked);
    put(place,
      h("h2", {}, "Settings"),
      found.length ? table("Settings of this job", ["Setting", "Value", "Default", "Meaning"], found.map(({ name, value, usual, differs, about }) => [
        h("code", {}, name), h("code", { class: differs ? "differs" : "" }, shown(value)), usual === undefined ? "none" : h("code", {}, shown(usual)), prose(about)]), { classes: "settings" })
        : h("p", { class: "empty" }, "All settings are the defaults."),
      resolved && h("h2", {}, "Decided from the model"),
      resolved && decided(resolved));
  }

  schema().then((found) => { whole = found; draw(); }, problem);
}

function decided(resolved) {
  const simple = Object.entries(resolved).filter(([, value]) => value !== null && typeof value !== "object");
  return h("div", {}, facts(simple.map(([name, value]) => [name.replaceAll("_", " "), shown(value)])),
    h("details", {}, h("summary", {}, "All of it"), h("pre", { tabindex: 0 }, JSON.stringify(resolved, null, 2))));
}
