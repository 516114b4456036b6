"""Which experts serve which prompts: routing is counted on data sets and compared, also with what chance alone shows.

Experts are ranked by the difference of their activation rates between sets (SteerMoE, arXiv 2509.09660, its risk
difference; SAFEx, arXiv 2506.17368, masks the experts that such statistics find). Rows, not tokens, are resampled and
shuffled: tokens of one row are alike, and treating them as independent would make intervals too narrow.

Shapes: N rows of a set, L layers with experts, E experts, S sets, R resamples (or shuffles).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from llama_stack_provider_moe.compute.analysis.random_routers import RandomRouters
from llama_stack_provider_moe.compute.moe.layout import ExpertLayout
from llama_stack_provider_moe.compute.moe.routing import RoutingRecorder
from llama_stack_provider_moe.errors import InvalidInput
from llama_stack_provider_moe.ground import liveness
from llama_stack_provider_moe.spec.routing import Analysis, LayerReport

Floats = NDArray[np.floating[Any]]
ROUNDING = 1e-6  # error of a rate, because sums are in fp32


class Prompt(NamedTuple):
    """A row's tokens; `counts` is true for each token that counts, and at least one must."""

    ids: list[int]
    counts: list[bool]


@dataclass(frozen=True)
class Counts:
    """For one set: counted tokens routed to each expert, (N, L, E), and all counted tokens, (N,).

    `random_NLE` has those that random routers would send to each (`random_routers`), if they were counted.
    """

    routed_NLE: Floats
    tokens_N: Floats
    random_NLE: Floats | None = None

    def rate_LE(self) -> Floats:
        """Share of the tokens that each expert got; the sum over a layer's experts is top-k."""
        return self._rate(self.routed_NLE)

    def random_rate_LE(self) -> Floats | None:
        """The same for random routers; None if they were not counted."""
        return None if self.random_NLE is None else self._rate(self.random_NLE)

    def _rate(self, routed_NLE: Floats) -> Floats:
        rate: Floats = routed_NLE.sum(axis=0, dtype=np.float64) / self.tokens_N.sum(dtype=np.float64)
        return rate


def count(
    model: nn.Module,
    layout: ExpertLayout,
    prompts: Sequence[Prompt],
    batch_size: int,
    progress: Callable[[int], None] = lambda rows: None,
) -> Counts:
    """Run `prompts` through the model, without gradients, and count which experts its routers choose.

    What random routers would choose of the same hidden states is counted too.

    Args:
        model: with or without adapters, in evaluation mode.
        layout: of its experts.
        prompts: rows, in the order of the result.
        batch_size: rows in one pass; rows of similar length go together.
        progress: called with the number of rows that are done, after each pass.
    """
    routed_NLE = np.zeros((len(prompts), len(layout.moe_layers), layout.choices), dtype=np.float32)
    random_NLE = np.zeros_like(routed_NLE)
    tokens_N = np.array([sum(prompt.counts) for prompt in prompts], dtype=np.float32)
    if not tokens_N.all():
        raise InvalidInput("prompts", int(tokens_N.argmin()), "rows that each have a token that counts")
    order = sorted(range(len(prompts)), key=lambda row: len(prompts[row].ids))
    device = next(model.parameters()).device
    recorder, random = RoutingRecorder(model, layout), RandomRouters(model, layout)
    try:
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            ids_BT = pad_sequence([torch.tensor(prompts[row].ids) for row in rows], batch_first=True).to(device)
            lengths_B = torch.tensor([len(prompts[row].ids) for row in rows], device=device)
            mask_BT = (torch.arange(ids_BT.shape[1], device=device) < lengths_B[:, None]).long()
            counts_BT = pad_sequence([torch.tensor(prompts[row].counts) for row in rows], batch_first=True).to(device)
            with torch.no_grad(), recorder.recording(mask_BT):
                model(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False, logits_to_keep=1)
            for place, layer in enumerate(layout.moe_layers):
                for counted_NLE, found in ((routed_NLE, recorder), (random_NLE, random)):
                    counted_NLE[rows, place] = by_row(found.chosen_in(layer), counts_BT, layout.choices).cpu().numpy()
            progress(start + len(rows))
    finally:
        recorder.close()
        random.close()
    return Counts(routed_NLE, tokens_N, random_NLE)


