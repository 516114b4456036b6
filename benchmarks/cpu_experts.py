"""LoRA on experts on a CPU: ours against PEFT's `target_parameters`, forward and backward, time and peak memory.

One experts module of four mid-size shapes, in bf16 and fp32, with some 256 and some 1,024 tokens a step: with LoRA of
rank 16, ours (beside the weights) against PEFT's (W + s B A in one `baddbmm` since 0.21.2) over transformers'
`grouped_mm` and over its eager loop; and fully trained, ours against `grouped_mm`. Each variant has its own process, as
a job has, forked from one that has imported the libraries and computed nothing: oneDNN keeps the code that it compiles
for a process, so variants that share a process would influence one another. Each repetition draws a number of tokens
and a routing, as each training step does, and gives them to all variants, one after the other; the order alternates.
Time is the processor's, of one thread, because other programs may use the cores. Memory is the rise of the process's
resident set during a step, in other processes, whose allocator gives large blocks back at once. Before any measurement,
each variant's output and gradients are compared with those of the eager loop in fp32. Run

    python -m benchmarks.cpu_experts [--steps N] [--out FILE]
"""

import argparse
import ctypes
import json
import multiprocessing
import os
import statistics
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from benchmarks.machine import RESULTS, machine, versions
from llama_stack_provider_moe.compute.moe.backend import OURS
from llama_stack_provider_moe.compute.moe.split_lora import split_lora

RANK = 16
LIBRARIES = ["peft", MixtralExperts.__module__, split_lora.__module__]
M_MMAP_THRESHOLD = -3  # of mallopt(3)
MEMORY_STEPS = 3
TOKENS = {"256 tokens": (192, 320), "1024 tokens": (768, 1280)}  # of a step, drawn anew


@dataclass(frozen=True)
class Shape:
    """Of an experts module."""

    hidden: int
    inner: int
    experts: int
    top_k: int


SHAPES = {
    "H512 I256 E32 top-8": Shape(512, 256, 32, 8),
    "H512 I1024 E16 top-2": Shape(512, 1024, 16, 2),
    "H768 I512 E32 top-4": Shape(768, 512, 32, 4),
    "H1024 I512 E32 top-8 (Granite-3.0-1b-a400m)": Shape(1024, 512, 32, 8),
}
# name -> implementation, LoRA
VARIANTS = {
    "LoRA, eager, PEFT": ("eager", "folded"),
    "LoRA, grouped_mm, PEFT": ("grouped_mm", "folded"),
    "LoRA, ours": (OURS, "beside"),
    "full, grouped_mm": ("grouped_mm", None),
    "full, ours": (OURS, None),
}
# what is measured against which baseline
RATIOS = {
    "LoRA: ours to PEFT on eager": ("LoRA, eager, PEFT", "LoRA, ours"),
    "LoRA: ours to PEFT on grouped_mm": ("LoRA, grouped_mm, PEFT", "LoRA, ours"),
    "full: ours to grouped_mm": ("full, grouped_mm", "full, ours"),
}


class Layer(nn.Module):
    """What PEFT looks for experts in."""

    def __init__(self, shape: Shape, dtype: torch.dtype, implementation: str, lora: str | None) -> None:
        super().__init__()
        config = MixtralConfig(
            hidden_size=shape.hidden, intermediate_size=shape.inner,
            num_local_experts=shape.experts, num_experts_per_tok=shape.top_k,
        )  # fmt: skip
        config._experts_implementation = implementation
        torch.manual_seed(0)
        self.experts = MixtralExperts(config).to(dtype)
        for parameter in self.experts.parameters():
            nn.init.normal_(parameter, std=0.02)
        if lora is None:
            return
        targets = ["experts.gate_up_proj", "experts.down_proj"]
        inject_adapter_in_model(LoraConfig(r=RANK, target_modules=[], target_parameters=targets), self)
        for name, parameter in self.named_parameters():
            if "lora_B" in name:  # begins at zero, and would hide mistakes
                nn.init.normal_(parameter, std=0.02)
        if lora == "beside":
            assert split_lora(self) == len(targets)

    def forward(self, *inputs: Tensor) -> Tensor:
        """(T, D)"""
        out: Tensor = self.experts(*inputs)
        return out


