"""The trial behind `experts_backend: auto` on a GPU: run an expert layer with each kernel, keep the best.

A table of which kernels win where would hold for one GPU, driver and Triton version only. So the trial runs a layer of
the model itself, with random tokens and the job's rank: forward and backward by torch's products and by our Triton
kernels. A kernel whose output or gradients differ from torch's is rejected, however fast.
"""

import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from triton import TritonError

from llama_stack_provider_moe.compute.moe.backend import activation_of, projections
from llama_stack_provider_moe.compute.moe.kernels.groups import sort_by_expert
from llama_stack_provider_moe.compute.moe.kernels.layer import Projection, expert_layer
from llama_stack_provider_moe.compute.moe.kernels.linear import Kernels, Lora
from llama_stack_provider_moe.compute.moe.kernels.reference import Stored
from llama_stack_provider_moe.ground import liveness

if TYPE_CHECKING:
    from llama_stack_provider_moe.compute.moe.layout import ExpertsModule

# Relative to the norm. Correct kernels differ by a few roundings of intermediate values; a wrong tile by far more.
AGREES = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}
REPETITIONS = 10


@dataclass(frozen=True)
class Trial:
    """Result of one implementation: ms for forward and backward, or the reason for rejecting it."""

    ms: float | None
    reason: str = ""


def fastest(trials: Mapping[str, Trial]) -> str:
    """The name of the fastest implementation that was not rejected."""
    ms = {name: trial.ms for name, trial in trials.items() if trial.ms is not None}
    return min(ms, key=lambda name: ms[name])


def summary(trials: Mapping[str, Trial], tokens: int) -> str:
    """One line for the start of a job's log."""
    parts = [
        f"{name} {each.reason}" if each.ms is None else f"{name} {each.ms:.3g} ms" for name, each in trials.items()
    ]
    return f"one layer forward and backward, {tokens:,} tokens: {', '.join(parts)}"


def try_layer(
    experts: "ExpertsModule", candidates: Mapping[str, Kernels], *, tokens: int, hidden: int, top_k: int, rank: int
) -> dict[str, Trial]:
    """Run `experts` with each candidate, compare with the first, and time those that agree.

    Args:
        experts: the experts of one layer, on their device, before LoRA is added.
        candidates: name -> kernels; the first is the reference.
        tokens: tokens of a micro-batch.
        hidden: the model's hidden size.
        top_k: experts per token.
        rank: rank of LoRA; 0: no LoRA, and weights that train get gradients themselves.
    """
    run = _prepare(experts, tokens, hidden, top_k, rank)
    (first, *others) = candidates.items()
    with liveness.stage("trying kernels", len(candidates), "implementations") as counter:
        expected = run(first[1])
        trials = {first[0]: Trial(_time(lambda: run(first[1])))}
        counter.advance()
        for name, kernels in others:
            trials[name] = _try(partial(run, kernels), expected)
            counter.advance()
    return trials


def _try(run: Callable[[], list[Tensor]], expected: list[Tensor]) -> Trial:
    try:
        found = run()
        error = max(
            float((one.float() - other.float()).norm() / other.float().norm().clamp(min=1e-20))
            for one, other in zip(found, expected, strict=True)
        )
        if not error <= AGREES[expected[0].dtype]:  # so that NaN fails
            return Trial(None, f"is off by {error:.2g} of the norm, so it is not used")
        return Trial(_time(run))
    # Triton raises these when it can't compile a kernel or, without a C compiler, its launcher.
    except (TritonError, RuntimeError, subprocess.CalledProcessError) as failure:
        return Trial(None, f"failed ({type(failure).__name__}: {str(failure).splitlines()[0][:200]})")


def _prepare(
    experts: "ExpertsModule", tokens: int, hidden: int, top_k: int, rank: int
) -> Callable[[Kernels], list[Tensor]]:
    """A function that runs the layer forward and backward and returns output and gradients; the model keeps none."""
    up, down = projections(experts)
    count = _shape(up)[0]
    device = next(experts.parameters()).device
    generator = torch.Generator(device).manual_seed(0)
    dtype = up.weight.dtype

    def random(*shape: int, scale: float = 1.0) -> Tensor:
        made = torch.randn(*shape, device=device, generator=generator) * scale
        return made.to(dtype).requires_grad_()

    leaves = [random(tokens, hidden), random(tokens, top_k)]
    index_TK = torch.rand(tokens, count, device=device, generator=generator).topk(top_k).indices
    inner = _shape(down)[2]
    if rank:
        for each, inputs in ((up, hidden), (down, inner)):
            leaves.append(random(count, rank, inputs, scale=inputs**-0.5))
            leaves.append(random(count, _shape(each)[1], rank, scale=rank**-0.5))
        up, down = up._replace(lora=Lora(leaves[2], leaves[3])), down._replace(lora=Lora(leaves[4], leaves[5]))
    trained = [each for each in (up.weight, down.weight) if isinstance(each, Tensor) and each.requires_grad]
    wanted = leaves if rank else [*leaves, *trained]
    if rank:  # only LoRA trains then, although the base is not frozen yet
        up, down = (each._replace(weight=_frozen(each.weight)) for each in (up, down))
    upstream = random(tokens, hidden).detach()

    def run(kernels: Kernels) -> list[Tensor]:
        found = sort_by_expert(index_TK, count, dtype)
        out = expert_layer(leaves[0], leaves[1], up, down, activation_of(experts), found, kernels)
        gradients = torch.autograd.grad(out, wanted, upstream.to(out.dtype))
        return [out.detach(), *gradients]

    return run


def _frozen(weight: Tensor | Stored) -> Tensor | Stored:
    return weight.detach() if isinstance(weight, Tensor) else weight


def _shape(projection: Projection) -> tuple[int, int, int]:
    experts, outputs, inputs = projection.weight.shape
    return experts, outputs, inputs


def _time(run: Callable[[], object]) -> float:
    """Median in ms; waits for the device before and after each run."""
    times = []
    for _ in range(REPETITIONS):
        _wait()
        start = time.perf_counter()
        run()
        _wait()
        liveness.alive()
        times.append((time.perf_counter() - start) * 1e3)
    return median(times)


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
