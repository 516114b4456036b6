"""Which implementation computes a model's experts: the one place that decides it.

`by_settings` decides from the `moe` block and the layout alone; planning needs no more. `check` refuses what this
device can't do, before the weights are quantised. `choose` decides on the loaded model: with `experts_backend: auto`
on a GPU it times the kernels on a layer. `install` puts the implementation on the model.
"""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Literal

import torch
from torch import nn

from llama_stack_provider_moe.compute.moe.backend import (
    ALL_OURS,
    OURS,
    OURS_PARTIAL,
    PARTIAL,
    QUACK,
    QUACK_PARTIAL,
    TRITON,
    TRITON_PARTIAL,
    activation_of,
    can_recompute,
    kernels_of,
    projections,
    recomputes,
    replace_loops,
)
from llama_stack_provider_moe.compute.moe.exceptions import KNOWN_LOOPS
from llama_stack_provider_moe.compute.moe.kernel_choice import form_of, rank_on_experts, run_trial
from llama_stack_provider_moe.compute.moe.kernel_trial import Compared
from llama_stack_provider_moe.compute.moe.kernels import quack, reference
from llama_stack_provider_moe.compute.moe.layout import ExpertLayout, text_config, without_adapters
from llama_stack_provider_moe.errors import ModelError
from llama_stack_provider_moe.spec import Moe, TrainingSpec

if TYPE_CHECKING:
    from llama_stack_provider_moe.compute.moe.kernels.tiles import Choice
    from llama_stack_provider_moe.compute.moe.layout import ExpertsModule

ExpertsImplementation = Literal[
    "moe_torch", "moe_torch_partial", "moe_triton", "moe_triton_partial", "moe_quack", "moe_quack_partial",
    "grouped_mm", "eager", "unsloth",
]  # fmt: skip
# (all tokens have as many experts, some have fewer)
_NAMED: dict[Compared, tuple[ExpertsImplementation, ExpertsImplementation]] = {
    "triton": (TRITON, TRITON_PARTIAL), "quack": (QUACK, QUACK_PARTIAL),
}  # fmt: skip
_CALLED: dict[Compared, str] = {"triton": "Triton's kernels", "quack": "quack-kernels"}


@dataclass(frozen=True)
class ImplementationChoice:
    """An implementation, and what the job's log says about it."""

    implementation: ExpertsImplementation
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Decision:
    """What rank 0 decided for all processes: the choice, its tiles, or why the job can't run as it asks."""

    choice: ImplementationChoice
    tiles: "tuple[Choice, ...]" = ()
    refusal: str = ""


def by_settings(moe: Moe, layout: ExpertLayout) -> ImplementationChoice:
    """The implementation that the settings ask for, whatever the device."""
    if not moe.enable_moe_optimizations:
        return ImplementationChoice("eager")
    if not layout.grouped_mm and layout.experts_class not in KNOWN_LOOPS:
        return ImplementationChoice(
            "eager", (f"{layout.experts_class} computes experts in a loop that this version does not know",)
        )
    if moe.experts_backend == "peft":
        if layout.grouped_mm:
            return ImplementationChoice("grouped_mm")
        return ImplementationChoice(
            "eager", (f"{layout.family} has no grouped implementation of its experts in transformers",)
        )
    some_have_fewer = moe.moe_load_balancing == "expert_choice"
    if moe.experts_backend in ("triton", "quack"):
        return ImplementationChoice(_NAMED[moe.experts_backend][some_have_fewer])
    return ImplementationChoice(OURS_PARTIAL if some_have_fewer else OURS)