def drawn(shape: Shape, tokens_of: str, draws: torch.Generator, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Tokens (T, D), their experts (T, K) and weights (T, K)."""
    tokens = int(torch.randint(*TOKENS[tokens_of], (), generator=draws))
    hidden = torch.randn(tokens, shape.hidden, generator=draws).to(dtype).requires_grad_()
    chosen = torch.rand(tokens, shape.experts, generator=draws).topk(shape.top_k)
    return hidden, chosen.indices, chosen.values.to(dtype)


def one_step(layer: Layer, inputs: tuple[Tensor, ...]) -> tuple[float, int]:
    """Processor seconds of one forward and backward, and bytes by which the resident set rose."""
    layer.zero_grad(set_to_none=True)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = status("VmRSS")
    began = time.process_time()
    layer(*inputs).float().square().mean().backward()
    return time.process_time() - began, status("VmHWM") - before


def status(field: str) -> int:
    """Bytes, of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def check(shape: Shape) -> dict[str, float]:
    """Each LoRA variant's output and gradients in fp32 against the eager ones': the largest relative difference."""
    found: dict[str, list[Tensor]] = {}
    for name, variant in VARIANTS.items():
        if not name.startswith("LoRA"):
            continue
        layer = Layer(shape, torch.float32, *variant)
        inputs = drawn(shape, "256 tokens", torch.Generator().manual_seed(1), torch.float32)
        out = layer(*inputs)
        out.square().mean().backward()
        gradients = [parameter.grad for name, parameter in layer.named_parameters() if "lora_" in name]
        found[name] = [out.detach(), inputs[0].grad, *gradients]  # type: ignore[list-item]
    truth = found.pop("LoRA, eager, PEFT")
    return {
        name: max(((one - other).norm() / other.norm()).item() for one, other in zip(each, truth, strict=True))
        for name, each in found.items()
    }


@dataclass(frozen=True)
class Question:
    """Of one measurement. Large blocks given back at once show what a step takes, and slow it down."""

    shape: Shape
    tokens_of: str
    dtype: torch.dtype
    threads: int
    gives_back: bool


def run_variant(name: str, asked: Question, pipe: Connection) -> None:
    """A process's work: a step's figures each time it is asked, until it is told to stop."""
    if asked.gives_back:
        assert ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 256 * 1024) == 1
    torch.set_num_threads(asked.threads)
    shape, tokens_of, dtype = asked.shape, asked.tokens_of, asked.dtype
    layer = Layer(shape, dtype, *VARIANTS[name])
    draws = torch.Generator().manual_seed(0)
    pipe.send(None)
    while pipe.recv():
        pipe.send(one_step(layer, drawn(shape, tokens_of, draws, dtype)))


def measure(asked: Question, steps: int) -> dict[str, list[tuple[float, int]]]:
    """(seconds, bytes) a step, by variant, after two steps that are not counted."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(LIBRARIES)
    pipes: dict[str, Connection] = {}
    processes = []
    for name in VARIANTS:
        pipes[name], theirs = context.Pipe()
        processes.append(context.Process(target=run_variant, args=(name, asked, theirs), daemon=True))
        processes[-1].start()
        theirs.close()
        pipes[name].recv()
    figures: dict[str, list[tuple[float, int]]] = {name: [] for name in VARIANTS}
    for step in range(steps + 2):
        for name in list(VARIANTS)[:: 1 if step % 2 else -1]:
            pipes[name].send(True)
            taken = pipes[name].recv()
            if step >= 2:
                figures[name].append(taken)
    for name, process in zip(VARIANTS, processes, strict=True):
        pipes[name].send(False)
        process.join()
    return figures


def measured(shape: Shape, tokens_of: str, dtype: torch.dtype, steps: int) -> dict[str, Any]:
    """Time and memory of a case. Ratios first, then what they are made of."""
    threads = torch.get_num_threads()
    timed = measure(Question(shape, tokens_of, dtype, threads, gives_back=False), steps)
    weighed = measure(Question(shape, tokens_of, dtype, threads, gives_back=True), MEMORY_STEPS)
    seconds = {name: [second for second, _ in each] for name, each in timed.items()}
    peaks = {name: statistics.median(peak for _, peak in each) for name, each in weighed.items()}
    medians = {name: statistics.median(each) for name, each in seconds.items()}
    return {
        "times_as_fast": {title: round(medians[base] / medians[ours], 2) for title, (base, ours) in RATIOS.items()},
        "times_the_memory": {title: round(peaks[ours] / peaks[base], 2) for title, (base, ours) in RATIOS.items()},
        "median_ms": {name: round(1e3 * value, 1) for name, value in medians.items()},
        "min_max_ms": {name: [round(1e3 * min(each), 1), round(1e3 * max(each), 1)] for name, each in seconds.items()},
        "median_peak_mib": {name: round(peak / 2**20, 1) for name, peak in peaks.items()},
    }


def main() -> None:
    """Measure, print, and write a result file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=12, help="steps of each variant (default: 12)")
    parser.add_argument(
        "--out", type=Path, default=RESULTS / f"cpu_experts_{datetime.now(UTC):%Y-%m-%d}.json", help="result file"
    )
    arguments = parser.parse_args()
    shapes: dict[str, Any] = {}
    result: dict[str, Any] = {
        "what": f"experts forward and backward, LoRA r={RANK} or full, new row counts at each step",
        "command": f"python -m benchmarks.cpu_experts --steps {arguments.steps}",
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "shapes": shapes,
        "machine": machine() | {"threads": torch.get_num_threads()},
        "load_average": {"before": os.getloadavg()},
        "versions": versions("torch", "transformers", "peft"),
    }
    for title, shape in SHAPES.items():
        shapes[title] = {"relative_difference_to_eager_fp32": check(shape)}
        for tokens_of in TOKENS:
            for dtype in (torch.bfloat16, torch.float32):
                name = f"{str(dtype).removeprefix('torch.')}, {tokens_of}"
                found = shapes[title][name] = measured(shape, tokens_of, dtype, arguments.steps)
                print(title, name, found["times_as_fast"], found["times_the_memory"], flush=True)
                result["load_average"]["after"] = os.getloadavg()
                arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")  # it may be cut off


if __name__ == "__main__":
    main()
