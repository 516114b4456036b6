"""Prune experts: choose those that go, measure what that costs, and write the smaller model.

A pruned model computes what the model before computes with those experts masked. So the loss is measured by masking,
before anything is written.
"""

from collections.abc import Collection, Mapping
from pathlib import Path

from llama_stack_provider_moe.compute.export.shard_files import Progress
from llama_stack_provider_moe.compute.methods.surgery import highest, mass_of
from llama_stack_provider_moe.compute.moe.layout import ExpertLayout, layer_ranges
from llama_stack_provider_moe.compute.surgery.calibrate import Calibration, calibrate, losses
from llama_stack_provider_moe.compute.surgery.plan import single
from llama_stack_provider_moe.compute.surgery.prepared import Decision, Prepared, Rows, measured
from llama_stack_provider_moe.compute.surgery.report import LayerOfExperts, MeasuredLoss
from llama_stack_provider_moe.compute.surgery.resized import describe, resize
from llama_stack_provider_moe.errors import InvalidInput
from llama_stack_provider_moe.spec.surgery import ALL_LAYERS, Surgery


def prepare(folder: Path, asked: Surgery, field: str) -> Prepared:
    """Check everything that can be known from the config.

    Args:
        folder: of the model.
        asked: what to prune.
        field: what comes before the names of the fields in errors.

    Raises:
        InvalidInput: the experts to drop or keep are not valid for this model.
        ModelError, LayoutError: see `describe` and `resize`.
    """
    before = describe(folder)
    layout = before.layout
    dropped = _dropped(asked, layout, field)
    experts = asked.keep if asked.keep is not None else layout.num_experts - len(next(iter(dropped.values())))
    check_number(experts, asked, layout, field)
    if dropped and 1 <= layout.groups_chosen < layout.groups:
        _check_groups(dropped, layout, field)
    return Prepared(asked, before, resize(before, experts), field)


def choose(prepared: Prepared, rows: Rows | None, progress: Progress) -> Decision:
    """Choose the experts that stay, and measure the loss with and without the others.

    Args:
        prepared: what `prepare` found.
        rows: None: the list of experts is enough, and nothing is measured.
        progress: called with the number of passes of rows that are done and their total.

    Raises:
        InvalidInput: the experts are to be chosen by a score, and there are no rows.
        DataError: the rows have no tokens to measure.
    """
    layout, asked = prepared.layout, prepared.asked
    if rows is None:
        if asked.keep is not None:
            raise InvalidInput("data", None, f"rows, because {prepared.name('keep')} chooses by a score; or "
                               f"{prepared.name('drop')}")  # fmt: skip
        return _decision(prepared, _listed(prepared), None, None)
    total = 2 * len(rows.prompts)
    found = calibrate(
        rows.model, layout, rows.prompts, rows.batch_size, contributions=asked.criterion == "reap",
        progress=lambda done, _: progress(done, total),
    )  # fmt: skip
    if asked.criterion is not None:
        groups = layout.groups if layout.groups_chosen < layout.groups else 1
        chosen = highest(found.scores(asked.criterion), prepared.resized.layout.num_experts, groups)
        kept = dict(zip(layout.moe_layers, chosen, strict=True))
    else:
        kept = _listed(prepared)
    masked = {layer: _others(each, layout) for layer, each in kept.items()}
    after = losses(rows.model, layout, rows.prompts, masked, rows.batch_size,
                   lambda done, _: progress(len(rows.prompts) + done, total))  # fmt: skip
    return _decision(prepared, kept, found, measured(after, len(rows.prompts)))


def _listed(prepared: Prepared) -> dict[int, tuple[int, ...]]:
    """Layer -> the experts that the list leaves."""
    dropped = _dropped(prepared.asked, prepared.layout, prepared.field)
    return {layer: tuple(_others(dropped[layer], prepared.layout)) for layer in prepared.layout.moe_layers}


def _others(experts: Collection[int], layout: ExpertLayout) -> list[int]:
    return [expert for expert in range(layout.num_experts) if expert not in experts]


