"""The trial of kernels in a process of its own: `python -m llama_stack_provider_moe.compute.moe.kernel_trial`.

It reads a `TrialLayer` (JSON) from standard input, makes one layer of that form with random numbers, and runs it
forward and backward with torch's kernels and with those of another backend; Triton's choose all tiles on the way. It
writes its findings
to standard output, one JSON object a line (`Line`). Whatever a kernel does here (raise, hang, read memory that is not
its own) ends this process and not the job: `kernel_choice` starts it and reads what it has written.

It imports neither transformers nor PEFT, so it starts within seconds.
"""

import ctypes
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from statistics import median
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from llama_stack_provider_moe.compute.moe.kernels import reference
from llama_stack_provider_moe.compute.moe.kernels.agreement import disagreement
from llama_stack_provider_moe.compute.moe.kernels.drop import Dropout
from llama_stack_provider_moe.compute.moe.kernels.groups import sort_by_expert
from llama_stack_provider_moe.compute.moe.kernels.layer import Projection, expert_layer
from llama_stack_provider_moe.compute.moe.kernels.linear import Kernels, Lora
from llama_stack_provider_moe.compute.moe.kernels.reference import Activation, ActivationKind, Stored
from llama_stack_provider_moe.ground import liveness

TORCH, TRITON, QUACK = "torch", "triton", "quack"
Compared = Literal["triton", "quack"]
REPETITIONS = 10
TUNING_S = 240.0  # after this time no further size is tuned; a step of such a size uses the nearest one's tiles
SMALLEST_ROWS, LARGEST_ROWS = 16, 1024  # per expert, of the sizes that are tuned (`tiles.LARGEST_BUCKET`)
SET_PARENT_DEATH_SIGNAL = 1  # prctl(2)
Line = dict[str, Any]
Run = Callable[..., list[Tensor]]  # (kernels, exact=: dropout by the same formula in all of them; see `drop.Drop`)


@dataclass(frozen=True)
class TrialLayer:
    """The form of one expert layer of a job, and what the job does with it.

    Attributes:
        tokens: tokens of a micro-batch.
        hidden: D, the model's hidden size.
        inner: I, inputs of the down projection.
        up_outputs: J, outputs of the up projection; 2 I with a gate.
        experts: E.
        top_k: K, experts per token.
        dtype: of the weights, such as `bfloat16`.
        device: such as `cuda:0`.
        rank: largest rank of LoRA on experts; 0: none.
        adapts_up: LoRA is on the up projection.
        adapts_down: LoRA is on the down projection.
        trains: the weights themselves train.
        lora_dropout: share of LoRA's input that is dropped.
        expert_dropout: share of the inner activations that is dropped.
        bits: the weights are quantised; None: they are not.
        nested: their scales are quantised too.
        transposed: the weights are stored as (E, in, out).
        biased: both projections have biases.
        activation: formula between the projections, see `Activation`.
        alpha: of the activation.
        limit: of the activation.
        deterministic: tiles are not timed; see `tiles`.
        kernels: what is compared with torch's kernels.
    """

    tokens: int
    hidden: int
    inner: int
    up_outputs: int
    experts: int
    top_k: int
    dtype: str
    device: str
    rank: int = 0
    adapts_up: bool = True
    adapts_down: bool = True
    trains: bool = False
    lora_dropout: float = 0.0
    expert_dropout: float = 0.0
    bits: Literal[4, 8] | None = None
    nested: bool = False
    transposed: bool = False
    biased: bool = False
    activation: ActivationKind = "silu"
    alpha: float = 0.0
    limit: float = 0.0
    deterministic: bool = False
    kernels: Compared = "triton"


