// Values -> texts for people.

const finite = (value) => typeof value === "number" && Number.isFinite(value);

export function figure(value) {
  if (value === null || value === undefined) return "–";
  if (typeof value === "string") return value; // NaN and infinity are text in the API
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1e6 || size < 1e-3) return value.toExponential(2);
  if (size >= 1000) return Math.round(value).toLocaleString("en");
  return String(Number(value.toPrecision(4)));
}

export const count = (value) => (finite(value) ? Math.round(value).toLocaleString("en") : "–");

export function bytes(value) {
  if (!finite(value)) return "–";
  const units = ["B", "kB", "MB", "GB", "TB"];
  let index = 0;
  while (value >= 1000 && index < units.length - 1) { value /= 1000; index += 1; }
  return `${index === 0 ? value : value.toPrecision(3)} ${units[index]}`;
}

export function duration(seconds) {
  if (!finite(seconds)) return "–";
  const whole = Math.max(0, Math.round(seconds));
  if (whole < 60) return `${whole} s`;
  if (whole < 3600) return `${Math.floor(whole / 60)} min ${whole % 60} s`;
  if (whole < 172800) return `${Math.floor(whole / 3600)} h ${Math.floor((whole % 3600) / 60)} min`;
  return `${Math.floor(whole / 86400)} days ${Math.floor((whole % 86400) / 3600)} h`;
}

export function ago(text) {
  if (!text) return "–";
  const seconds = (Date.now() - Date.parse(text)) / 1000;
  if (seconds < 10) return "just now";
  if (seconds < 60) return `${Math.round(seconds)} s ago`;
  if (seconds < 3600) return `${Math.round(seconds / 60)} min ago`;
  if (seconds < 86400) return `${Math.round(seconds / 3600)} h ago`;
  return `${Math.round(seconds / 86400)} days ago`;
}

const MOMENT = new Intl.DateTimeFormat("en-GB", { dateStyle: "medium", timeStyle: "medium" });
export const moment = (text) => (text ? MOMENT.format(new Date(text)) : "–");

export const WORDS = {
  scheduled: "waiting", in_progress: "running", completed: "completed", failed: "failed", cancelled: "cancelled",
};
export const stateWord = (state) => WORDS[state] ?? state;

export const shown = (value) =>
  value === undefined || value === null ? "null" : typeof value === "string" ? value : JSON.stringify(value);
