"""`experts_backend: auto` on a GPU: both ways to compute an expert layer are tried, and the quicker true one is taken.

A table of which kernels win where would be of the GPU, the driver and the triton it was made with. Tried is a layer of
the model itself, with random tokens and the job's rank: forward and backward by torch's products and by ours in
Triton. A way whose output or gradients are not torch's is out, however quick.
"""

import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch
from torch import Tensor
from triton import TritonError

from llama_stack_provider_moe.experts.backend import gate_of, projections
from llama_stack_provider_moe.experts.kernels.groups import sort_by_expert
from llama_stack_provider_moe.experts.kernels.layer import Projection, expert_layer
from llama_stack_provider_moe.experts.kernels.linear import Kernels, Lora
from llama_stack_provider_moe.experts.kernels.reference import Stored

# Of the norm. Two right ways differ by a few roundings of what is in between; a wrong tile is off by far more.
AGREES = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}
REPETITIONS = 10


@dataclass(frozen=True)
class Trial:
    """What a way to compute a layer did: ms forward and backward, or why it is out."""

    ms: float | None
    reason: str = ""


def quickest(trials: Mapping[str, Trial]) -> str:
    """The name of the quickest that is not out."""
    ms = {name: trial.ms for name, trial in trials.items() if trial.ms is not None}
    return min(ms, key=lambda name: ms[name])


def tell(trials: Mapping[str, Trial], tokens: int) -> str:
    """One line for the start of a job's log."""
    told = [f"{name} {each.reason}" if each.ms is None else f"{name} {each.ms:.3g} ms" for name, each in trials.items()]
    return f"a layer forward and backward, {tokens:,} tokens: {', '.join(told)}"


def try_layer(
    experts: torch.nn.Module, ways: Mapping[str, Kernels], *, tokens: int, hidden: int, top_k: int, rank: int
) -> dict[str, Trial]:
    """Compute `experts` once each way, compare with the first, and time those that agree.

    Args:
        experts: of one layer, on its device, without LoRA yet.
        ways: the first is the one the others are held against.
        tokens: of a micro-batch.
        hidden: of the model.
        top_k: experts of a token.
        rank: of LoRA; 0: none, and the weights themselves have gradients where they train.
    """
    run = _prepare(experts, tokens, hidden, top_k, rank)
    (first, *others) = ways.items()
    expected = run(first[1])
    trials = {first[0]: Trial(_time(lambda: run(first[1])))}
    for name, kernels in others:
        trials[name] = _try(partial(run, kernels), expected)
    return trials


def _try(run: Callable[[], list[Tensor]], expected: list[Tensor]) -> Trial:
    try:
        found = run()
        off = max(
            float((one.float() - other.float()).norm() / other.float().norm().clamp(min=1e-20))
            for one, other in zip(found, expected, strict=True)
        )
        if not off <= AGREES[expected[0].dtype]:  # NaN is not
            return Trial(None, f"is off by {off:.2g} of the norm, so it is not used")
        return Trial(_time(run))
    # What triton raises where it can't compile, and, without a C compiler, for its launcher.
    except (TritonError, RuntimeError, subprocess.CalledProcessError) as error:
        return Trial(None, f"failed ({type(error).__name__}: {str(error).splitlines()[0][:200]})")


def _prepare(
    experts: torch.nn.Module, tokens: int, hidden: int, top_k: int, rank: int
) -> Callable[[Kernels], list[Tensor]]:
    """A function that computes the layer forward and backward: output, and gradients, of which nothing stays."""
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
    if rank:  # which train nothing else; that the base still could is of no moment here
        up, down = (each._replace(weight=_frozen(each.weight)) for each in (up, down))
    upstream = random(tokens, hidden).detach()

    def run(kernels: Kernels) -> list[Tensor]:
        found = sort_by_expert(index_TK, count, dtype)
        out = expert_layer(leaves[0], leaves[1], up, down, gate_of(experts), found, kernels)
        gradients = torch.autograd.grad(out, wanted, upstream.to(out.dtype))
        return [out.detach(), *gradients]

    return run


def _frozen(weight: Tensor | Stored) -> Tensor | Stored:
    return weight.detach() if isinstance(weight, Tensor) else weight


def _shape(projection: Projection) -> tuple[int, int, int]:
    experts, outputs, inputs = projection.weight.shape
    return experts, outputs, inputs


def _time(run: Callable[[], object]) -> float:
    """Median, in ms; the device has done all of it at each end."""
    times = []
    for _ in range(REPETITIONS):
        _wait()
        begun = time.perf_counter()
        run()
        _wait()
        times.append((time.perf_counter() - begun) * 1e3)
    return median(times)


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
