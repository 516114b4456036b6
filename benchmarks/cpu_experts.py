"""Experts on a CPU in bf16: `bucketed_mm` against transformers' `grouped_mm`, forward and backward, at new row counts.

One experts module of SmolLM2-4x135M's shape (4 experts, top-2, 576 -> 1536), fully trained. Each repetition draws a
number of tokens and a routing, as each training step does, and gives both implementations the same; which goes first
alternates. Run

    python -m benchmarks.cpu_experts [--steps N] [--out FILE]
"""

import argparse
import json
import os
import platform
import statistics
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from benchmarks.server_start import RESULTS, machine
from llama_stack_provider_moe.experts.bucketed import BUCKETED

EXPERTS, TOP_K, HIDDEN, INNER = 4, 2, 576, 1536
IMPLEMENTATIONS = ("grouped_mm", BUCKETED)


def one_step(experts: MixtralExperts, implementation: str, inputs: tuple[torch.Tensor, ...]) -> float:
    """Seconds of one forward and backward."""
    experts.config._experts_implementation = implementation
    hidden, index, weights = inputs
    experts.zero_grad(set_to_none=False)
    began = time.perf_counter()
    experts(hidden, index, weights).float().square().mean().backward()
    return time.perf_counter() - began


def measure(steps: int) -> dict[str, list[float]]:
    """Seconds a step, by implementation, after two steps that are not counted."""
    torch.manual_seed(0)
    config = MixtralConfig(
        hidden_size=HIDDEN, intermediate_size=INNER, num_local_experts=EXPERTS, num_experts_per_tok=TOP_K
    )
    experts = MixtralExperts(config).to(torch.bfloat16)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    seconds: dict[str, list[float]] = {name: [] for name in IMPLEMENTATIONS}
    for step in range(steps + 2):
        tokens = int(torch.randint(200, 700, ()))
        hidden = torch.randn(tokens, HIDDEN, dtype=torch.bfloat16, requires_grad=True)
        chosen = torch.rand(tokens, EXPERTS).topk(TOP_K)
        inputs = (hidden, chosen.indices, chosen.values.to(torch.bfloat16))
        for name in IMPLEMENTATIONS if step % 2 else IMPLEMENTATIONS[::-1]:
            taken = one_step(experts, name, inputs)
            if step >= 2:
                seconds[name].append(taken)
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
        "what": f"experts forward and backward, bf16, {EXPERTS} experts top-{TOP_K} {HIDDEN}x{INNER}",
        "command": f"python -m benchmarks.cpu_experts --steps {arguments.steps}",
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "grouped_mm_to_bucketed_mm": round(medians["grouped_mm"] / medians[BUCKETED], 2),
        "median_ms": {name: round(1e3 * value, 2) for name, value in medians.items()},
        "min_max_ms": {name: [round(1e3 * min(each), 2), round(1e3 * max(each), 2)] for name, each in seconds.items()},
        "machine": machine() | {"threads": torch.get_num_threads(), "load_average": os.getloadavg()},
        "versions": {"python": platform.python_version()} | {name: version(name) for name in ("torch", "transformers")},
    }  # fmt: skip
    arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