def check(spec: TrainingSpec, implementation: ExpertsImplementation | None, device: torch.device) -> None:
    """Refuse an implementation that this device or the job's adapter rules out; None: a dense model.

    Raises:
        ModelError: kernels for GPUs without one, or quantised experts that our kernels don't compute.
    """
    for name, named in _NAMED.items():
        if implementation in named and not (runs_triton(device) if name == "triton" else device.type == "cuda"):
            extra = "" if name == "triton" else " and quack-kernels (extra 'quack')"
            raise ModelError(
                f"moe.experts_backend: '{name}' is not valid here; it needs a CUDA GPU (sm_80 or newer){extra}, "
                "expected 'auto' or 'torch'"
            )
    quantized = spec.adapter is not None and spec.adapter.quantize_base
    if quantized and implementation is not None and implementation not in ALL_OURS:
        raise ModelError(
            f"adapter.quantize_base: true is not valid with moe.experts_backend {spec.moe.experts_backend!r} and "
            f"moe.enable_moe_optimizations {str(spec.moe.enable_moe_optimizations).lower()}, which compute experts by "
            f"{implementation}; expected 'auto' or 'torch', and true"
        )


def choose(
    spec: TrainingSpec,
    moe: Moe,
    model: nn.Module,
    layout: ExpertLayout,
    device: torch.device,
    decided: "Callable[[Callable[[], Decision]], Decision]",
) -> ImplementationChoice:
    """Decide on the loaded model; the notes come after those of `by_settings`.

    Args:
        spec: the job.
        moe: its `moe` block, with what a resumption has changed.
        model: the loaded model; its experts are already quantised if the job asks for it.
        layout: where the experts are.
        device: the model's device.
        decided: rank 0's decision for every process, because kernels are timed and clocks differ; only rank 0 decides.

    Raises:
        ModelError: the job asks for kernels that failed the trial.
    """
    choice = replace(by_settings(moe, layout), notes=())
    experts = next(iter(layout.experts(model).values()))
    named = next((name for name, both in _NAMED.items() if choice.implementation in both), None)
    if runs_triton(device) and (named or (moe.experts_backend == "auto" and choice.implementation in ALL_OURS)):
        decision = decided(partial(_tried, spec, layout, experts, device, choice, named))
        if decision.refusal:
            raise ModelError(decision.refusal)
        choice = decision.choice
        if decision.tiles:
            from llama_stack_provider_moe.compute.moe.kernels import tiles  # Triton is not installed everywhere

            tiles.install(decision.tiles)
    if choice.implementation not in ALL_OURS:
        return choice
    rank = 0 if spec.adapter is None else rank_on_experts(spec.adapter)
    limits = limitations(experts, choice.implementation, device, rank=rank)
    return replace(choice, notes=(*choice.notes, *limits))


def runs_triton(device: torch.device) -> bool:
    """Whether Triton's kernels run on this kind of device: a GPU, or any where Triton interprets them."""
    return device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"


def _tried(
    spec: TrainingSpec,
    layout: ExpertLayout,
    experts: "ExpertsModule",
    device: torch.device,
    choice: ImplementationChoice,
    named: Compared | None,
) -> Decision:
    """Torch's kernels or others, whichever are fastest on a layer like the model's; if `named`, those, checked."""
    tokens = spec.training.batch_size * spec.options.max_length
    fastest, notes = Decision(choice), list[str]()
    best_ms = math.inf
    for name in (named,) if named else _compared():
        why = _lacks(name, device, experts)
        if why is not None and named:
            refusal = f"moe.experts_backend: '{name}' is not valid here: {why}; expected 'auto' or 'torch'"
            return Decision(choice, refusal=refusal)
        if (why := why or _no_trial(spec, experts, named is not None)) is not None:
            notes.append(f"{_CALLED[name]} were not tried: {why}")
            continue
        if device.type == "cuda":
            torch.cuda.empty_cache()  # the child needs memory of the same device
        trials = run_trial(replace(form_of(spec, experts, layout, device, tokens), kernels=name))
        notes.append(trials.text())
        ms = trials.other.ms
        if named and ms is None:
            return Decision(choice, refusal=f"moe.experts_backend: '{name}' is not valid here: {trials.text()}; "
                            "expected 'auto' or 'torch'")  # fmt: skip
        if named or (trials.prefer_other and ms is not None and ms < best_ms):
            best_ms = ms or math.inf
            implementation = _NAMED[name][choice.implementation in PARTIAL]
            fastest = Decision(ImplementationChoice(implementation), trials.tiles)
    return replace(fastest, choice=replace(fastest.choice, notes=tuple(notes)))


