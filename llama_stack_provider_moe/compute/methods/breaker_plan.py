"""From a job's `circuit_breaker` block and its model: which blocks are rerouted, which get LoRA, and loss weights."""

from dataclasses import dataclass

from transformers import PreTrainedModel

from llama_stack_provider_moe.compute.methods.schedules import Coefficients, between, paper
from llama_stack_provider_moe.compute.models.hidden_states import EMBEDDINGS
from llama_stack_provider_moe.compute.moe.layout import ExpertLayout, decoder_layers, text_config
from llama_stack_provider_moe.compute.moe.resolve_settings import ResolvedMoe
from llama_stack_provider_moe.errors import AdapterError, ModelError
from llama_stack_provider_moe.spec import Adapter, BreakerSpec, CircuitBreaker, numbers
from llama_stack_provider_moe.spec.breaker import PRESETS, depth_rule, preset_for


@dataclass(frozen=True)
class BreakerPlan:
    """The decisions.

    Attributes:
        block: the job's `circuit_breaker` block.
        adapter: the job's adapter with its layers filled in.
        targets: blocks whose outputs are rerouted, from 0.
        retained_at: blocks where the retain distance is taken. With `retain_layers: all`, as in the official code, all
            of `hidden_states`: the embeddings (`hidden_states.EMBEDDINGS`, which LoRA never moves), each block but the
            last, and the last one after the final norm (index: the number of blocks).
        whole: all blocks run in training.
        logits: RepBend's KL needs the model's logits.
        alpha: alpha of weighting `paper`.
        schedule_steps: T, in optimiser steps; None: all steps of the job.
        preset: the preset that fills in missing settings; None: the rule by depth.
        source: where those values come from.
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
        """Coefficients of optimiser step `step`, from 1, in a job of `max_steps`."""
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
        """Coefficients at the end of the schedule: the same measure for all evaluations of a job."""
        return self.coefficients(self.schedule_steps or max_steps, max_steps)

    def text(self) -> str:
        """The decisions as one line for the start of a job's log."""
        weights = {"paper": f"paper, alpha {self.alpha:g}, {self.block.schedule}", "dual": "dual"}[self.block.weighting]
        steps = "all steps" if self.schedule_steps is None else f"{self.schedule_steps} steps"
        method = "RepBend" if self.block.variant == "repbend" else f"rerouting, weighting {weights} over {steps}"
        return (
            f"breaks    {method}; blocks {_listed(self.targets)} (from 0), LoRA on {self.adapter.layers}, "
            f"{'all blocks run' if self.whole else 'no block above runs'}; defaults from {self.source}"
        )

    def _name(self, block: int) -> int | str:
        if self.block.retain_layers == "all" and block in (self.retained_at[0], self.retained_at[-1]):
            return "embeddings" if block == EMBEDDINGS else "final norm"
        return block

    def as_json(self) -> dict[str, object]:
        """The decisions for `resolved.json`."""
        return {
            "circuit_breaker": {
                "variant": self.block.variant,
                "target_layers": list(self.targets),
                "retain_layers": [self._name(block) for block in self.retained_at],
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
    """Fill in the settings that the job leaves open.

    Args:
        spec: the job.
        model: the base model, possibly on the meta device.
        layout: where its experts are; None: a dense model.
        resolved: the job's `moe` block, decided.

    Raises:
        ModelError: the model does not have a target block.
        AdapterError: LoRA on layers where it can't reroute or would never train.
    """
    block, config = spec.circuit_breaker, text_config(model)
    assert spec.adapter is not None, "checked at the door"
    depth = len(decoder_layers(model)[1])
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
        retained_at=(EMBEDDINGS, *range(depth - 1), depth) if block.retain_layers == "all" else targets,
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
    """The job's adapter with its layers filled in; `per_expert` rules without layers get all layers with LoRA."""
    if adapter.apply_lora_to_output and not logits:
        raise AdapterError(
            "adapter.apply_lora_to_output: true is not valid here: no part of the loss depends on the output head"
        )
    if adapter.layers is not None:
        layers = sorted(set(numbers(adapter.layers)))
        if layers[0] > targets[-1]:
            raise AdapterError(
                f"adapter.layers: {adapter.layers!r} starts above the last target, block {targets[-1]}; LoRA there "
                "can't reroute it"
            )
        if layers[-1] > targets[-1] and not whole:
            raise AdapterError(
                f"adapter.layers: {adapter.layers!r} names layer {layers[-1]}, above the last target, block "
                f"{targets[-1]}; no block above it runs, so LoRA there would never train "
                "(circuit_breaker.retain_layers 'all' runs every block)"
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