class Layer:
    """Weights, LoRA and activation of a `TrialLayer`, all random."""

    def __init__(self, form: TrialLayer) -> None:
        self.form = form
        self.device, self.dtype = torch.device(form.device), getattr(torch, form.dtype)
        self._random = torch.Generator(self.device).manual_seed(0)
        self.leaves: list[Tensor] = []
        self.up = self._projection(form.up_outputs, form.hidden, form.adapts_up)
        self.down = self._projection(form.hidden, form.inner, form.adapts_down)
        self.activation = _activation(form)

    def random(self, *shape: int, scale: float = 1.0) -> Tensor:
        """Random numbers in the weights' dtype, the same in every run."""
        made = torch.empty(*shape, device=self.device, dtype=self.dtype)
        return made.normal_(0, scale, generator=self._random)

    def _projection(self, outputs: int, inputs: int, adapted: bool) -> Projection:
        form, experts = self.form, self.form.experts
        sides = (inputs, outputs) if form.transposed else (outputs, inputs)
        stored = self.random(experts, *sides, scale=inputs**-0.5)
        if form.trains:
            self.leaves.append(stored.requires_grad_())
        matrices = stored.mT if form.transposed else stored
        weight: Tensor | Stored = matrices
        if form.bits is not None:
            # Its libraries take seconds to import.
            from llama_stack_provider_moe.compute.moe.codes import Code, Coding

            weight = Code(matrices, Coding(form.bits, form.nested))
        bias = self.random(experts, outputs, scale=0.1) if form.biased else None
        if bias is not None and form.trains:
            self.leaves.append(bias.requires_grad_())
        if not (form.rank and adapted):
            return Projection(weight, bias)
        a = self.random(experts, form.rank, inputs, scale=inputs**-0.5).requires_grad_()
        b = self.random(experts, outputs, form.rank, scale=form.rank**-0.5).requires_grad_()
        self.leaves += [a, b]
        return Projection(weight, bias, Lora(a, b, form.lora_dropout))

    def on(self, tokens: int) -> Run:
        """A function that runs so many tokens forward and backward, and returns output and all gradients."""
        form = self.form
        hidden_TD = self.random(tokens, form.hidden).requires_grad_()
        weights_TK = self.random(tokens, form.top_k).requires_grad_()
        upstream_TD = self.random(tokens, form.hidden)
        scores_TE = torch.rand(tokens, form.experts, device=self.device, generator=self._random)
        index_TK = scores_TE.topk(form.top_k).indices
        drops = form.lora_dropout > 0 or form.expert_dropout > 0
        wanted = [hidden_TD, weights_TK, *self.leaves]

        def run(kernels: Kernels, *, exact: bool = False) -> list[Tensor]:
            found = sort_by_expert(index_TK, form.experts, self.dtype)
            dropout = Dropout(0, form.expert_dropout, exact) if drops else None
            out = expert_layer(hidden_TD, weights_TK, self.up, self.down, self.activation, found, kernels, dropout)
            return [out.detach(), *torch.autograd.grad(out, wanted, upstream_TD.to(out.dtype))]

        return run


def _activation(form: TrialLayer) -> Activation:
    gated = form.up_outputs == 2 * form.inner
    functions: dict[ActivationKind, Callable[[Tensor], Tensor]] = {
        "silu": _swiglu,
        "clamped": partial(_clamped, form.alpha, form.limit),
        "other": _geglu if gated else F.gelu,  # any: torch computes it, whatever it is
    }
    return Activation(functions[form.activation], form.activation, form.alpha, form.limit)


def _swiglu(inner_SJ: Tensor) -> Tensor:
    gate_SI, up_SI = inner_SJ.chunk(2, dim=-1)
    return F.silu(gate_SI) * up_SI


def _geglu(inner_SJ: Tensor) -> Tensor:
    gate_SI, up_SI = inner_SJ.chunk(2, dim=-1)
    return F.gelu(gate_SI) * up_SI


def _clamped(alpha: float, limit: float, inner_SJ: Tensor) -> Tensor:
    gate_SI, up_SI = inner_SJ[:, ::2].clamp(max=limit), inner_SJ[:, 1::2].clamp(-limit, limit)
    return (up_SI + 1) * gate_SI * torch.sigmoid(gate_SI * alpha)


