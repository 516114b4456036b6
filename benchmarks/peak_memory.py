"""The LoRA report's estimate of peak memory against measured steps, on a CPU.

Each case is a job in its own process, on a random model (`tests/support/measured_memory.py` says how a step is
measured), and the estimate for the same model from its config alone: dense, Granite-shaped and Mixtral-shaped models,
SFT and DPO, bases in 16 and 4 bits, without and with checkpointing (`CASES`). Run

    python -m benchmarks.peak_memory [--only TEXT] [--out FILE]
"""

import argparse
import json
from dataclasses import asdict, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from benchmarks.server_start import RESULTS, machine
from tests.support.measured_memory import Case, Measured, estimated, measure

ATTENTION = {"num_attention_heads": 8, "num_key_value_heads": 4}
SHAPES: dict[str, Case] = {
    "dense, 512 wide": Case(
        "sft", "llama", {**ATTENTION, "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 6},
        {"rank": 16},
    ),
    "dense, 1280 wide": Case(
        "sft", "llama", {**ATTENTION, "hidden_size": 1280, "intermediate_size": 3456, "num_hidden_layers": 2},
        {"rank": 16},
    ),
    "granite, 512 wide": Case(
        "sft", "granitemoe",
        {**ATTENTION, "hidden_size": 512, "intermediate_size": 256, "num_local_experts": 16, "num_experts_per_tok": 4,
         "num_hidden_layers": 6},
        {"plan": "all_experts", "rank": 16},
    ),
    "mixtral, 512 wide": Case(
        "sft", "mixtral",
        {**ATTENTION, "hidden_size": 512, "intermediate_size": 1792, "num_local_experts": 8, "num_hidden_layers": 4},
        {"plan": "all_experts", "rank": 16},
    ),
}  # fmt: skip
# (shape, recipe, bits, checkpointing): every value of each with every shape, not every combination.
CASES: tuple[tuple[str, str, Literal[16, 4], bool], ...] = (
    ("granite, 512 wide", "sft", 16, False),
    ("granite, 512 wide", "dpo", 4, False),
    ("granite, 512 wide", "sft", 4, True),
    ("mixtral, 512 wide", "sft", 16, False),
    ("mixtral, 512 wide", "dpo", 16, True),
    ("mixtral, 512 wide", "sft", 4, False),
    ("dense, 1280 wide", "sft", 16, True),
    ("dense, 1280 wide", "dpo", 4, True),
    ("dense, 512 wide", "dpo", 16, False),
    ("dense, 512 wide", "sft", 4, False),
)


def compared(name: str, case: Case, measured: Measured) -> dict[str, Any]:
    """Estimate and measurement of one case, in bytes."""
    estimate = estimated(case)
    on_top = estimate.peak_bytes - estimate.static_bytes
    return {
        "case": f"{name}, {case.recipe}, {case.bits} bits{', checkpointing' if case.checkpointing else ''}",
        "estimated": estimate.peak_bytes,
        "measured": measured.peak,
        "ratio": round(estimate.peak_bytes / measured.peak, 3),
        "estimated_on_top": on_top,
        "measured_on_top": measured.dynamic,
        "ratio_on_top": round(on_top / measured.dynamic, 3),
        "at": estimate.moment,
    }


def result(found: list[dict[str, Any]]) -> dict[str, Any]:
    """The contents of the result file."""
    ratios = [case["ratio"] for case in found]
    on_top = [case["ratio_on_top"] for case in found]
    return {
        "what": "peak bytes of a training step: estimated from the config, to measured by torch's CPU allocator; "
        "'on top' leaves weights, adapter and optimiser out of both",
        "command": "python -m benchmarks.peak_memory",
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "cases": len(found),
        "ratio_least_and_most": [min(ratios), max(ratios)],
        "ratio_on_top_least_and_most": [min(on_top), max(on_top)],
        "found": found,
        "shapes": {name: asdict(case) for name, case in SHAPES.items()},
        "packages": {name: version(name) for name in ("torch", "transformers", "trl", "peft", "bitsandbytes")},
        "machine": machine(),
    }


def main() -> None:
    """Measure and print; the result file is written again after each case."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", metavar="TEXT", help="run only cases whose name contains TEXT")
    parser.add_argument(
        "--out", type=Path, default=RESULTS / f"peak_memory_{datetime.now(UTC):%Y-%m-%d}.json", help="result file"
    )
    options = parser.parse_args()
    found = []
    for name, recipe, bits, checkpointing in CASES:
        case = replace(SHAPES[name], recipe=recipe, bits=bits, checkpointing=checkpointing)
        if options.only in name:
            found.append(compared(name, case, measure(case)))
            print(json.dumps(found[-1]), flush=True)
            options.out.write_text(json.dumps(result(found), indent=2) + "\n")


if __name__ == "__main__":
    main()
