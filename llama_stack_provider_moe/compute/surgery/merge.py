"""Merge experts that are alike: choose the clusters, measure what that costs, and say what each new expert is made of.

See `compute.methods.expert_merging` for the formulas. The loss is measured on the new model in memory (`twin`), before
anything is written.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llama_stack_provider_moe.compute.export.shard_files import Progress
from llama_stack_provider_moe.compute.methods.expert_merging import (
    Clusters,
    distances,
    distances_of_gram,
    hierarchical_clusters,
    matching_neurons,
    router_guided_clusters,
    shares_by_use,
)
from llama_stack_provider_moe.compute.surgery.calibrate import calibrate, losses_of
from llama_stack_provider_moe.compute.surgery.observe import logit_products, mean_outputs
from llama_stack_provider_moe.compute.surgery.plan import Blend, Expert
from llama_stack_provider_moe.compute.surgery.prepared import Decision, Prepared, Rows, measured
from llama_stack_provider_moe.compute.surgery.prune import check_number
from llama_stack_provider_moe.compute.surgery.report import LayerOfExperts
from llama_stack_provider_moe.compute.surgery.resized import describe, resize
from llama_stack_provider_moe.compute.surgery.slices import Reader, neurons_first, permuted
from llama_stack_provider_moe.compute.surgery.twin import twin_of
from llama_stack_provider_moe.errors import InvalidInput
from llama_stack_provider_moe.ground import liveness
from llama_stack_provider_moe.spec.surgery import Surgery


def prepare(folder: Path, asked: Surgery, field: str) -> Prepared:
    """Check everything that can be known from the config; see `prune.prepare`."""
    before = describe(folder)
    assert asked.keep is not None, "the spec checks it"
    check_number(asked.keep, asked, before.layout, field)
    return Prepared(asked, before, resize(before, asked.keep), field)


def choose(prepared: Prepared, rows: Rows | None, progress: Progress) -> Decision:
    """Choose the clusters, and measure the loss of the model that comes of them.

    Args:
        prepared: what `prepare` found.
        rows: None: experts are alike in their weights, count the same, and nothing is measured.
        progress: called with the number of passes of rows that are done and their total.

    Raises:
        InvalidInput: the likeness is measured on rows, and there are none.
        DataError: the rows have no tokens to measure.
    """
    layout, asked = prepared.layout, prepared.asked
    if rows is None and asked.likeness != "weights":
        raise InvalidInput("data", None, f"rows, because {prepared.name('by')} {asked.likeness!r} is measured on them; "
                           f"or {prepared.name('by')} 'weights'")  # fmt: skip
    passes = 2 if asked.likeness == "weights" else 3
    usage_LE = torch.zeros(len(layout.moe_layers), layout.num_experts, dtype=torch.float64)
    if rows is not None:
        usage_LE = calibrate(rows.model, layout, rows.prompts, rows.batch_size, contributions=False,
                             progress=_pass(progress, 0, passes)).count_LE  # fmt: skip
    reader = Reader(prepared.before, prepared.resized.axes)
    found = _clusters(prepared, rows, usage_LE, reader, _pass(progress, 1, passes))
    experts: dict[int, list[Expert]] = {}
    layers = []
    for at, layer in enumerate(layout.moe_layers):
        shares = [shares_by_use(cluster, usage_LE[at]) for cluster in found[at]]
        experts[layer] = [
            _expert(reader, layer, cluster, each, asked.aligned)
            for cluster, each in zip(found[at], shares, strict=True)
        ]
        layers.append(_reported(layer, found[at], shares, None if rows is None else usage_LE[at]))
    loss = None
    if rows is not None:
        assert isinstance(rows.model, PreTrainedModel), "a model without adapters"
        twin = twin_of(rows.model, prepared.resized, experts)
        after = losses_of(rows.model, twin, rows.prompts, rows.batch_size, _pass(progress, passes - 1, passes))
        loss = measured(after, len(rows.prompts))
    return Decision(experts, layers, loss, warnings=_warnings(prepared, rows))


def _clusters(
    prepared: Prepared, rows: Rows | None, usage_LE: Tensor, reader: "Reader", progress: Progress
) -> list[Clusters]:
    layout, keep = prepared.layout, prepared.resized.layout.num_experts
    groups = layout.groups if layout.groups_chosen < layout.groups else 1
    if prepared.asked.likeness == "weights":
        grams = liveness.counted("comparing weights", layout.moe_layers, len(layout.moe_layers), "layers")
        return [hierarchical_clusters(distances_of_gram(reader.products(layer)), keep, groups) for layer in grams]
    assert rows is not None, "checked above"
    if prepared.asked.likeness == "outputs":
        outputs_LEH = mean_outputs(rows.model, layout, rows.prompts, rows.batch_size, progress)
        return [hierarchical_clusters(distances(each_EH), keep, groups) for each_EH in outputs_LEH]
    products_LEE = logit_products(rows.model, layout, rows.prompts, rows.batch_size, progress)
    return [
        router_guided_clusters(each_EE, usage_E, keep, groups)
        for each_EE, usage_E in zip(products_LEE, usage_LE, strict=True)
    ]


def _expert(reader: "Reader", layer: int, cluster: Sequence[int], shares: Sequence[float], aligned: bool) -> Expert:
    # An expert that no token chose has no share; it is left out, so that its numbers are not even read.
    blend: Blend = tuple((old, share) for old, share in zip(cluster, shares, strict=True) if share > 0)
    return Aligned(reader, layer, blend) if aligned and len(blend) > 1 else blend


@dataclass(frozen=True)
class Aligned:
    """A sum of experts whose hidden neurons are permuted to match those of the one with the largest share."""

    reader: "Reader"
    layer: int
    blend: Blend

    def part(self, parameter: str) -> Tensor:
        """See `plan.NewExpert`."""
        total = torch.zeros(())
        for old, share in self.blend:
            part = self.reader.part(parameter, old)
            if old in self._orders:
                part = permuted(part, parameter, self.reader.layout, self._orders[old], self.reader.turns)
            total = total + share * part
        return total

    @cached_property
    def _orders(self) -> dict[int, Tensor]:
        first = max(self.blend, key=lambda each: each[1])[0]
        wanted = self._neurons(first)
        return {
            old: matching_neurons(wanted, self._neurons(old))
            for old, _ in liveness.counted(f"aligning experts of layer {self.layer}", self.blend, len(self.blend),
                                           "experts")
            if old != first
        }  # fmt: skip

    def _neurons(self, expert: int) -> list[Tensor]:
        reader = self.reader
        found = [
            neurons_first(reader.part(name, expert), name, reader.layout, reader.neurons, reader.turns)
            for name in reader.of_layer(self.layer)
        ]
        return [each for each in found if each is not None]


def _reported(
    layer: int, clusters: Clusters, shares: Sequence[Sequence[float]], usage_E: Tensor | None
) -> LayerOfExperts:  # fmt: skip
    kept = [cluster[max(range(len(cluster)), key=each.__getitem__)] for cluster, each in zip(clusters, shares,
                                                                                             strict=True)]  # fmt: skip
    dropped = sorted({old for cluster in clusters for old in cluster} - set(kept))
    return LayerOfExperts(
        layer=layer, kept=kept, dropped=dropped, scores=None if usage_E is None else usage_E.tolist(),
        clusters=[list(each) for each in clusters], shares=[list(each) for each in shares],
    )  # fmt: skip


def _warnings(prepared: Prepared, rows: Rows | None) -> list[str]:
    found = ["the router has one row for each cluster, where the papers on merging keep one for each old expert: a "
             "token that chose two experts of a cluster gets another expert as well"]  # fmt: skip
    if rows is None:
        found.append("without rows every expert of a cluster has the same share, and the loss is not measured")
    return found


def _pass(progress: Progress, number: int, passes: int) -> Progress:
    """Progress of pass `number` as part of all passes."""
    return lambda done, total: progress(number * total + done, passes * total)
