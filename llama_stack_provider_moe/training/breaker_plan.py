"""A job's `circuit_breaker` block and its model -> which blocks are rerouted, which get LoRA, with what weights."""

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from llama_stack_provider_moe.errors import AdapterError, ModelError
from llama_stack_provider_moe.experts.layout import ExpertLayout, text_config
from llama_stack_provider_moe.experts.settings import ResolvedMoe
from llama_stack_provider_moe.losses.schedules import Coefficients, between, paper
from llama_stack_provider_moe.spec import Adapter, BreakerSpec, CircuitBreaker, numbers
from llama_stack_provider_moe.spec.breaker import PRESETS, depth_rule, preset_for


@dataclass(frozen=True)
class BreakerPlan:
    """What was decided.

    Attributes:
        targets: blocks whose outputs are rerouted, from 0.
        retained_at: blocks where the retain distance is taken.
        whole: all blocks run in training.
        logits: RepBend's KL needs the model's logits.
        alpha: of weighting `paper`.
        schedule_steps: T, in optimiser steps; None: all of the job's.
        preset: whose values stand where the job says nothing; None: the rule's.
        source: of these values.
    """

    block: CircuitBreaker
    adapter: Adapter
    targets: tuple[int, ...]
    retained_at: tuple[int, ...]
    whole: bool
    logits: bool
    alpha: float
    schedule_steps: int | None
    preset: str | None
    source: str

    def coefficients(self, step: int, max_steps: int) -> Coefficients:
        """Of optimiser step `step`, from 1, of a job of `max_steps`."""
        block, steps = self.block, self.schedule_steps or max_steps
        if block.variant == "repbend":
            return Coefficients(1.0, 1.0)
        if block.reroute_curve is None or block.retain_curve is None:
            return paper(step, steps, self.alpha, block.schedule)
        one, other = block.reroute_curve, block.retain_curve
        return Coefficients(
            between(step, steps, one.start, one.end, one.schedule),
            between(step, steps, other.start, other.end, other.schedule),
        )

    def final(self, max_steps: int) -> Coefficients:
        """Of the schedule's end: one measure for all evaluations of a job."""
        return self.coefficients(self.schedule_steps or max_steps, max_steps)

    def text(self) -> str:
        """The same, for the start of a job's log."""
        weights = {"paper": f"paper, alpha {self.alpha:g}, {self.block.schedule}", "dual": "dual"}[self.block.weighting]
        steps = "all steps" if self.schedule_steps is None else f"{self.schedule_steps} steps"
        told = "RepBend" if self.block.variant == "repbend" else f"rerouting, weighting {weights} over {steps}"
        return (
            f"breaks    {told}; blocks {_listed(self.targets)} (from 0), LoRA on {self.adapter.layers}, "
            f"{'all blocks run' if self.whole else 'no block above runs'}; values left out: {self.source}"
        )

    def as_json(self) -> dict[str, Any]:
        """For `resolved.json`."""
        return {
            "circuit_breaker": {
                "variant": self.block.variant,
                "target_layers": list(self.targets),
                "retain_layers": list(self.retained_at),
                "lora_layers": self.adapter.layers,
                "all_blocks_run": self.whole,
                "alpha": self.alpha,
                "schedule_steps": self.schedule_steps,
                "preset": self.preset,
                "source": self.source,
            },
            "reference": "the adapter off",
        }


def decide(
    spec: BreakerSpec, model: PreTrainedModel, layout: ExpertLayout | None, resolved: ResolvedMoe
) -> BreakerPlan:
    """Fill in what the job leaves to the model.

    Raises:
        ModelError: a target that the model has not.
        AdapterError: LoRA where it can't reroute, or would never train.
    """
    block, config = spec.circuit_breaker, text_config(model)
    assert spec.adapter is not None, "checked at the door"
    depth = int(config.num_hidden_layers)
    name, preset = preset_for(config.model_type, depth, int(config.hidden_size))
    if block.preset is not None:
        name, preset = block.preset, PRESETS[block.preset]
    asked = None if block.target_layers is None else tuple(sorted(set(numbers(block.target_layers))))
    targets = asked or preset.targets or depth_rule(depth)
    if targets[-1] >= depth:
        field = "circuit_breaker.target_layers" if asked else "circuit_breaker.preset"
        value = block.target_layers if asked else block.preset
        raise ModelError(f"{field}: {value!r} names block {targets[-1]}; this model has 0 to {depth - 1}")
    logits = block.variant == "repbend" and block.repbend.kl > 0
    balance = resolved.aux_coef > 0 or resolved.z_coef > 0
    whole = block.retain_layers == "all" or logits or balance
    last_lora = targets[-1] if asked or preset.last_lora is None else preset.last_lora
    if not whole:
        last_lora = min(last_lora, targets[-1])
    adapter = _adapter(spec.adapter, layout, targets, last_lora, depth, whole, logits)
    return BreakerPlan(
        block=block,
        adapter=adapter,
        targets=targets,
        retained_at=tuple(range(depth)) if block.retain_layers == "all" else targets,
        whole=whole,
        logits=logits,
        alpha=block.alpha or preset.alpha,
        schedule_steps=block.schedule_steps,
        preset=name,
        source=preset.source,
    )


def _adapter(
    adapter: Adapter,
    layout: ExpertLayout | None,
    targets: tuple[int, ...],
    last_lora: int,
    depth: int,
    whole: bool,
    logits: bool,
) -> Adapter:
    """The job's adapter with its layers; rules of `per_expert` that name none get those that have LoRA at all."""
    if adapter.apply_lora_to_output and not logits:
        raise AdapterError(
            "adapter.apply_lora_to_output: true is not valid here: nothing that is trained on depends on the head"
        )
    if adapter.layers is not None:
        layers = sorted(set(numbers(adapter.layers)))
        if layers[0] > targets[-1]:
            raise AdapterError(
                f"adapter.layers: {adapter.layers!r} begins above the last target, block {targets[-1]}, which LoRA "
                "there can't reroute"
            )
        if layers[-1] > targets[-1] and not whole:
            raise AdapterError(
                f"adapter.layers: {adapter.layers!r} names layer {layers[-1]}, above the last target, block "
                f"{targets[-1]}, where nothing runs; LoRA there would never train (circuit_breaker.retain_layers 'all' "
                "runs every block)"
            )
    else:
        layers = list(range(min(last_lora, depth - 1) + 1))
        adapter = adapter.model_copy(update={"layers": f"0-{layers[-1]}"})
    if adapter.plan == "per_expert" and layout is not None:
        here = ",".join(str(layer) for layer in layout.moe_layers if layer in layers)
        rules = [rule if rule.layers else rule.model_copy(update={"layers": here}) for rule in adapter.rules]
        if not here:
            raise AdapterError(f"adapter.plan: 'per_expert' finds no experts in layers {adapter.layers}")
        adapter = adapter.model_copy(update={"rules": rules})
    return adapter


def _listed(blocks: tuple[int, ...]) -> str:
    return ", ".join(map(str, blocks))
