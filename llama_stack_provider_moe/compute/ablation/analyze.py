"""Measurements -> figures of the direction after each decoder block; `report` defines them.

Shapes: L decoder blocks, H width, N rows of a set.
"""

import torch
from torch import Tensor

from llama_stack_provider_moe.compute.ablation.measurements import MeasuredStates, Measurements
from llama_stack_provider_moe.compute.ablation.report import Agreement, DirectionsReport, LayerFigures
from llama_stack_provider_moe.compute.methods.ablation import NoDirection, difference, direction, without
from llama_stack_provider_moe.errors import InvalidInput
from llama_stack_provider_moe.spec.ablation import DirectionKind

BEST = 5
_DIGITS = 6


def analyze(found: Measurements) -> DirectionsReport:
    """The figures of every block.

    Raises:
        InvalidInput: the means of the two sets are equal after some block.
    """
    target_LH, baseline_LH = found.target.mean_LH, found.baseline.mean_LH
    plain_LH = _directions(target_LH, baseline_LH, "plain")
    projected_LH = _directions(target_LH, baseline_LH, "projected")
    agreement = projected_LH @ projected_LH.T
    layers = len(target_LH)
    reach_L = (agreement.sum(dim=1) - 1) / max(1, layers - 1)
    figures = [_figures(found, layer, float(reach_L[layer])) for layer in range(layers)]
    best = sorted(figures, key=lambda each: (-each.quality, each.layer))[:BEST]
    return DirectionsReport(
        provenance=found.provenance,
        layers=figures,
        recommended=[each.layer for each in best if each.quality > 0],
        agreement=Agreement(
            plain=_rounded(plain_LH @ plain_LH.T),
            projected=_rounded(agreement),
            biprojected=_rounded(_biprojected(target_LH, baseline_LH, projected_LH)),
        ),
    )


def _directions(target_LH: Tensor, baseline_LH: Tensor, kind: DirectionKind) -> Tensor:
    made = []
    for layer, (target_H, baseline_H) in enumerate(zip(target_LH, baseline_LH, strict=True)):
        try:
            made.append(direction(target_H, baseline_H, kind))
        except NoDirection as error:
            raise InvalidInput("measurements", f"decoder block {layer}", f"two sets that differ: {error}") from None
    return torch.stack(made)


def _biprojected(target_LH: Tensor, baseline_LH: Tensor, projected_LH: Tensor) -> Tensor:
    """Cosine of each projected direction (row) with what is left of it at each block (column); 0 if nothing is."""
    layers = len(target_LH)
    cosines = torch.zeros(layers, layers, dtype=torch.float64)
    for measured in range(layers):
        for edited in range(layers):
            left_H = without(projected_LH[measured], baseline_LH[measured], baseline_LH[edited])
            cosines[measured, edited] = left_H.norm()  # |left| = cosine, because left is a projection of a unit vector
    return cosines


def _figures(found: Measurements, layer: int, reach: float) -> LayerFigures:
    target_H, baseline_H = found.target.mean_LH[layer], found.baseline.mean_LH[layer]
    r_H = difference(target_H, baseline_H)
    longest = max(float(target_H.norm()), float(baseline_H.norm()))
    auc, separation = held_out(found.target, found.baseline, layer)
    stability = _stability(found, layer)
    quality = max(0.0, 2 * auc - 1) * max(0.0, stability) * max(0.0, reach)
    figures = {
        "cosine": float(torch.cosine_similarity(target_H, baseline_H, dim=0)),
        "signal_to_noise": float(r_H.norm()) / longest,
        "purity": float(without(r_H, baseline_H).norm() / r_H.norm()),
        "separation": separation,
        "auc": auc,
        "stability": stability,
        "reach": reach,
        "quality": quality,
    }
    return LayerFigures(layer=layer, **{name: round(value, _DIGITS) for name, value in figures.items()})


def held_out(target: MeasuredStates, baseline: MeasuredStates, layer: int) -> tuple[float, float]:
    """(AUC, d') of the scores after a block, each the mean over both halves: their scores have different directions."""
    aucs, separations = [], []
    for half in (0, 1):
        one_N, other_N = (each.scores_NL[half::2, layer].double() for each in (target, baseline))
        order = (one_N[:, None] > other_N).double() + 0.5 * (one_N[:, None] == other_N).double()
        aucs.append(float(order.mean()))
        spread = float(((one_N.var() + other_N.var()) / 2).sqrt())
        gap = float(one_N.mean() - other_N.mean())
        separations.append(gap / spread if spread else 0.0)
    return sum(aucs) / 2, sum(separations) / 2


def _stability(found: Measurements, layer: int) -> float:
    halves = [
        direction(found.target.halves_2LH[half, layer], found.baseline.halves_2LH[half, layer], "projected")
        for half in (0, 1)
    ]
    return float(halves[0] @ halves[1])


def _rounded(cosines: Tensor) -> list[list[float]]:
    rounded: list[list[float]] = cosines.mul(10**_DIGITS).round().div(10**_DIGITS).tolist()
    return rounded


def text(report: DirectionsReport) -> str:
    """The figures as a table for a person; * marks the blocks to try first."""
    made = report.provenance
    sets = ", ".join(f"{name} ({each.rows:,} rows of {each.source})" for name, each in made.sets.items())
    lines = [
        f"{made.model} ({made.model_type}): {made.layers} decoder blocks, {made.width:,} wide; "
        + (f"token {made.position}" if made.span == 1 else f"mean of {made.span} tokens up to token {made.position}"),
        f"sets: {sets}",
        "  block  cosine    snr  purity     d'    auc  stable  reach  quality",
    ]
    for each in report.layers:
        mark = "*" if each.layer in report.recommended else " "
        lines.append(
            f"{mark} {each.layer:5d}  {each.cosine:6.3f}  {each.signal_to_noise:5.3f}  {each.purity:6.3f}  "
            f"{each.separation:5.2f}  {each.auc:5.3f}  {each.stability:6.3f}  {each.reach:5.3f}  {each.quality:7.4f}"
        )
    best = ", ".join(map(str, report.recommended)) or "none: no direction orders the rows better than chance"
    return "\n".join([*lines, f"directions to try first: {best}"])
