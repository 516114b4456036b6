// The same as sdk_script.py, with the npm SDK: node sdk_script.mjs URL MODE NAME BODIES, in a folder with node_modules.
import { createRequire } from "node:module";

const { LlamaStackClient, NotFoundError } = createRequire(process.cwd() + "/")("llama-stack-client");
const [url, , name, given] = process.argv.slice(2);
const bodies = JSON.parse(given);
const client = new LlamaStackClient({ baseURL: url, maxRetries: 0 });
const api = client.postTraining;

async function until(job_uuid, states) {
  for (let tries = 0; tries < 1200; tries += 1) {
    const { status } = await api.job.status({ job_uuid });
    if (states.includes(status)) return status;
    await new Promise((resolve) => setTimeout(resolve, 100));
  }
  throw new Error(`${job_uuid} is not one of ${states}`);
}

const slow = `slow-${name}`;
const quick = `quick-${name}`;
const found = { style: "job_uuid", resource: "client.postTraining" };
found.sft = (await api.supervisedFineTune({ ...bodies.sft, job_uuid: slow })).job_uuid === slow;
found.status = await until(slow, ["in_progress", "completed"]);
await api.job.cancel({ job_uuid: slow });
found.cancelled = await until(slow, ["cancelled"]);
found.dpo = (await api.preferenceOptimize({ ...bodies.dpo, job_uuid: quick })).job_uuid === quick;
found.completed = await until(quick, ["completed", "failed"]);
found.artifacts = (await api.job.artifacts({ job_uuid: quick })).checkpoints.length;
const listed = (await api.job.list()).map((each) => each.job_uuid);
found.listed = listed.includes(slow) && listed.includes(quick);
try {
  await api.job.status({ job_uuid: "no-such-job" });
} catch (error) {
  found.error = error instanceof NotFoundError && String(error).includes("no-such-job");
}
console.log(JSON.stringify(found));
