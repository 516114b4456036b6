// What can be done with a job: cancel, resume, export, clone, delete.

import { part, post, remove } from "./api.js";
import { h, note, prose } from "./dom.js";
import { actButton } from "./pieces.js";
import { BASE, jobPath, question, toast } from "./shell.js";
import { WRITE_TEXT } from "./recipes.js";
import { kind, schema } from "./schema.js";


export function actions(job, changed) {
  const id = part(job.job_uuid);

  async function cancel() {
    const sure = await question("Cancel this job?", h("p", {}, "It finishes its step and saves a checkpoint, so that you can resume it."), "Cancel the job", "danger");
    if (!sure) return;
    await post(`jobs/${id}/cancel`);
    toast("The job is asked to stop.");
    await changed();
  }

  async function resume() {
    const found = await post(`jobs/${id}/resume`);
    const from = { from_checkpoint: "its last checkpoint", from_completed_steps: "its completed steps", from_beginning: "the beginning" }[found.resumes] ?? found.resumes;
    toast(`The job waits to run again, from ${from}.`);
    await changed();
  }

  async function exported() {
    const whole = await schema();
    const fields = Object.entries(whole.$defs?.Exports?.properties ?? {});
    const input = h("textarea", { id: "export-body", rows: 8, spellcheck: "false" });
    input.value = JSON.stringify({ merged: true }, null, 2);
    const content = h("div", {}, h("p", {}, "Makes files for serving from this job's result, in a job of its own."),
      h("label", { for: "export-body" }, "Export, as JSON"), input,
      h("details", {}, h("summary", {}, "Fields"), h("dl", { class: "pairs" }, fields.map(([name, field]) => [h("dt", {}, h("code", {}, name)), h("dd", {}, prose(field.description ?? ""), h("span", { class: "sub" }, kind(whole, field)))]))));
    let made = null;
    const sure = await question("Export this job", content, "Export", "primary", async () => {
      let body = null;
      try { body = JSON.parse(input.value); } catch (error) { throw new Error(`That is not JSON: ${error.message}`, { cause: error }); }
      made = await post(`jobs/${id}/exports`, body);
    });
    if (!sure) return;
    location.href = jobPath(made.job_uuid);
  }

  async function deleted() {
    const exports = (job.resources_allocated?.exports ?? []).map((each) => each.job_uuid).filter((each) => each !== job.job_uuid);
    const sure = await question(`Delete ${job.job_uuid}?`, h("div", {}, h("p", {}, "Its folder goes, with checkpoints, results and log. This can't be undone."),
      exports.length ? h("p", {}, `Its exports go with it: ${exports.join(", ")}.`) : null), "Delete", "danger");
    if (!sure) return;
    try {
      await remove(`jobs/${id}`);
    } catch (error) {
      if (error.status !== 409) throw error;
      const anyway = await question("Other jobs need it", h("div", {}, note("warn", error.message), h("p", {}, "If you delete it anyway, those jobs can no longer be resumed or exported.")), "Delete anyway", "danger");
      if (!anyway) return;
      await remove(`jobs/${id}`, { force: true });
    }
    location.href = BASE;
  }

  const runs = ["scheduled", "in_progress"].includes(job.status);
  return [
    job.status === "completed" && WRITE_TEXT.includes(job.recipe) ? h("a", { class: "button", href: `${BASE}/playground?of=${id}` }, "Try it") : null,
    h("a", { class: "button", href: `${BASE}/compare?jobs=${id}` }, "Compare"),
    job.recipe === "export" ? null : h("a", { class: "button", href: `${BASE}/new?from=${id}` }, "Clone"),
    job.status === "completed" && WRITE_TEXT.includes(job.recipe) ? actButton("Export", exported) : null,
    ["failed", "cancelled"].includes(job.status) ? actButton("Resume", resume, "primary") : null,
    runs && !job.cancel_requested_at ? actButton("Cancel", cancel, "danger") : null,
    runs ? null : actButton("Delete", deleted, "danger"),
  ];
}
