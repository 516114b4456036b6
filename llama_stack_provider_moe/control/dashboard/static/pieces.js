// Small pieces that several pages show.

import { h } from "./dom.js";
import { stateWord } from "./format.js";

export function pill(state, word = stateWord(state)) {
  return h("span", { class: "pill", "data-state": state }, word);
}

export function bar(percent, label) {
  return h("progress", { max: 100, value: percent ?? 0, "aria-label": label });
}

// Tabs by the ARIA pattern: arrows move, only the chosen one is in the order of the Tab key.
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
    panel.setAttribute("aria-labelledby", `tab-${id}`);
    choose(id);
  }
  select(entries.some(([id]) => id === chosen) ? chosen : entries[0][0]);
}
