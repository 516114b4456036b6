"""A probe from settings and rows, for a job and for `moe-train probe fit`.

Each set is divided into thirds. The first fits the weights at every candidate layer. The second chooses the layers and
sets the threshold. The third measures the probe, and nothing is decided on it.

Shapes: C conversations of a set, N views of all of them, H width.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import torch
from torch import Tensor

from llama_stack_provider_moe.compute.ablation.fingerprint import sha256
from llama_stack_provider_moe.compute.methods.probe import NotFitted, Regression, auc_of, fit, threshold_for
from llama_stack_provider_moe.compute.models.hidden_states import EMBEDDINGS
from llama_stack_provider_moe.compute.probing.artifact import UNWRITTEN
from llama_stack_provider_moe.compute.probing.figures import detection
from llama_stack_provider_moe.compute.probing.prompt_sets import Conversations, Split, check_sets, read_set, split
from llama_stack_provider_moe.compute.probing.states import read_states
from llama_stack_provider_moe.compute.probing.texts import Reader, Reading
from llama_stack_provider_moe.compute.probing.trunk import Trunk, blocks_in, load_trunk
from llama_stack_provider_moe.errors import DataError, InvalidInput
from llama_stack_provider_moe.shields.probe_card import Compared, Detection, ProbeCard, ProbeSet
from llama_stack_provider_moe.spec import ProbeSpec
from llama_stack_provider_moe.spec.ablation import BASELINE, TARGET
from llama_stack_provider_moe.spec.blocks import numbers
from llama_stack_provider_moe.spec.probe import TEST_BASELINE, TEST_TARGET

_DEFAULT_CANDIDATES = 6
_LENGTH_TELLS = 0.75  # AUC of the number of tokens alone that deserves a warning

type Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Fitted:
    """A probe, and how each candidate layer did on the second third.

    Attributes:
        card: with a placeholder for the hash of the weights.
        regressions: one for each of the card's layers.
        candidates: block -> (share of targets detected, AUC).
    """

    card: ProbeCard
    regressions: list[Regression]
    candidates: dict[int, tuple[float, float]]


@dataclass(frozen=True)
class _Scores:
    """Scores of the conversations of each set at one or several layers, the worst view and layer of each: (C)."""

    of: Mapping[str, Tensor]

    def part(self, name: str, rows: Sequence[int]) -> Tensor:
        return self.of[name][torch.tensor(rows, dtype=torch.long)]

    def worst_with(self, other: "_Scores") -> "_Scores":
        return _Scores({name: torch.maximum(scores, other.of[name]) for name, scores in self.of.items()})


def candidates(spec: ProbeSpec, blocks: int) -> list[int]:
    """The decoder blocks to choose from, ascending.

    Args:
        spec: the job.
        blocks: of its model.

    Raises:
        InvalidInput: the model has no such block, or there are fewer than the probe is to read.
    """
    named = spec.probe.layers
    if named is None:
        shares = [0.25 + 0.5 * step / (_DEFAULT_CANDIDATES - 1) for step in range(_DEFAULT_CANDIDATES)]
        found = sorted({int(share * blocks) for share in shares})
    else:
        found = sorted(set(numbers(named)))
    if found[-1] >= blocks:
        raise InvalidInput("probe.layers", named, f"decoder blocks of {spec.model!r}: 0 to {blocks - 1}")
    if len(found) < spec.probe.layers_read:
        raise InvalidInput("probe.layers_read", spec.probe.layers_read, f"at most {len(found)}, the number of blocks "
                           "to choose from")  # fmt: skip
    return found


def fit_probe(
    spec: ProbeSpec, rows: Mapping[str, Path], say: Callable[[str], None], progress: Progress
) -> tuple[Fitted, Trunk]:
    """Load the model, read the states, fit, choose, and measure.

    Args:
        spec: the settings.
        rows: name of a set -> its canonical rows.
        say: called with lines for a person.
        progress: called with the number of texts that are read and their total.

    Raises:
        InvalidInput: layers that the model lacks.
        DataError: rows that can't be scored, or that fit no probe.
        ModelError: the model can't be loaded or read.
    """
    layers = candidates(spec, blocks_in(spec.model))
    say(f"layers to choose from: {', '.join(map(str, layers))}")
    trunk = load_trunk(
        spec.model, spec.adapter_folder, spec.training.dtype, spec.options.chat_template, highest=layers[-1]
    )
    reading = Reading(spec.probe.tokens, spec.probe.position, spec.probe.span)
    reader = Reader(trunk, reading, spec.probe.views, spec.options.max_length)
    sets = {name: read_set(rows[name], source, reader) for name, source in spec.data.sets.items()}
    check_sets(sets, spec.probe.false_positive_rate, say)
    prompts = [prompt for found in sets.values() for views in found.views for prompt in views]
    states = read_states(trunk, prompts, reading, [EMBEDDINGS, *layers], spec.training.batch_size, progress)
    splits = {name: split(sets[name], spec.probe.split, spec.options.seed) for name in (TARGET, BASELINE)}
    try:
        by_layer = {layer: _fitted(sets, splits, states_NH, spec.probe.l2) for layer, states_NH in states.items()}
    except NotFitted as error:
        raise DataError(f"data.sets: no probe fits: {error}") from None
    return _chosen(spec, trunk, rows, sets, splits, by_layer, say), trunk


def _places(sets: Mapping[str, Conversations]) -> dict[str, list[list[int]]]:
    """Of each conversation of each set, where its views are among all prompts."""
    places: dict[str, list[list[int]]] = {}
    at = 0
    for name, found in sets.items():
        places[name] = []
        for views in found.views:
            places[name].append(list(range(at, at + len(views))))
            at += len(views)
    return places


def _fitted(
    sets: Mapping[str, Conversations], splits: Mapping[str, Split], states_NH: Tensor, l2: float
) -> tuple[Regression, _Scores]:
    """Fit on the whole conversations of the first third, and score every conversation by its worst view."""
    places = _places(sets)
    wholes = {name: [places[name][row][0] for row in splits[name].fit] for name in (TARGET, BASELINE)}
    rows = torch.tensor([*wholes[TARGET], *wholes[BASELINE]])
    is_target = torch.arange(len(rows)) < len(wholes[TARGET])
    regression = fit(states_NH[rows], is_target, l2)
    probabilities_N = regression.probabilities(states_NH)
    worst = {
        name: torch.stack([probabilities_N[torch.tensor(views)].max() for views in conversations])
        for name, conversations in places.items()
    }
    return regression, _Scores(worst)


def _chosen(
    spec: ProbeSpec,
    trunk: Trunk,
    rows: Mapping[str, Path],
    sets: Mapping[str, Conversations],
    splits: Mapping[str, Split],
    by_layer: Mapping[int, tuple[Regression, _Scores]],
    say: Callable[[str], None],
) -> Fitted:
    rate, target, baseline = spec.probe.false_positive_rate, splits[TARGET], splits[BASELINE]
    layers = [layer for layer in by_layer if layer != EMBEDDINGS]
    found: dict[tuple[int, ...], tuple[float, float, float]] = {}  # detected, AUC, threshold
    for chosen in combinations(layers, spec.probe.layers_read):
        scores = _together(by_layer, chosen)
        targets, negatives = scores.part(TARGET, target.choose), scores.part(BASELINE, baseline.choose)
        threshold = threshold_for(rate, negatives)
        found[chosen] = (float((targets > threshold).double().mean()), auc_of(targets, negatives), threshold)
    best = max(found, key=lambda chosen: (*found[chosen][:2], -chosen[-1]))
    words = by_layer[EMBEDDINGS][1]
    words_threshold = threshold_for(rate, words.part(BASELINE, baseline.choose))
    scores, threshold = _together(by_layer, best), found[best][2]

    def compared(targets: str, baselines: str, at: tuple[Sequence[int], Sequence[int]]) -> Compared:
        def of(each: _Scores, limit: float) -> Detection:
            return detection(each.part(targets, at[0]), each.part(baselines, at[1]), limit, rate)

        return Compared(probe=of(scores, threshold), lexical=of(words, words_threshold))

    held_out = compared(TARGET, BASELINE, (target.report, baseline.report))
    test = None
    if TEST_TARGET in sets:
        every = tuple(range(len(sets[name].views)) for name in (TEST_TARGET, TEST_BASELINE))
        test = compared(TEST_TARGET, TEST_BASELINE, (every[0], every[1]))
    last = test or held_out
    card = ProbeCard(
        base=trunk.base.model_copy(update={"model": spec.model}),
        layers=list(best),
        tokens=spec.probe.tokens,
        position=spec.probe.position,
        span=spec.probe.span,
        views=spec.probe.views,
        max_length=spec.options.max_length,
        threshold=threshold,
        false_positive_rate=rate,
        negatives=len(baseline.choose),
        fit_rows={name: len(splits[name].fit) for name in splits},
        l2=spec.probe.l2,
        sets={
            name: ProbeSet(source=spec.data.sets[name], rows=len(sets[name].views), sha256=sha256(rows[name]))
            for name in sets
        },
        split=spec.probe.split,
        held_out=held_out,
        test=test,
        length_auc=_length_auc(sets, splits),
        beats_words=last.probe.detected_at_rate.value > last.lexical.detected_at_rate.value,
        weights=UNWRITTEN,
    )
    _warn(card, say)
    singles = {layer: _alone(by_layer[layer][1], splits, rate) for layer in layers}
    return Fitted(card, [by_layer[layer][0] for layer in best], singles)


def _together(by_layer: Mapping[int, tuple[Regression, _Scores]], layers: Sequence[int]) -> _Scores:
    scores = by_layer[layers[0]][1]
    for layer in layers[1:]:
        scores = scores.worst_with(by_layer[layer][1])
    return scores


def _alone(scores: _Scores, splits: Mapping[str, Split], rate: float) -> tuple[float, float]:
    targets, negatives = (scores.part(name, splits[name].choose) for name in (TARGET, BASELINE))
    return float((targets > threshold_for(rate, negatives)).double().mean()), auc_of(targets, negatives)


def _length_auc(sets: Mapping[str, Conversations], splits: Mapping[str, Split]) -> float:
    """AUC of the number of tokens alone, on the last third."""
    lengths = [
        torch.tensor([float(len(sets[name].views[row][0].ids)) for row in splits[name].report])
        for name in (TARGET, BASELINE)
    ]
    return auc_of(lengths[0], lengths[1])


def _warn(card: ProbeCard, say: Callable[[str], None]) -> None:
    if not card.beats_words:
        say("warning: the probe detects no more than the same regression on a bag of embeddings, which knows words "
            "alone; a list of words would do as well")  # fmt: skip
    if max(card.length_auc, 1 - card.length_auc) > _LENGTH_TELLS:
        say(f"warning: the number of tokens alone tells the sets apart with an AUC of {card.length_auc:.3f}; the probe "
            "may have learnt that; give sets of similar lengths")  # fmt: skip
