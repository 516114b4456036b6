"""The trial behind `experts_backend`: run an expert layer with each kernel in a child process, keep the best.

A table of which kernels win where would hold for one GPU, driver and Triton version only. So the trial runs a layer of
the job's own form, with random numbers and the job's LoRA and dropout: forward and backward by torch's products and by
our Triton kernels, and in a trial of its own by quack-kernels' products, if installed. A kernel whose output or
gradients differ from torch's is rejected, however fast.

It runs in a process of its own (`kernel_trial`), because a faulty kernel may do worse than raise: it may hang, and an
illegal access makes all later work of its process fail. Whatever happens there, the job runs with torch's kernels and
its log says why.
"""

import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from llama_stack_provider_moe.compute.moe.backend import activation_of, code_of, projections
from llama_stack_provider_moe.compute.moe.kernel_trial import TORCH, Compared, Line, TrialLayer
from llama_stack_provider_moe.compute.moe.layout import ExpertLayout
from llama_stack_provider_moe.ground import liveness
from llama_stack_provider_moe.spec import Adapter, TrainingSpec

if TYPE_CHECKING:
    from llama_stack_provider_moe.compute.moe.kernels.tiles import Choice
    from llama_stack_provider_moe.compute.moe.layout import ExpertsModule

COMMAND = (sys.executable, "-m", "llama_stack_provider_moe.compute.moe.kernel_trial")
_READ_BYTES = 1 << 16
_ENDING_S = 30.0  # from a child's last line to its end
_REASON_LIMIT = 300  # characters


@dataclass(frozen=True)
class Limits:
    """How long the trial's process may take.

    Attributes:
        silence_s: seconds without a line; compiling and timing one tile size of one kernel takes some.
        whole_s: seconds in all.
    """

    silence_s: float = 180.0
    whole_s: float = 900.0


@dataclass(frozen=True)
class Trial:
    """Result of one implementation: ms for forward and backward, or the reason for rejecting it."""

    ms: float | None
    reason: str = ""


@dataclass(frozen=True)
class Trials:
    """What came of torch's kernels and the others.

    Attributes:
        torch: of torch's.
        other: of those that were compared with them.
        tokens: tokens of the timed layer.
        tiles: the tiles that were chosen for Triton's (see `tiles.install`).
        name: which the others are.
    """

    torch: Trial
    other: Trial
    tokens: int
    tiles: "tuple[Choice, ...]" = field(default=(), compare=False)
    name: Compared = "triton"

    @property
    def prefer_other(self) -> bool:
        """Whether the others are right, and faster."""
        return self.other.ms is not None and self.torch.ms is not None and self.other.ms < self.torch.ms

    def text(self) -> str:
        """One line for the start of a job's log."""
        parts = [
            f"{name} {each.reason}" if each.ms is None else f"{name} {each.ms:.3g} ms"
            for name, each in ((TORCH, self.torch), (self.name, self.other))
            if each.ms is not None or each.reason
        ]
        return f"one layer forward and backward, {self.tokens:,} tokens: {', '.join(parts)}"


def form_of(
    spec: TrainingSpec, experts: "ExpertsModule", layout: ExpertLayout, device: torch.device, tokens: int
) -> TrialLayer:
    """The form of the experts of one layer, before LoRA is added, and what the job does with them.

    Args:
        spec: the job.
        experts: the experts of one layer.
        layout: the model's.
        device: where the job computes.
        tokens: tokens of a micro-batch.
    """
    up, down = projections(experts)
    count, outputs, inputs = up.weight.shape
    activation = activation_of(experts)
    adapter = spec.adapter
    rank = 0 if adapter is None else rank_on_experts(adapter)
    quantized = adapter is not None and any(
        code_of(experts, name) is not None for name in (layout.gate_up, layout.down)
    )
    return TrialLayer(
        tokens, inputs, down.weight.shape[2], outputs, count, layout.top_k,
        str(up.weight.dtype).removeprefix("torch."), str(device), rank,
        adapts_up=adapter is None or "gate_up_proj" in adapter.expert_modules,
        adapts_down=adapter is None or "down_proj" in adapter.expert_modules,
        trains=adapter is None,
        lora_dropout=adapter.dropout if adapter is not None and rank else 0.0,
        expert_dropout=spec.moe.expert_dropout,
        bits=adapter.quantize_bits if adapter is not None and quantized else None,
        nested=adapter is not None and quantized and adapter.quantize_scales,
        transposed=layout.transposed, biased=up.bias_EO is not None,
        activation=activation.kind, alpha=activation.alpha, limit=activation.limit,
        deterministic=spec.options.deterministic,
    )  # fmt: skip