def by_row(chosen_TK: torch.Tensor, counts_BT: torch.Tensor, num_experts: int) -> torch.Tensor:
    """Number of tokens of each row that went to each expert, (B, E); T = B x length."""
    batch, length = counts_BT.shape
    chosen_BX = chosen_TK.reshape(batch, -1)
    weight_BX = counts_BT.float().repeat_interleave(chosen_BX.shape[1] // length, dim=1)
    made_BE = torch.zeros(batch, num_experts + 1, device=chosen_TK.device)
    return made_BE.scatter_add_(1, chosen_BX, weight_BX)[:, :num_experts]


def compare(sets: Mapping[str, Counts], layers: Sequence[int], settings: Analysis, seed: int) -> list[LayerReport]:
    """Rates, differences and mutual information of each layer, with intervals and chance levels.

    Args:
        sets: name -> counts.
        layers: numbers of the layers with experts.
        settings: of the analysis.
        seed: of the resampling.
    """
    names, counted = list(sets), list(sets.values())
    rate_SLE = np.stack([one.rate_LE() for one in counted])
    difference_SLE, found_L = differences(rate_SLE), mutual_information(rate_SLE)
    low_SLE, high_SLE = bootstrap(counted, settings.resamples, settings.confidence, seed)
    chance = by_chance(counted, settings.permutations, seed)
    mean_L = chance.information_LR.mean(axis=1)
    upper_L = np.quantile(chance.information_LR, settings.confidence, axis=1)
    random_L = _by_random_routers(counted)
    needed_SLE = np.quantile(chance.greatest_R, settings.confidence) * chance.spread_SLE

    def lists(figures_SLE: Floats, place: int) -> dict[str, list[float]]:
        return {name: np.round(figures_SLE[s, place], 8).tolist() for s, name in enumerate(names)}

    return [
        LayerReport(
            layer=layer,
            rate=lists(rate_SLE, place),
            difference=lists(difference_SLE, place),
            low=lists(low_SLE, place),
            high=lists(high_SLE, place),
            chance_difference=lists(needed_SLE, place),
            mutual_information=round(float(found_L[place]), 8),
            chance_mean=round(float(mean_L[place]), 8),
            chance_high=round(float(upper_L[place]), 8),
            random_router=None if random_L is None else round(float(random_L[place]), 8),
        )
        for place, layer in enumerate(layers)
    ]


def _by_random_routers(sets: Sequence[Counts]) -> Floats | None:
    """The mutual information that random routers have in each layer; None if they were not counted."""
    rates = [rate_LE for one in sets if (rate_LE := one.random_rate_LE()) is not None]
    return mutual_information(np.stack(rates)) if len(rates) == len(sets) else None


def differences(rate_SLE: Floats) -> Floats:
    """Each set's rates minus the mean of the others'; the first axis is S, other axes may come before L and E.

    >>> differences(np.array([[[0.5, 0.5]], [[0.2, 0.8]]])).round(2).tolist()
    [[[0.3, -0.3]], [[-0.3, 0.3]]]
    """
    count = rate_SLE.shape[0]
    made: Floats = rate_SLE - (rate_SLE.sum(axis=0) - rate_SLE) / (count - 1)
    return made


def mutual_information(rate_SLE: Floats) -> Floats:
    """I(S; X) of set and expert in each layer, in nats; X is one of a token's K experts at random, sets weigh the same.

    It is the entropy of the mean of the sets' distributions over experts, minus the mean of their entropies (the
    Jensen-Shannon divergence). Estimates from samples are too large: by about (E - 1)(S - 1) / (2 T) for T independent
    tokens of all sets, and by more if tokens of a row are alike. `by_chance` measures by how much.

    >>> round(mutual_information(np.array([[[1.0, 0.0]], [[0.0, 1.0]]])).item(), 6)  # ln 2
    0.693147
    """
    share_SLE = rate_SLE / rate_SLE.sum(axis=-1, keepdims=True)
    return _entropy(share_SLE.mean(axis=0)) - _entropy(share_SLE).mean(axis=0)


def _entropy(share: Floats) -> Floats:
    # 1 replaces a share of 0, because 0 * ln(0) counts as 0.
    entropy: Floats = -(share * np.log(np.where(share > 0, share, 1.0))).sum(axis=-1)
    return entropy


def bootstrap(sets: Sequence[Counts], resamples: int, confidence: float, seed: int) -> tuple[Floats, Floats]:
    """Percentile intervals of `differences`, (S, L, E) each: rows of every set are drawn with replacement.

    (Efron & Tibshirani 1993, chapter 13.) Each interval is for a single expert; of many, some miss by chance.

    Args:
        sets: counts.
        resamples: number of draws.
        confidence: of each interval.
        seed: of the draws.
    """
    generator = np.random.default_rng(seed)
    drawn_SRN = [_drawn(len(one.tokens_N), resamples, generator) for one in sets]
    ends = [(1 - confidence) / 2, (1 + confidence) / 2]
    lows, highs = [], []
    layers = range(sets[0].routed_NLE.shape[1])
    # One layer at a time, because R x E figures for all layers need much memory.
    for place in liveness.counted("resampling rows", layers, len(layers), "layers"):
        rates_SRE = [
            _rates(drawn_RN, one.routed_NLE[:, place], one.tokens_N)
            for drawn_RN, one in zip(drawn_SRN, sets, strict=True)
        ]
        low_SE, high_SE = np.quantile(differences(np.stack(rates_SRE)), ends, axis=1)
        lows.append(low_SE)
        highs.append(high_SE)
    return np.stack(lows, axis=1), np.stack(highs, axis=1)


def _drawn(rows: int, resamples: int, generator: np.random.Generator) -> Floats:
    """How often each row is drawn, (R, N)."""
    drawn_RN: Floats = generator.multinomial(rows, np.full(rows, 1 / rows), size=resamples).astype(np.float32)
    return drawn_RN


class Chance(NamedTuple):
    """The results for shuffled rows.

    Attributes:
        information_LR: mutual information.
        spread_SLE: root mean square of each expert's differences.
        greatest_R: the largest difference over all sets, layers and experts, each in units of its own spread.
    """

    information_LR: Floats
    spread_SLE: Floats
    greatest_R: Floats


def by_chance(sets: Sequence[Counts], permutations: int, seed: int) -> Chance:
    """The results when rows are assigned to sets at random, with the sets' sizes unchanged: then no set differs.

    An expert whose difference, in units of spread, exceeds the largest of all by chance was not found only because many
    were tested (Westfall & Young 1993: the permutation distribution of the maximum, one step).

    Args:
        sets: counts.
        permutations: number of shuffles.
        seed: of the shuffles.
    """
    generator = np.random.default_rng([seed, 1])
    routed_NLE = np.concatenate([one.routed_NLE for one in sets])
    tokens_N = np.concatenate([one.tokens_N for one in sets])
    labels_N = np.repeat(np.arange(len(sets)), [len(one.tokens_N) for one in sets])
    dealt_RN = generator.permuted(np.tile(labels_N, (permutations, 1)), axis=1)
    dealt_SRN = [(dealt_RN == label).astype(np.float32) for label in range(len(sets))]
    information, spread, greatest_R = [], [], np.zeros(permutations)
    layers = range(routed_NLE.shape[1])
    for place in liveness.counted("permuting rows", layers, len(layers), "layers"):
        rates_SRE = np.stack([_rates(one_RN, routed_NLE[:, place], tokens_N) for one_RN in dealt_SRN])
        information.append(mutual_information(rates_SRE))
        differences_SRE = differences(rates_SRE)
        spread_SE = np.sqrt((differences_SRE**2).mean(axis=1))
        spread.append(spread_SE)
        # An expert that all rows use alike has only rounding errors.
        unit_SE = np.where(spread_SE > ROUNDING, spread_SE, np.inf)
        greatest_R = np.maximum(greatest_R, (differences_SRE / unit_SE[:, None]).max(axis=(0, 2)))
    return Chance(np.stack(information), np.stack(spread, axis=1), greatest_R)


def _rates(weight_RN: Floats, routed_NE: Floats, tokens_N: Floats) -> Floats:
    """Rates (R, E) of a layer in which row n counts weight_RN[r, n] times."""
    rates_RE: Floats = (weight_RN @ routed_NE).astype(np.float64) / (weight_RN @ tokens_N).astype(np.float64)[:, None]
    return rates_RE