def _dropped(asked: Surgery, layout: ExpertLayout, field: str) -> dict[int, list[int]]:
    """Layer -> the experts of the list; empty if a score chooses."""
    if asked.keep is not None:
        return {}
    named = asked.dropped()
    if ALL_LAYERS in named:
        named = dict.fromkeys(map(str, layout.moe_layers), named[ALL_LAYERS])
    by_layer = {int(layer): experts for layer, experts in named.items()}
    layers = layer_ranges(layout.moe_layers)
    for layer, experts in by_layer.items():
        if layer not in layout.moe_layers:
            raise InvalidInput(f"{field}drop", layer, f"layers with experts: {layers}")
        if strange := [expert for expert in experts if expert >= layout.num_experts]:
            raise InvalidInput(f"{field}drop.{layer}", strange[0], f"experts 0 to {layout.num_experts - 1}")
    if missing := sorted(set(layout.moe_layers) - set(by_layer)):
        raise InvalidInput(f"{field}drop", ", ".join(map(str, by_layer)), f"every layer with experts ({layers}), as a "
                           f"config has one number of experts for all; layer {missing[0]} is missing")  # fmt: skip
    counts = {layer: len(experts) for layer, experts in by_layer.items()}
    if len(set(counts.values())) > 1:
        raise InvalidInput(f"{field}drop", counts, "the same number of experts in every layer, as a config has one "
                           "number for all")  # fmt: skip
    return by_layer


def check_number(experts: int, asked: Surgery, layout: ExpertLayout, field: str) -> None:
    """Check that a router can still choose: enough experts for a token, in groups of equal size."""
    name = f"{field}{'keep' if asked.keep is not None else 'drop'}"
    given = asked.keep if asked.keep is not None else layout.num_experts - experts
    least = max(2, layout.top_k)
    if not least <= experts < layout.num_experts:
        most = layout.num_experts - 1
        expected = f"{least} to {most} experts to keep" if asked.keep is not None else (
            f"1 to {layout.num_experts - least} experts to remove from each layer")  # fmt: skip
        raise InvalidInput(name, given, f"{expected}: the model has {layout.num_experts}, and a token is sent to "
                           f"{layout.top_k} of them")  # fmt: skip
    if layout.groups > 1:
        size = experts // layout.groups
        # A group is scored by its two best experts, also where a token may use all groups.
        if experts % layout.groups or size < 2 or size * layout.groups_chosen < layout.top_k:
            raise InvalidInput(name, given, f"{layout.groups} groups of equal size to stay, of which a token uses "
                               f"{layout.groups_chosen}: at least 2 experts in each, and {layout.top_k} in those "
                               "together")  # fmt: skip


def _check_groups(dropped: dict[int, list[int]], layout: ExpertLayout, field: str) -> None:
    size = layout.num_experts // layout.groups
    for layer, experts in dropped.items():
        counts = [sum(expert // size == group for expert in experts) for group in range(layout.groups)]
        if len(set(counts)) > 1:
            raise InvalidInput(f"{field}drop.{layer}", experts, f"the same number of each of {layout.groups} groups of "
                               f"{size} neighbouring experts, because the router chooses groups first; these are "
                               f"{', '.join(map(str, counts))}")  # fmt: skip


def _decision(
    prepared: Prepared, kept: Mapping[int, tuple[int, ...]], found: Calibration | None, loss: MeasuredLoss | None
) -> Decision:
    layout, by = prepared.layout, prepared.asked.criterion
    dropped = {layer: _others(each, layout) for layer, each in kept.items()}
    scores = None if found is None or by is None else found.scores(by)
    mass = None if found is None else mass_of(found.probability_LE, [dropped[layer] for layer in layout.moe_layers])
    layers = [
        LayerOfExperts(
            layer=layer,
            kept=list(kept[layer]),
            dropped=dropped[layer],
            scores=None if scores is None else scores[at].tolist(),
            mass=None if mass is None else mass[at],
        )
        for at, layer in enumerate(layout.moe_layers)
    ]
    experts = {layer: single(each) for layer, each in kept.items()}
    return Decision(experts, layers, loss, warnings=_warnings(layout, mass))


def _warnings(layout: ExpertLayout, mass: list[float] | None) -> list[str]:
    if layout.weighing != "all":
        return []
    lost = "how much is measured on rows; give some" if mass is None else (
        f"on average {sum(mass) / len(mass):.4f}, and {max(mass):.4f} in the worst layer")  # fmt: skip
    return ["this model's router weights are a softmax over all experts, not renormalised over the chosen "
            f"ones: what the dropped experts had of it goes to the others, {lost}. So even experts that no "
            "token chose change the model when they go"]  # fmt: skip
