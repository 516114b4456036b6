// Small pieces that several pages show.

import { byId, h } from "./dom.js";
import { stateWord } from "./format.js";
import { problem } from "./shell.js";

export function pill(state, word = stateWord(state)) {
  return h("span", { class: "pill", "data-state": state }, word);
}

export function bar(percent, label) {
  return h("progress", { max: 100, value: percent ?? 0, "aria-label": label });
}

// Tabs by the ARIA pattern: arrows move, only the chosen one is in the order of the Tab key. Returns what chooses one.
export function tabs(list, panel, entries, chosen, choose) {
  const buttons = entries.map(([id, name]) => h("button", {
    type: "button", role: "tab", id: `tab-${id}`, "aria-controls": panel.id, on: { click: () => select(id) },
  }, name));
  list.replaceChildren(...buttons);
  list.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    const to = event.key === "Home" ? 0 : event.key === "End" ? buttons.length - 1 : null;
    if (step === undefined && to === null) return;
    event.preventDefault();
    const now = buttons.indexOf(document.activeElement);
    const next = buttons[to ?? (now + step + buttons.length) % buttons.length];
    next.focus();
    next.click();
  });
  function select(id) {
    for (const button of buttons) {
      const mine = button.id === `tab-${id}`;
      button.setAttribute("aria-selected", String(mine));
      button.tabIndex = mine ? 0 : -1;
    }
    const mine = byId(`tab-${id}`);
    list.scrollLeft = mine.offsetLeft - list.offsetLeft - (list.clientWidth - mine.offsetWidth) / 2; // a narrow row shows it
    panel.setAttribute("aria-labelledby", mine.id);
    choose(id);
  }
  select(entries.some(([id]) => id === chosen) ? chosen : entries[0][0]);
  return select;
}

// A button that can't be pressed again until `run` is done, and says why it failed.
export function actButton(name, run, classes = "") {
  const button = h("button", { type: "button", class: classes, on: { click: async () => {
    button.disabled = true;
    try { await run(); } catch (error) { problem(error); }
    button.disabled = false;
    const focused = document.activeElement; // a disabled button loses it, also to a dialogue that has closed
    if (focused === document.body || focused.closest("dialog:not([open])")) button.focus();
  } } }, name);
  return button;
}
