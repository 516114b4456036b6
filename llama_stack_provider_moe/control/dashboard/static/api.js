// The server's own HTTP API, with the caller's token.

const { api: API, base: BASE } = document.body.dataset;
const HOST = BASE.slice(0, -"/moe".length); // where the host's own API begins
const KEY = "moe-token";

export class ApiError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

export const token = () => sessionStorage.getItem(KEY);
export function setToken(value) {
  if (value) sessionStorage.setItem(KEY, value);
  else sessionStorage.removeItem(KEY);
}

// Asks the person for a token; the shell sets it. One dialogue for all requests that wait.
let ask = async () => false;
let asking = null;
let isLost = false; // whether the last request got no answer
export function askWith(dialogue) { ask = dialogue; }
function askOnce(why) {
  asking ??= ask(why).finally(() => { asking = null; });
  return asking;
}

// The address of a path of the post-training API; a path with a slash in front is one of the host's API.
export function address(path, query = {}) {
  const found = new URLSearchParams();
  for (const [name, value] of Object.entries(query)) {
    for (const each of Array.isArray(value) ? value : [value]) {
      if (each !== null && each !== undefined && each !== "") found.append(name, each);
    }
  }
  const words = found.toString();
  return `${path.startsWith("/") ? `${HOST}${path}` : `${API}/${path}`}${words ? `?${words}` : ""}`;
}

export const part = encodeURIComponent;

export function headers(more = {}) {
  const mine = token();
  return mine ? { ...more, Authorization: `Bearer ${mine}` } : more;
}

async function failure(answer) {
  let message = `the server answered ${answer.status}`;
  try {
    const content = await answer.json();
    message = content?.error?.message ?? content?.detail ?? message;
  } catch { /* not JSON: a proxy's page */ }
  return new ApiError(answer.status, String(message));
}

// The answer to a request. A token that the server wants is asked for, and the request is sent again.
export async function request(method, path, { query, body, signal, more } = {}) {
  for (;;) {
    const used = token();
    const given = body === undefined ? {} : { "Content-Type": "application/json" };
    let answer;
    try {
      answer = await fetch(address(path, query), {
        method, signal, headers: headers({ ...given, ...more }), cache: "no-store",
        body: body === undefined ? undefined : JSON.stringify(body),
      });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      isLost = true;
      throw Object.assign(new ApiError(0, "the server does not answer"), { isUnreachable: true });
    }
    if (isLost) {
      isLost = false;
      document.dispatchEvent(new Event("moe-reached"));
    }
    if (answer.ok) return answer;
    const problem = await failure(answer);
    if (answer.status !== 401) throw problem;
    if (token() === used && !(await askOnce(used ? problem.message : ""))) throw problem;
  }
}

export const get = async (path, query, signal) => (await request("GET", path, { query, signal })).json();
export const post = async (path, body, query) => (await request("POST", path, { body, query })).json();
export const patch = async (path, body) => (await request("PATCH", path, { body })).json();
export const remove = async (path, query) => (await request("DELETE", path, { query })).json();

// Server-sent events of a path until its `end`; a lost connection continues after the last event.
export async function* follow(path, { query = {}, signal } = {}) {
  let last = null;
  let pause = 500;
  for (;;) {
    try {
      const more = last === null ? {} : { "Last-Event-ID": last };
      const answer = await request("GET", path, { query: { ...query, follow: true }, signal, more });
      for await (const event of parsed(answer.body)) {
        pause = 500;
        last = event.id ?? last;
        if (event.name === "error") throw new ApiError(500, event.data?.error?.message ?? "the stream failed");
        yield event;
        if (event.name === "end") return;
      }
    } catch (error) {
      if (error.name === "AbortError" || (error instanceof ApiError && error.status !== 0 && error.status !== 503)) throw error;
    }
    await new Promise((done, failed) => {
      const timer = setTimeout(done, pause);
      signal?.addEventListener("abort", () => { clearTimeout(timer); failed(new DOMException("left", "AbortError")); }, { once: true });
    });
    pause = Math.min(pause * 2, 10000);
  }
}

// Server-sent events; the data of the last one of OpenAI's API, which is not JSON, are null.
export async function* parsed(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const blocks = (rest + value).split("\n\n");
      rest = blocks.pop();
      for (const block of blocks) {
        const event = { name: "message", id: null, data: null };
        const lines = [];
        for (const line of block.split("\n")) {
          if (line.startsWith("event: ")) event.name = line.slice(7);
          else if (line.startsWith("id: ")) event.id = line.slice(4);
          else if (line.startsWith("data: ")) lines.push(line.slice(6));
        }
        const text = lines.join("\n");
        if (lines.length) yield { ...event, data: text === "[DONE]" ? null : JSON.parse(text) };
      }
    }
  } finally {
    await reader.cancel().catch(() => {});
  }
}
