"""Charts of directions: the figures of each decoder block, and how far directions agree between blocks."""

from pathlib import Path

import numpy as np

from llama_stack_provider_moe.compute.ablation.report import DirectionsReport
from llama_stack_provider_moe.compute.analysis.plots import DPI, Drawing, new_figure, ticks


def draw(report: DirectionsReport, folder: Path) -> list[Path]:
    """Write `layers.png` and `agreement.png`, and return their paths."""
    paths = []
    for name, drawn in {"layers": _layers(report), "agreement": _agreement(report)}.items():
        paths.append(folder / f"{name}.png")
        drawn.savefig(paths[-1], dpi=DPI)
    return paths


def _layers(report: DirectionsReport) -> Drawing:
    """Three charts, one below the other, because their scales differ."""
    shown = {
        "of the means": {"cosine": "cosine", "signal_to_noise": "signal to noise", "purity": "purity"},
        "on other rows: d'": {"separation": "d'"},
        "quality and its factors": {"auc": "AUC", "stability": "stability", "reach": "reach", "quality": "quality"},
    }
    drawn = new_figure(8.0, 8.0)
    blocks = [each.layer for each in report.layers]
    for axis, (title, lines) in zip(drawn.subplots(len(shown), 1), shown.items(), strict=True):
        for name, label in lines.items():
            width = 2.4 if name == "quality" else 1.2
            axis.plot(blocks, [getattr(each, name) for each in report.layers], label=label, linewidth=width)
        for block in report.recommended:
            axis.axvline(block, color="0.85", linewidth=3, zorder=0)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("decoder block (grey: directions to try first)")
        axis.set_xticks([blocks[at] for at in ticks(len(blocks))])
        axis.legend(fontsize=8, frameon=False)
    return drawn


def _agreement(report: DirectionsReport) -> Drawing:
    maps = {
        "plain": (report.agreement.plain, "block"),
        "projected": (report.agreement.projected, "block"),
        "biprojected": (report.agreement.biprojected, "edited block"),
    }
    drawn = new_figure(13.0, 4.2)
    axes = drawn.subplots(1, len(maps))
    for axis, (name, (cosines, across)) in zip(axes, maps.items(), strict=True):
        image = axis.imshow(np.array(cosines), cmap="RdBu_r", vmin=-1, vmax=1, interpolation="nearest")
        axis.set_title(f"cosine of {name} directions", fontsize=10)
        axis.set_xlabel(across)
        axis.set_ylabel("measured after block")
        drawn.colorbar(image, ax=axis, fraction=0.05, pad=0.02)
    return drawn
