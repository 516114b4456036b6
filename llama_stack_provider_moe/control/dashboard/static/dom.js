// Makes elements. Texts become text nodes and never markup: names, logs and rows come from people.

// Control characters except tab and newline, and characters that reorder or hide text: the same that the command line
// replaces. A right-to-left override would show a name as another one.
const UNPRINTABLE = /[\0-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]/gu;
export const printable = (text) => String(text).replace(/\r\n?/g, "\n").replace(UNPRINTABLE, "\ufffd");
const READ = new Set(["title", "aria-label", "placeholder"]); // attributes that people read

export function h(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === null || value === undefined || value === false) continue;
    if (name === "on") for (const [event, act] of Object.entries(value)) element.addEventListener(event, act);
    else if (name === "class") element.className = value;
    else if (name === "value") element.value = value;
    else if (name === "checked") element.checked = true;
    else element.setAttribute(name, value === true ? "" : READ.has(name) ? printable(value) : String(value));
  }
  put(element, ...children);
  return element;
}

// Replaces the children of an element.
export function put(element, ...children) {
  const nodes = children.flat(3).filter((each) => each !== null && each !== undefined && each !== false);
  element.replaceChildren(...nodes.map((each) => (each instanceof Node ? each : printable(each))));
  return element;
}

export const byId = (id) => document.getElementById(id);

// A text with `code` in it, as the descriptions of settings have.
export function prose(text) {
  return text.split(/`([^`]+)`/).map((part, index) => (index % 2 ? h("code", {}, part) : part));
}

// Sets a text only if it differs, so that live regions and selections stay quiet.
export function say(element, text) {
  const shown = printable(text);
  if (element.textContent !== shown) element.textContent = shown;
}

export function table(caption, heads, rows, { classes = "" } = {}) {
  return h("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": caption },
    h("table", { class: `plain ${classes}` },
      h("caption", { class: "hidden" }, caption),
      h("thead", {}, h("tr", {}, heads.map((head) => (head ? h("th", { scope: "col" }, head) : h("td"))))),
      h("tbody", {}, rows.map((cells) => h("tr", {}, cells.map((cell, index) =>
        index === 0 ? h("th", { scope: "row" }, cell) : h("td", {}, cell)))))));
}

export function facts(pairs) {
  return h("dl", { class: "pairs" }, pairs.filter(([, value]) => value !== null && value !== undefined && value !== "")
    .map(([name, value]) => [h("dt", {}, name), h("dd", {}, value)]));
}

export function note(kind, ...content) {
  return h("div", { class: `note ${kind}`, role: kind === "bad" ? "alert" : "note" }, ...content);
}

export function debounced(act, delay) {
  let timer = 0;
  return (...given) => {
    clearTimeout(timer);
    timer = setTimeout(() => act(...given), delay);
  };
}
