// What pages of sweeps and pipelines have in common: the list, and the questions before a group is cancelled or deleted.

import { get, part, post, remove } from "./api.js";
import { byId, h, note, put, say, table } from "./dom.js";
import { stateWord } from "./format.js";
import { BASE, every, problem, question, toast } from "./shell.js";

const PAGE = 50;

export const jobCounts = (jobs) => Object.entries(jobs).filter(([, number]) => number).map(([state, number]) => `${number} ${stateWord(state)}`).join(", ");

// `kind`: sweep or pipeline; `command`: what starts one; `row`: the cells of one.
export function listGroups({ kind, heads, row, command }) {
  let after = null, drawn = "";
  async function load() {
    try {
      const found = await get(`${kind}s`, { limit: PAGE, after });
      problem(null);
      byId("older").disabled = !found.has_more;
      byId("newest").disabled = after === null;
      byId("older").dataset.after = found.data.at(-1)?.[`${kind}_uuid`] ?? "";
      const key = JSON.stringify(found.data) + Math.floor(Date.now() / 60000);
      if (drawn === key) return;
      drawn = key;
      put(byId("content"), found.data.length ? table(`${heads[0]}s, newest first`, heads, found.data.map(row), { classes: "card" })
        : h("p", { class: "empty" }, h("strong", {}, `No ${kind}s yet. `), ...command));
      say(byId("range"), found.data.length ? `${found.data.length} ${kind}${found.data.length === 1 ? "" : "s"}` : "");
    } catch (error) { problem(error); }
  }
  byId("older").addEventListener("click", () => { after = byId("older").dataset.after; load(); });
  byId("newest").addEventListener("click", () => { after = null; load(); });
  load();
  every(5000, load);
}

export async function cancelGroup(kind, id, load) {
  const sure = await question(`Cancel this ${kind}?`, h("p", {}, "Its waiting jobs are cancelled at once. Running ones finish their step and save a checkpoint, so that you can resume them."), `Cancel the ${kind}`, "danger");
  if (!sure) return;
  await post(`${kind}s/${part(id)}/cancel`);
  toast(`All jobs of the ${kind} are asked to stop.`);
  await load();
}

export async function deleteGroup(kind, id, jobs) {
  const sure = await question(`Delete ${id}?`, h("p", {}, `Its ${jobs} jobs go with it, with their checkpoints, results and logs. This can't be undone.`), "Delete", "danger");
  if (!sure) return;
  const path = `${kind}s/${part(id)}`;
  try {
    await remove(path);
  } catch (error) {
    if (error.status !== 409) throw error;
    const anyway = await question("Other jobs need them", h("div", {}, note("warn", error.message), h("p", {}, "If you delete it anyway, those jobs can no longer be resumed or exported.")), "Delete anyway", "danger");
    if (!anyway) return;
    await remove(path, { force: true });
  }
  location.href = `${BASE}/${kind}s`;
}
