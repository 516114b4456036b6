// Charts by Plotly.js, which the server takes out of the `plotly` wheel; without it, tables.

import { h, note, put, say, table } from "./dom.js";
import { figure } from "./format.js";
import { plotly } from "./plotly.js";
import { BASE } from "./shell.js";

export const HAS_CHARTS = document.body.dataset.plotly === "yes";
const TABLE_ROWS = 200;
const all = new Set();
export function withoutCharts() {
  return HAS_CHARTS ? null : note("info", "Charts need Plotly.js on the server: ",
    h("code", {}, "pip install 'llama-stack-provider-moe[dashboard]'"), " Until then this page shows tables.");
}

const style = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
export const colour = (index) => style(`--line-${(index % 8) + 1}`);

function layout(more) {
  const grid = style("--grid");
  const axis = { gridcolor: grid, zerolinecolor: grid, linecolor: grid, tickcolor: grid, automargin: true, fixedrange: false };
  return {
    autosize: true, height: 260, margin: { l: 12, r: 12, t: 8, b: 32 },
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: style("--font"), size: 12, color: style("--muted") },
    hoverlabel: { bgcolor: style("--raised"), bordercolor: style("--line"), font: { color: style("--text"), family: style("--font") } },
    legend: { orientation: "h", x: 0, y: 1, yanchor: "bottom", font: { color: style("--text") } },
    ...more,
    xaxis: { ...axis, ...more.xaxis }, yaxis: { ...axis, ...more.yaxis },
  };
}
const CONFIG = { displayModeBar: false, responsive: true, doubleClick: "reset", showTips: false };

document.addEventListener("moe-theme", () => all.forEach((chart) => chart.draw()));

class Chart {
  constructor(title, { wide = false } = {}) {
    this.title = title;
    this.now = h("span", { class: "now" });
    this.plot = h("div", { class: "plot", role: "img", "aria-label": title });
    this.rows = h("div");
    this.more = h("details", { class: "as-table", on: { toggle: () => this.fill() } }, h("summary", {}, "As a table"), this.rows);
    this.more.open = !HAS_CHARTS;
    this.element = h("figure", { class: `card chart${wide ? " wide" : ""}` },
      h("figcaption", {}, h("h2", {}, title), this.now), HAS_CHARTS ? this.plot : null, this.more);
    this.due = 0;
    all.add(this);
  }

  rename(title) {
    this.title = title;
    say(this.element.querySelector("h2"), title);
  }

  forget() {
    all.delete(this);
    clearTimeout(this.due);
    if (window.Plotly && this.plot.data) window.Plotly.purge(this.plot);
  }

  // Draws soon: several changes within a moment are drawn once.
  draw() {
    if (this.due) return;
    this.due = setTimeout(async () => {
      this.due = 0;
      if (!all.has(this)) return;
      this.fill();
      if (!HAS_CHARTS) return;
      try {
        const Plotly = await plotly(BASE);
        if (!this.plot.isConnected) return;
        await Plotly.react(this.plot, this.traces(), layout(this.layout()), CONFIG);
        this.drawn?.();
      } catch (error) {
        put(this.plot, note("bad", `The chart can't be drawn: ${error.message}`));
      }
    }, 60);
  }
}

// Lines over steps. A series: {name, x, y, points?}; the values may be text for NaN and infinity, and are left out.
export class LineChart extends Chart {
  constructor(title, options = {}) {
    super(title, options);
    this.series = [];
    this.format = options.format ?? figure;
    this.xTitle = options.xTitle ?? "step";
    this.unit = options.unit ?? "";
  }

  set(series) {
    this.series = series;
    const last = series.map(({ y }) => y.findLast((value) => value !== null)).filter((value) => value !== undefined);
    say(this.now, last.length && series.length < 3 ? last.map(this.format).join(" · ") : "");
    const said = series.map(({ name, y }) => `${name}: last ${this.format(y.findLast((value) => value !== null))}`).join("; ");
    this.plot.setAttribute("aria-label", `${this.title}, lines over steps. ${said}`);
    this.draw();
  }

