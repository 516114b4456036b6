// The same as openai_script.py, with the npm package: node openai_script.mjs URL MODE NAME GIVEN, in a folder with
// node_modules. It also prints each answer, which the test gives to the TypeScript compiler.
import { createRequire } from "node:module";

const { default: OpenAI, NotFoundError, BadRequestError, toFile } = createRequire(process.cwd() + "/")("openai");
const [url, , name, text] = process.argv.slice(2);
const given = JSON.parse(text);
const answers = [];

async function recorded(address, options) {
  const answer = await fetch(address, options);
  const kind = answer.headers.get("content-type") ?? "";
  if (String(address).includes("/fine_tuning/") && kind.startsWith("application/json")) {
    answers.push(await answer.clone().json());
  }
  return answer;
}

const settings = { apiKey: "none", maxRetries: 0, fetch: recorded };
const client = new OpenAI({ ...settings, baseURL: `${url}/v1` });
const { jobs } = client.fineTuning;

async function until(id, states) {
  for (let tries = 0; tries < 1200; tries += 1) {
    const job = await jobs.retrieve(id);
    if (states.includes(job.status)) return job;
    await new Promise((resolve) => setTimeout(resolve, 100));
  }
  throw new Error(`${id} is not one of ${states}`);
}

async function all(list) {
  const found = [];
  for await (const each of list) found.push(each);
  return found;
}

const found = { uploaded: "rows" in given };
let file = given.training_file;
if (file === undefined) {
  const rows = await toFile(Buffer.from(given.rows), "rows.jsonl");
  file = (await client.files.create({ file: rows, purpose: "fine-tune" })).id;
}
const asked = { model: given.model, training_file: file };

const slow = await jobs.create({ ...asked, suffix: `slow-${name}` });
found.created = slow.id.startsWith("ftjob-") && ["queued", "running"].includes(slow.status);
for (let tries = 0; !found.events && tries < 1200; tries += 1) {
  found.events = (await all(jobs.listEvents(slow.id, { limit: 5 }))).some((event) => event.type === "metrics");
  await new Promise((resolve) => setTimeout(resolve, 100));
}
await jobs.pause(slow.id);
found.paused = (await until(slow.id, ["cancelled"])).status;
found.checkpoints = (await all(jobs.checkpoints.list(slow.id))).length;
found.resumed = ["queued", "running"].includes((await jobs.resume(slow.id)).status);
await jobs.cancel(slow.id);
found.cancelled = (await until(slow.id, ["cancelled"])).status;

const method = { type: "supervised", supervised: { hyperparameters: { n_epochs: 2, batch_size: "auto" } } };
let quick = await jobs.create({ ...asked, suffix: `quick-${name}`, method, metadata: { of: name }, seed: 3 });
quick = await until(quick.id, ["succeeded", "failed"]);
found.succeeded = quick.status === "succeeded" && `ftjob-${quick.fine_tuned_model}` === quick.id;
const listed = await all(jobs.list({ metadata: { of: name } }));
found.listed = listed.length === 1 && listed[0].id === quick.id;
const files = new OpenAI({ ...settings, baseURL: `${url}/v1/fine_tuning` }).files;
found.result_file = (await (await files.content(quick.result_files[0])).text()).startsWith("step,");

const errors = [];
try {
  await jobs.retrieve("ftjob-no-such-job");
} catch (error) {
  errors.push(error instanceof NotFoundError && error.code === "not_found");
}
try {
  await jobs.create({ ...asked, moe: { adaptor: {} } });
} catch (error) {
  errors.push(error instanceof BadRequestError && error.code === "invalid_value" && error.param === "moe.adaptor");
}
found.errors = errors.length === 2 && errors.every(Boolean);
console.log(JSON.stringify({ ...found, answers }));
