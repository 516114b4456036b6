// What every page has: the token's dialogue, the theme, the server's health, short messages, questions.

import { ApiError, askWith, setToken, token } from "./api.js";
import { byId, h, note, put, say } from "./dom.js";

const { base, api } = document.body.dataset;
export const BASE = base;
export const jobPath = (id) => `${base}/jobs/${encodeURIComponent(id)}`;
export const pipelinePath = (id) => `${base}/pipelines/${encodeURIComponent(id)}`;
export const sweepPath = (id) => `${base}/sweeps/${encodeURIComponent(id)}`;
export const lastOfPath = () => decodeURIComponent(location.pathname.replace(/\/+$/, "").split("/").pop());

askWith((why) => new Promise((answered) => {
  const dialogue = byId("token-dialog");
  const input = byId("token-input");
  if (why) put(byId("token-why"), `The server refused the token: ${why}`);
  input.value = "";
  const closed = () => {
    dialogue.removeEventListener("close", closed);
    if (dialogue.returnValue === "ok" && input.value) setToken(input.value.trim());
    showToken();
    answered(dialogue.returnValue === "ok" && Boolean(input.value));
    input.value = "";
  };
  dialogue.returnValue = "";
  dialogue.addEventListener("close", closed);
  dialogue.showModal();
  input.focus();
}));
byId("token-cancel").addEventListener("click", () => byId("token-dialog").close("cancel"));

function showToken() {
  byId("token-button").hidden = !token();
  say(byId("token-button"), "Forget token");
}
byId("token-button").addEventListener("click", () => {
  setToken(null);
  location.reload();
});
showToken();

const isDark = () => (document.documentElement.dataset.theme ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
byId("theme-button").addEventListener("click", () => {
  const chosen = isDark() ? "light" : "dark";
  document.documentElement.dataset.theme = chosen;
  try { localStorage.setItem("moe-theme", chosen); } catch { /* storage is off: for this page alone */ }
  document.dispatchEvent(new Event("moe-theme"));
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => document.dispatchEvent(new Event("moe-theme")));

async function showHealth() {
  const place = byId("health");
  let status = "error";
  let why = "The server does not answer.";
  try {
    const found = await (await fetch(`${api}/health`, { cache: "no-store" })).json();
    status = found.status ?? "error";
    document.dispatchEvent(new Event("moe-reached"));
    const runs = found.supervisor === "alive" ? "a supervisor runs" : "no supervisor runs, so jobs wait";
    why = found.reason ?? (status === "ok" ? `The server is fine; ${runs}.` : "The job store does not answer.");
    if (status === "ok" && found.supervisor !== "alive" && (found.jobs?.scheduled ?? 0) > 0) status = "degraded";
  } catch { /* said above */ }
  const word = { ok: "online", degraded: "needs attention", error: "offline" }[status] ?? status;
  place.dataset.status = status;
  place.title = why;
  say(place, word);
}
showHealth();
every(15000, showHealth);

// Calls `act` every so often while the page is looked at, and at once when it is looked at again.
export function every(delay, act) {
  let timer = 0;
  let ended = false;
  let busy = false;
  const tick = async () => {
    clearTimeout(timer);
    if (ended || document.hidden || busy) return;
    busy = true;
    try { await act(); } finally {
      busy = false;
      if (!ended) timer = setTimeout(tick, delay);
    }
  };
  const seen = () => { if (!document.hidden) tick(); };
  document.addEventListener("visibilitychange", seen);
  timer = setTimeout(tick, delay);
  return () => { ended = true; clearTimeout(timer); document.removeEventListener("visibilitychange", seen); };
}

export function toast(text, kind = "good") {
  const shown = h("div", { class: `toast ${kind}` }, text);
  byId("toasts").append(shown);
  setTimeout(() => shown.remove(), 6000);
}

// Shows what went wrong in the page's place for it, or clears it.
export function problem(error, place = byId("problem")) {
  if (!error) { put(place); return; }
  if (error.name === "AbortError") return;
  const text = error instanceof ApiError ? error.message : "the page failed on an unexpected error";
  if (!(error instanceof ApiError)) reportError(error);
  const head = error.status === 404 ? "Not found" : error.status === 401 ? "Not logged in" : error.status === 403 ? "Not allowed" : "That did not work";
  const shown = note("bad", h("strong", {}, `${head}: `), text);
  if (error.isUnreachable) shown.dataset.unreachable = "";
  put(place, shown);
}
// Once the server answers again, it is no longer true that it does not.
document.addEventListener("moe-reached", () => document.querySelectorAll("[data-unreachable]").forEach((each) => each.remove()));

// A question in a dialogue. Resolves to true for its action. With `act` the dialogue stays open until `act` is done, and
// shows why it failed, so that nothing typed is lost.
export function question(title, content, action, kind = "primary", act = null) {
  return new Promise((answered) => {
    const dialogue = byId("ask-dialog");
    const cancel = h("button", { type: "button", class: "quiet", on: { click: () => dialogue.close("") } }, "Back");
    const failed = h("div");
    const button = action ? h("button", { value: "ok", class: kind }, action) : null;
    const form = h("form", { method: "dialog" }, h("h2", { id: "ask-title" }, title), content, failed, h("div", { class: "buttons" }, cancel, button));
    if (act) form.addEventListener("submit", async (event) => {
      event.preventDefault();
      button.disabled = true;
      try {
        await act();
        dialogue.close("ok");
      } catch (error) {
        put(failed, note("bad", error.message));
        if (!(error instanceof ApiError) && error.constructor !== Error) reportError(error);
      }
      button.disabled = false;
    });
    put(dialogue, form);
    dialogue.returnValue = "";
    dialogue.addEventListener("close", () => answered(dialogue.returnValue === "ok"), { once: true });
    dialogue.showModal();
  });
}