def rank_on_experts(adapter: Adapter) -> int:
    """The largest rank of LoRA on experts; 0: there is none."""
    if adapter.plan == "trunk" or not adapter.apply_lora_to_mlp:
        return 0
    if adapter.plan != "per_expert":
        return adapter.rank
    return max((rank for rule in adapter.rules for rank in rule.experts.values()), default=adapter.rank)


def run_trial(form: TrialLayer, command: Sequence[str] = COMMAND, limits: Limits = Limits()) -> Trials:
    """Run the trial of a layer in a child process; whatever the child does, this returns.

    Args:
        form: the layer.
        command: the child; reads the layer from standard input and writes lines, see `kernel_trial`.
        limits: how long it may take.
    """
    found: dict[str, Trial] = {}
    tiles: list[list[Any]] = []
    done, at, tokens, stopped = False, "at its start", form.tokens, ""
    with tempfile.TemporaryFile("w+b") as said:
        child = subprocess.Popen(
            list(command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said, env=_environment()
        )
        try:
            with liveness.stage("trying kernels in a child process", None, "batch sizes") as counter:
                _start(child, form)
                for line in _lines(child, limits):
                    if isinstance(line, str):
                        stopped = line
                        break
                    if "work" in line:
                        at = f"after {line['work'][1]} of {line['work'][2]} {line['work'][3]}"
                        counter.relay(liveness.Work(*line["work"]))
                    elif "trial" in line:
                        found[line["trial"]] = Trial(line.get("ms"), line.get("reason", ""))
                        tokens = line.get("tokens", tokens)
                        at = f"after {line['trial']}'s time"
                    tiles = line.get("tiles", tiles)
                    done = done or "done" in line
            if not stopped:
                child.wait(_ENDING_S)
        except subprocess.TimeoutExpired:
            stopped = f"it did not end within {_ENDING_S:g} s of its last line"
        finally:
            child.kill()  # nothing where it has ended
            child.wait()
            for pipe in (child.stdin, child.stdout):
                if pipe is not None:
                    pipe.close()
        said.seek(max(0, said.seek(0, os.SEEK_END) - _READ_BYTES))
        last = said.read().decode(errors="replace").strip().splitlines()
    if stopped or not done:
        why = stopped or _ending(child.returncode, last)
        found[form.kernels] = Trial(None, f"failed in a trial of its own process, {at}: {why}; it is not used")
        tiles = []
    return Trials(found.get(TORCH, Trial(None)), found[form.kernels], tokens, _choices(tiles), form.kernels)


def _environment() -> dict[str, str]:
    """This process's, without what makes libraries join its group of processes."""
    own = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return {name: value for name, value in os.environ.items() if name not in own}


def _start(child: "subprocess.Popen[bytes]", form: TrialLayer) -> None:
    assert child.stdin is not None
    with suppress(BrokenPipeError):  # it has ended; its end says why
        child.stdin.write(json.dumps(asdict(form)).encode())
        child.stdin.close()


def _lines(child: "subprocess.Popen[bytes]", limits: Limits) -> Iterator[Line | str]:
    """The child's lines until it closes its output; a text at the end if it took too long."""
    assert child.stdout is not None
    end = time.monotonic() + limits.whole_s
    rest = b""
    with selectors.DefaultSelector() as selector:
        selector.register(child.stdout, selectors.EVENT_READ)
        while True:
            left = end - time.monotonic()
            if not selector.select(max(0.0, min(limits.silence_s, left))):
                quiet = limits.silence_s < left
                yield (
                    f"no sign of life for {limits.silence_s:g} s" if quiet
                    else f"it took more than {limits.whole_s:g} s"
                )  # fmt: skip
                return
            read = os.read(child.stdout.fileno(), _READ_BYTES)
            if not read:
                return
            *whole, rest = (rest + read).split(b"\n")
            for line in whole:
                yield json.loads(line)
            if time.monotonic() > end:
                yield f"it took more than {limits.whole_s:g} s"
                return


def _ending(code: int, last: list[str]) -> str:
    """How the child ended by itself, in words."""
    how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    return f"{last[-1][:_REASON_LIMIT]} ({how})" if last else how


def _choices(tiles: list[list[Any]]) -> "tuple[Choice, ...]":
    if not tiles:
        return ()
    from llama_stack_provider_moe.compute.moe.kernels.tiles import Choice, Tiles  # Triton is not installed everywhere

    return tuple(Choice(kernel, tuple(asked), Tiles(**each)) for kernel, asked, each in tiles)
