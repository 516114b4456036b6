"""Experts on a CPU in bf16, forward and backward, at new row counts: transformers' `grouped_mm` against `bucketed_mm`.

One experts module of SmolLM2-4x135M's shape (4 experts, top-2, 576 -> 1536), fully trained and with LoRA of rank 8,
which is folded into the weights (PEFT) or computed beside them. Each variant has a process of its own, as a job has:
oneDNN keeps the code it compiles for a process, and variants that share it would crowd out or help one another. Each
repetition draws a number of tokens and a routing, as each training step does, and gives all variants the same, one
after the other; which goes first alternates. Run

    python -m benchmarks.cpu_experts [--steps N] [--out FILE]
"""

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import time
from datetime import UTC, datetime
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from benchmarks.server_start import RESULTS, machine
from llama_stack_provider_moe.experts.bucketed import BUCKETED
from llama_stack_provider_moe.experts.split_lora import split_lora

EXPERTS, TOP_K, HIDDEN, INNER, RANK = 4, 2, 576, 1536, 8
# name -> implementation, LoRA
VARIANTS = {
    "full, grouped_mm": ("grouped_mm", None),
    "full, bucketed_mm": (BUCKETED, None),
    "LoRA, grouped_mm, folded": ("grouped_mm", "folded"),
    "LoRA, bucketed_mm, folded": (BUCKETED, "folded"),
    "LoRA, bucketed_mm, beside": (BUCKETED, "beside"),
}
# what is measured against which baseline
RATIOS = {
    "full: bucketed_mm to grouped_mm": ("full, grouped_mm", "full, bucketed_mm"),
    "LoRA: beside to folded, both bucketed_mm": ("LoRA, bucketed_mm, folded", "LoRA, bucketed_mm, beside"),
    "LoRA: ours to plain PEFT and transformers": ("LoRA, grouped_mm, folded", "LoRA, bucketed_mm, beside"),
}


class Layer(nn.Module):
    """What PEFT looks for experts in."""

    def __init__(self, implementation: str, lora: str | None) -> None:
        super().__init__()
        config = MixtralConfig(
            hidden_size=HIDDEN, intermediate_size=INNER, num_local_experts=EXPERTS, num_experts_per_tok=TOP_K
        )
        config._experts_implementation = implementation
        self.experts = MixtralExperts(config).to(torch.bfloat16)
        for parameter in self.experts.parameters():
            nn.init.normal_(parameter, std=0.02)
        if lora is not None:
            targets = ["experts.gate_up_proj", "experts.down_proj"]
            inject_adapter_in_model(LoraConfig(r=RANK, target_modules=[], target_parameters=targets), self)
        if lora == "beside":
            assert split_lora(self) == len(targets)

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        """(T, D)"""
        out: torch.Tensor = self.experts(*inputs)
        return out


def one_step(layer: Layer, inputs: tuple[torch.Tensor, ...]) -> float:
    """Seconds of one forward and backward."""
    layer.zero_grad(set_to_none=False)
    began = time.perf_counter()
    layer(*inputs).float().square().mean().backward()
    return time.perf_counter() - began


def run_variant(name: str, threads: int, pipe: Connection) -> None:
    """A process's work: the seconds of a step each time it is asked, until it is told to stop."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    layer = Layer(*VARIANTS[name])
    draws = torch.Generator().manual_seed(0)  # the same in all, however many numbers a variant's adapter took
    pipe.send(None)
    while pipe.recv():
        tokens = int(torch.randint(200, 700, (), generator=draws))
        hidden = torch.randn(tokens, HIDDEN, dtype=torch.bfloat16, generator=draws).requires_grad_()
        chosen = torch.rand(tokens, EXPERTS, generator=draws).topk(TOP_K)
        pipe.send(one_step(layer, (hidden, chosen.indices, chosen.values.to(torch.bfloat16))))


def measure(steps: int) -> dict[str, list[float]]:
    """Seconds a step, by variant, after two steps that are not counted."""
    fork = multiprocessing.get_context("fork")  # torch was imported, and has computed nothing yet
    pipes: dict[str, Connection] = {}
    processes = []
    for name in VARIANTS:
        pipes[name], theirs = fork.Pipe()
        processes.append(fork.Process(target=run_variant, args=(name, torch.get_num_threads(), theirs), daemon=True))
        processes[-1].start()
        theirs.close()
        pipes[name].recv()
    seconds: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for step in range(steps + 2):
        for name in list(VARIANTS)[:: 1 if step % 2 else -1]:
            pipes[name].send(True)
            taken = pipes[name].recv()
            if step >= 2:
                seconds[name].append(taken)
    for name, process in zip(VARIANTS, processes, strict=True):
        pipes[name].send(False)
        process.join()
    return seconds


def main() -> None:
    """Measure, print, and write a result file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--out", type=Path, default=RESULTS / f"cpu_experts_{datetime.now(UTC):%Y-%m-%d}.json")
    arguments = parser.parse_args()
    seconds = measure(arguments.steps)
    medians = {name: statistics.median(each) for name, each in seconds.items()}
    result = {
        "what": f"experts forward and backward, bf16, {EXPERTS} experts top-{TOP_K} {HIDDEN}x{INNER}, LoRA r={RANK}",
        "command": f"python -m benchmarks.cpu_experts --steps {arguments.steps}",
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "times_as_fast": {
            title: round(medians[baseline] / medians[ours], 2) for title, (baseline, ours) in RATIOS.items()
        },
        "median_ms": {name: round(1e3 * value, 2) for name, value in medians.items()},
        "min_max_ms": {name: [round(1e3 * min(each), 2), round(1e3 * max(each), 2)] for name, each in seconds.items()},
        "machine": machine() | {"threads": torch.get_num_threads(), "load_average": os.getloadavg()},
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("torch", "transformers", "peft")},
    }  # fmt: skip
    arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