  traces() {
    return this.series.map(({ name, x, y, points, dash }, index) => ({
      type: "scatter", name, x, y: y.map((value) => (typeof value === "number" ? value : null)),
      mode: points || x.length < 3 ? "lines+markers" : "lines", connectgaps: Boolean(points),
      line: { color: colour(index), width: 2, dash: dash ?? "solid" }, marker: { color: colour(index), size: 7 },
      hovertemplate: this.unit ? `%{y:.4~s}${this.unit}` : "%{y:.5~g}",
    }));
  }

  layout() {
    return {
      hovermode: "x unified", showlegend: this.series.length > 1, xaxis: { title: { text: this.xTitle, standoff: 4 } },
      yaxis: this.unit ? { tickformat: "~s", ticksuffix: this.unit } : { tickformat: "~g" }, margin: { l: 12, r: 12, t: this.series.length > 1 ? 30 : 8, b: 36 },
    };
  }

  fill() {
    if (!this.more.open) return;
    const steps = [...new Set(this.series.flatMap(({ x }) => x))].sort((one, other) => one - other).slice(-TABLE_ROWS);
    const columns = this.series.map(({ x, y }) => new Map(x.map((step, index) => [step, y[index]])));
    put(this.rows, table(this.title, [this.xTitle, ...this.series.map(({ name }) => name)],
      steps.map((step) => [step, ...columns.map((found) => (found.has(step) ? this.format(found.get(step)) : "–"))])));
  }
}

// A grid of values: rows by columns. `marks`: cells that stand out, as [row, column] with a text.
export class HeatMap extends Chart {
  constructor(title, { rowName, value, chosen = null, marked = "" }) {
    super(title, { wide: true });
    this.found = { x: [], y: [], z: [], marks: null };
    this.rowName = rowName;
    this.value = value;
    this.chosen = chosen;
    this.marked = marked;
  }

  set(found) {
    this.found = found;
    this.plot.setAttribute("aria-label", `${this.title}: ${found.y.length} rows, ${found.x.length} steps. The table below has the last step.`);
    this.draw();
  }

  traces() {
    const { x, y, z, marks } = this.found;
    const hover = `${this.rowName} %{y}, step %{x}<br>${this.value} %{z:.4~g}<extra></extra>`;
    // Steps as categories: cells are equally wide, whatever the distance of the steps.
    const columns = x.map(String);
    const rows = y.map(String);
    const traces = [{
      type: "heatmap", x: columns, y: rows, z, colorscale: "Cividis", hovertemplate: hover, zmin: this.found.least, zmax: this.found.most,
      colorbar: { thickness: 10, outlinewidth: 0, tickfont: { color: style("--muted") } },
    }];
    if (marks) {
      const red = style("--bad-strong");
      traces.push({
        type: "heatmap", x: columns, y: rows, z: marks, colorscale: [[0, red], [1, red]], showscale: false, hoverongaps: false,
        hovertemplate: `${this.rowName} %{y}, step %{x}<br>${this.marked}<extra></extra>`,
      });
    }
    return traces;
  }

  layout() {
    const height = Math.max(180, Math.min(620, 70 + this.found.y.length * (this.found.y.length > 40 ? 8 : 20)));
    return {
      height, xaxis: { type: "category", nticks: 10, title: { text: "step", standoff: 4 }, showgrid: false, fixedrange: true },
      yaxis: { type: "category", title: { text: this.rowName }, showgrid: false, nticks: 24, autorange: "reversed", fixedrange: true },
      margin: { l: 12, r: 12, t: 8, b: 36 },
    };
  }

  drawn() {
    if (!this.chosen || this.listens) return;
    this.listens = true;
    this.plot.on("plotly_click", (event) => this.chosen(Number(event.points[0].y)));
  }

  fill() {
    if (!this.more.open) return;
    const { x, y, z, marks } = this.found;
    const last = x.length - 1;
    put(this.rows, table(`${this.title}, at step ${x[last]}`, [this.rowName, `${this.value} at step ${x[last] ?? "–"}`, ""],
      y.map((name, row) => [name, figure(z[row][last]), marks && marks[row][last] !== null ? this.marked : ""])));
  }
}