def sizes(form: TrialLayer, largest: int) -> list[int]:
    """Numbers of tokens to run, the largest first: a power of two between them, for each size that tiles differ by.

    >>> form = TrialLayer(8192, 2048, 768, 1536, 128, 8, "bfloat16", "cuda:0")
    >>> sizes(form, 1024), sizes(form, 128)
    ([8192, 4096, 2048, 1024, 512, 256], [2048, 1024, 512, 256])
    """
    tokens = min(form.tokens, max(1, largest * form.experts // form.top_k))
    found = [tokens]
    while found[-1] * form.top_k // form.experts > SMALLEST_ROWS:
        found.append(found[-1] // 2)
    return found


def run_trial(form: TrialLayer, tell: Callable[[Line], None]) -> None:
    """Run the layer with both kinds of kernels, compare them at every size, and tell times and tiles.

    Args:
        form: the layer.
        tell: gets each line.
    """
    kernels = _kernels(form.kernels)
    if form.device.startswith("cuda"):
        torch.cuda.set_device(form.device)  # Triton launches on the current device
    torch.use_deterministic_algorithms(form.deterministic)
    layer = Layer(form)
    until = time.monotonic() + TUNING_S
    # On a CPU no size differs in its tiles, and interpreted a layer takes seconds.
    largest, repetitions = (LARGEST_ROWS, REPETITIONS) if form.device.startswith("cuda") else (SMALLEST_ROWS, 1)
    each_size = sizes(form, largest)
    with liveness.stage("trying kernels", len(each_size), "batch sizes") as counter:
        for number, tokens in enumerate(each_size):
            if number and time.monotonic() > until:
                break
            run = layer.on(tokens)
            expected = run(reference, exact=True)
            if not number:
                tell({"trial": TORCH, "ms": timed(lambda: run(reference), repetitions), "tokens": tokens})  # noqa: B023
            why = disagreement(run(kernels, exact=True), expected)
            if why is not None:
                tell({"trial": form.kernels, "reason": f"{why} with {tokens:,} tokens"})
                return
            if not number:
                ms = timed(lambda: run(kernels), repetitions)  # noqa: B023
                tell({"trial": form.kernels, "ms": ms, "tokens": tokens})
            counter.advance()
    if form.kernels == TRITON:
        from llama_stack_provider_moe.compute.moe.kernels import tiles

        tell({"tiles": [[each.kernel, list(each.asked), asdict(each.tiles)] for each in tiles.chosen()]})


def _kernels(name: Compared) -> Kernels:
    """The kernels of that name; neither is installed everywhere."""
    if name == QUACK:
        from llama_stack_provider_moe.compute.moe.kernels import quack

        return quack
    from llama_stack_provider_moe.compute.moe.kernels import grouped

    return grouped


def timed(run: Callable[[], object], repetitions: int) -> float:
    """Median in ms; waits for the device before and after each run."""
    times = []
    for _ in range(repetitions):
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


@contextmanager
def _lines() -> Iterator[Callable[[Line], None]]:
    """What writes lines to standard output; whatever libraries print there goes to standard error instead."""
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as out:
        os.dup2(2, 1)

        def tell(line: Line) -> None:
            out.write(json.dumps(line) + "\n")
            out.flush()

        yield tell


def main() -> None:
    """Run the trial that standard input describes."""
    ctypes.CDLL(None, use_errno=True).prctl(SET_PARENT_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)
    form = TrialLayer(**json.load(sys.stdin))
    with _lines() as tell, liveness.reports_to(lambda work: tell({"work": list(work)})):
        run_trial(form, tell)
        tell({"done": True})


if __name__ == "__main__":
    main()
    # Tearing down the libraries takes long, and a device that a kernel has damaged may hang.
    sys.stderr.flush()
    os._exit(0)
