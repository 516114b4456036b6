// A result of a job that the host's inference serves: its name there, and answers from it.

import { ApiError, get, parsed, part, request } from "./api.js";

// The id of the model in the host's inference, or null: the job is not served, or the name is not that of a job.
export async function servedAs(name) {
  if (!/^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$/.test(name)) return null; // JOB/NAME is one artifact, which may be another
  const jobs = (await get("jobs", { text: name, state: "completed", limit: 100 })).data; // the name of a model is no job's
  if (!jobs.some((each) => each.job_uuid === name)) return null;
  const exports = (await get(`jobs/${part(name)}/exports`)).data;
  return exports.find((each) => each.served_as)?.served_as ?? null;
}

// The answer to a conversation as it comes: pieces of text, then why it ended.
export async function* answered(model, asked, signal) {
  const body = {
    model, messages: asked.messages, temperature: asked.temperature, seed: asked.seed, max_tokens: asked.max_tokens, stream: true,
  };
  const answer = await request("POST", "/v1/chat/completions", { body, signal, more: { Accept: "text/event-stream" } });
  let reason = null;
  for await (const { data } of parsed(answer.body)) {
    if (data === null) break;
    if (data.error) throw new ApiError(data.error.code ?? 500, String(data.error.message ?? data.error));
    const choice = data.choices?.[0];
    if (choice?.delta?.content) yield { text: choice.delta.content };
    reason = choice?.finish_reason ?? reason;
  }
  if (reason === null) throw new ApiError(0, "the answer broke off; ask again");
  yield { reason };
}
