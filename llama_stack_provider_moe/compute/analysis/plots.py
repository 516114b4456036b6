"""Charts of reports, by matplotlib (the extra `plots`); layers from top to bottom, experts from left to right."""

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np
from numpy.typing import NDArray

from llama_stack_provider_moe.spec.routing import RoutingReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

type Drawing = Figure  # looked up when a type checker asks, so that nothing needs matplotlib before it draws
MISSING = "no charts: matplotlib is not installed (pip install 'llama-stack-provider-moe[plots]')"
DPI = 150
MOST_TICKS = 16
_Map = NDArray[np.floating[Any]]


class _Scale(TypedDict):
    """Colours of a heat map, and the values at their ends."""

    cmap: str
    vmin: float
    vmax: float


def installed() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def heat_maps(report: RoutingReport, folder: Path) -> list[Path]:
    """Write `difference.png`, `rates.png`, `mutual_information.png` and `top_experts.png` of a routing analysis."""
    charts = {
        "difference": _differences(report),
        "rates": _rates(report),
        "mutual_information": _information(report),
        "top_experts": _top(report),
    }
    paths = []
    for name, figure in charts.items():
        paths.append(folder / f"{name}.png")
        figure.savefig(paths[-1], dpi=DPI)
    return paths


def new_figure(width: float, height: float) -> "Figure":
    """An empty figure, in inches."""
    # Without pyplot, which would look for a screen and keep every figure.
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _differences(report: RoutingReport) -> "Figure":
    """Rates minus the others'; with two sets one map, because the second would only have its colours reversed."""
    names = list(report.sets)
    shown = names[:1] if len(names) == 2 else names
    maps = {name: np.array([layer.difference[name] for layer in report.layers]) for name in shown}
    others = names[1] if len(names) == 2 else "mean of the others"
    limit = max(float(np.abs(each).max()) for each in maps.values()) or 1.0
    titles = {name: f"activation rate: {name} minus {others}" for name in shown}
    return _maps(report, maps, titles, "difference of rates", {"cmap": "RdBu_r", "vmin": -limit, "vmax": limit})


def _rates(report: RoutingReport) -> "Figure":
    maps = {name: np.array([layer.rate[name] for layer in report.layers]) for name in report.sets}
    titles = {
        name: f"activation rate on {name} ({each.tokens:,} tokens of {each.rows:,} rows)"
        for name, each in report.sets.items()
    }
    limit = max(float(each.max()) for each in maps.values()) or 1.0
    return _maps(report, maps, titles, "share of tokens", {"cmap": "viridis", "vmin": 0.0, "vmax": limit})


def _maps(report: RoutingReport, maps: dict[str, _Map], titles: dict[str, str], label: str, scale: _Scale) -> "Figure":
    """Heat maps one below the other, with the same scale of colours."""
    layers, experts = len(report.moe_layers), report.num_experts
    width = min(14.0, max(5.0, 2.2 + 0.11 * experts))
    height = min(7.0, max(1.8, 1.1 + 0.2 * layers))
    figure = new_figure(width, height * len(maps) + 0.2)
    axes = figure.subplots(len(maps), 1, squeeze=False)[:, 0]
    for axis, (name, values) in zip(axes, maps.items(), strict=True):
        image = axis.imshow(values, aspect="auto", interpolation="nearest", **scale)
        axis.set_title(titles[name], fontsize=10)
        axis.set_xlabel("expert")
        _experts_and_layers(axis, report)
        figure.colorbar(image, ax=axis, label=label, fraction=0.05, pad=0.02)
    return figure


def _experts_and_layers(axis: "Axes", report: RoutingReport) -> None:
    axis.set_ylabel("layer")
    places = ticks(report.num_experts)
    axis.set_xticks(places, [str(place) for place in places])
    rows = ticks(len(report.moe_layers))
    axis.set_yticks(rows, [str(report.moe_layers[row]) for row in rows])


def ticks(count: int) -> list[int]:
    """Places of labels that do not overlap: every one, or every 2nd, 4th, 8th ... if there are many."""
    step = 1
    while count / step > MOST_TICKS:
        step *= 2
    return list(range(0, count, step))


def _information(report: RoutingReport) -> "Figure":
    """Mutual information of each layer, and what shuffled rows and random routers show."""
    figure = new_figure(7.5, 3.6)
    axis = figure.subplots()
    layers = [layer.layer for layer in report.layers]
    found = [layer.mutual_information for layer in report.layers]
    mean, high = [layer.chance_mean for layer in report.layers], [layer.chance_high for layer in report.layers]
    axis.fill_between(layers, 0, high, color="0.85", step="mid", label=f"by chance, up to {report.confidence:.0%}")
    axis.step(layers, mean, where="mid", color="0.45", linewidth=1, label="by chance, mean")
    random = [layer.random_router for layer in report.layers if layer.random_router is not None]
    if len(random) == len(layers):
        axis.plot(layers, random, "s--", color="#2166ac", markersize=3, linewidth=1, label="a random router")
    axis.plot(layers, found, "o-", color="#b2182b", markersize=4, label="found")
    axis.set_xlabel("layer")
    axis.set_ylabel("nats")
    axis.set_ylim(bottom=0)
    axis.set_xticks([layers[place] for place in ticks(len(layers))])
    axis.set_title(f"mutual information of set and expert (at most ln {len(report.sets)} = "
                   f"{np.log(len(report.sets)):.3f})", fontsize=10)  # fmt: skip
    axis.legend(fontsize=8, frameon=False)
    return figure


def _top(report: RoutingReport) -> "Figure":
    """Each set's experts with the largest difference, with intervals."""
    names = list(report.sets)
    count = max([1, *(len(ranked) for ranked in report.top.values())])
    figure = new_figure(4.6 * len(names), max(2.4, 1.2 + 0.22 * min(count, 2 * MOST_TICKS)))
    axes = figure.subplots(1, len(names), squeeze=False)[0]
    for axis, name in zip(axes, names, strict=True):
        ranked = report.top[name][: 2 * MOST_TICKS]
        places = list(range(len(ranked)))
        values = np.array([one.difference for one in ranked])
        ends = np.array([[one.difference - one.low, one.high - one.difference] for one in ranked]).clip(min=0).T
        colours = ["#b2182b" if one.is_sure else "0.6" for one in ranked]
        axis.errorbar(values, places, xerr=ends, fmt="none", ecolor="0.5", capsize=2)
        axis.scatter(values, places, c=colours, s=22, zorder=3)
        axis.axvline(0, color="0.3", linewidth=0.8)
        axis.set_yticks(places, [f"layer {one.layer}, expert {one.expert}" for one in ranked], fontsize=7)
        axis.invert_yaxis()
        axis.set_xlabel(f"difference of rates, {report.confidence:.0%} intervals")
        axis.set_title(f"{name} more than the others (red: beyond chance)", fontsize=9)
    return figure