def _compared() -> tuple[Compared, ...]:
    """What `auto` compares with torch's kernels: quack-kernels only where somebody installed it."""
    return ("triton", "quack") if quack.installed() else ("triton",)


def _lacks(name: Compared, device: torch.device, experts: "ExpertsModule") -> str | None:
    """What the kernels need and this machine or model lacks; None: nothing."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return "they need sm_80 or newer"
    if name == "triton":
        return None if find_spec("triton") is not None else "triton is not installed"
    if quack.installed() is None:
        return "quack-kernels is not installed (extra 'quack')"
    dtype = projections(experts)[0].weight.dtype
    return None if dtype in quack.DTYPES else f"they compute in bf16 and fp16, not in {str(dtype).split('.')[-1]}"


def _no_trial(spec: TrainingSpec, experts: "ExpertsModule", named: bool) -> str | None:
    """Why no kernels are tried for this job; None where they are."""
    if spec.resources.strategy == "ep":
        return "each process holds different experts (resources.strategy ep)"
    if spec.options.deterministic and not named:
        return "timing must not decide in a repeatable job (options.deterministic)"
    if not can_recompute(experts):
        return "experts have a norm after the down projection"
    return None


def limitations(
    experts: "ExpertsModule", implementation: ExpertsImplementation, device: torch.device, *, rank: int
) -> list[str]:
    """What the kernels of one of `ALL_OURS` can't do at full speed here, and what happens instead.

    Args:
        experts: the experts of one layer.
        implementation: one of `ALL_OURS`.
        device: the model's device.
        rank: rank of LoRA on experts; 0: no LoRA.
    """
    kernels = kernels_of(implementation)
    notes = []
    if kernels is not reference:
        if activation_of(experts).kind == "other" and kernels is not quack:
            notes.append(f"torch computes the activation of {type(experts).__name__}: no kernel has its formula")
        if rank > kernels.WIDEST_RANK:
            notes.append(
                f"LoRA of rank {rank} takes products of its own: one pass with the base holds at most rank "
                f"{kernels.WIDEST_RANK}"
            )
    if recomputes(kernels, device) and not can_recompute(experts):
        notes.append("all activations of experts are kept: they have a norm after the down projection")
    return notes


def install(model: nn.Module, layout: ExpertLayout, implementation: ExpertsImplementation) -> None:
    """Have the model's experts run by `implementation`.

    Raises:
        ModelError: the model did not take it.
    """
    if not layout.grouped_mm:  # transformers has only the eager loop for these
        if implementation in ALL_OURS:
            replace_loops(model, layout, implementation)
        return
    if implementation in ALL_OURS:
        kernels_of(implementation)
    without_adapters(model).set_experts_implementation(implementation)
    installed = text_config(model)._experts_implementation
    if installed != implementation:
        raise ModelError(
            f"moe.enable_moe_optimizations: {layout.family} experts run as {installed!r}, not as {implementation!r}"
        )


def available(implementation: ExpertsImplementation, device: str) -> ExpertsImplementation:
    """The same computation by kernels that run on this kind of device; Triton's and quack-kernels' need a GPU."""
    if device == "cuda":
        return implementation
    on_a_cpu: dict[str, ExpertsImplementation] = {
        TRITON: OURS, TRITON_PARTIAL: OURS_PARTIAL, QUACK: OURS, QUACK_PARTIAL: OURS_PARTIAL
    }  # fmt: skip
    return on_a_cpu.get(implementation, implementation)
