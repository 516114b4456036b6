// The experts of an answer: a column for each token, a row for each layer, a colour for each expert; and a table.

import { h, put, say, table } from "./dom.js";

const WIDTH = 14; // pixels of a token
const HEIGHT = 12; // and of a layer
const NAMED = 24; // experts in the legend
const colour = (expert) => `hsl(${(expert * 137.508) % 360} 62% ${42 + (expert % 3) * 10}%)`;
const shown = (text) => JSON.stringify(text).slice(1, -1) || "∅";

export class Strip {
  constructor(title, layers) {
    this.layers = layers;
    this.tokens = [];
    this.title = title;
    this.canvas = h("canvas", { role: "img", tabindex: 0, "aria-label": `${title}: the table below has the same figures`, on: { mousemove: (event) => this.point(event), mouseleave: () => say(this.about, this.words()) } });
    this.about = h("p", { class: "muted" });
    this.legend = h("ul", { class: "legend", "aria-label": `${title}: colours` });
    this.rows = h("div");
    this.details = h("details", { class: "as-table", on: { toggle: () => this.tell() } }, h("summary", {}, "As a table"), this.rows);
    this.element = h("figure", { class: "strip", hidden: true }, h("figcaption", {}, title), h("div", { class: "scroll" }, this.canvas), this.about, this.legend, this.details);
    this.due = 0;
  }

  add(piece) {
    this.tokens.push(piece);
    this.element.hidden = false;
    if (!this.due) this.due = requestAnimationFrame(() => { this.due = 0; this.draw(); });
  }

  words() {
    const each = this.tokens[0]?.experts[0]?.length ?? 0;
    return `${this.tokens.length} tokens across, ${this.layers.length} layers down; the colour is that of ${each === 1 ? "the expert" : `the first of ${each} experts`}.`;
  }

  draw() {
    const scale = window.devicePixelRatio || 1;
    this.canvas.width = this.tokens.length * WIDTH * scale;
    this.canvas.height = this.layers.length * HEIGHT * scale;
    this.canvas.style.setProperty("width", `${this.tokens.length * WIDTH}px`);
    this.canvas.style.setProperty("height", `${this.layers.length * HEIGHT}px`);
    const pen = this.canvas.getContext("2d");
    pen.scale(scale, scale);
    this.tokens.forEach((token, column) => token.experts.forEach((experts, row) => {
      pen.fillStyle = colour(first(experts, token.weights[row]));
      pen.fillRect(column * WIDTH, row * HEIGHT, WIDTH - 1, HEIGHT - 1);
    }));
    say(this.about, this.words());
    this.name();
    if (this.details.open) this.tell();
  }

  // The colours of the experts that were first most often.
  name() {
    const times = new Map();
    for (const token of this.tokens) {
      token.experts.forEach((experts, row) => {
        const expert = first(experts, token.weights[row]);
        times.set(expert, (times.get(expert) ?? 0) + 1);
      });
    }
    const found = [...times].sort(([, one], [, other]) => other - one);
    put(this.legend, found.slice(0, NAMED).map(([expert, number]) => {
      const sign = h("i");
      sign.style.setProperty("background", colour(expert));
      return h("li", { title: `first ${number} times` }, sign, `expert ${expert}`);
    }), found.length > NAMED ? h("li", {}, `and ${found.length - NAMED} others`) : null);
  }

  point(event) {
    const token = this.tokens[Math.floor(event.offsetX / WIDTH)];
    const row = Math.floor(event.offsetY / HEIGHT);
    if (token && row < this.layers.length) say(this.about, `“${shown(token.token)}”, layer ${this.layers[row]}: ${pairs(token, row)}`);
  }

  tell() {
    if (!this.details.open) return;
    put(this.rows, table(this.title, ["Token", ...this.layers.map((layer) => `Layer ${layer}`)],
      this.tokens.map((token) => [h("code", {}, shown(token.token)), ...this.layers.map((_, row) => pairs(token, row))])));
  }
}

const first = (experts, weights) => experts[weights.indexOf(Math.max(...weights))];
const pairs = (token, row) => token.experts[row].map((expert, index) => `${expert} (${token.weights[row][index]})`).join(", ");
