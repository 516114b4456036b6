"""The planner's estimate for each setting that saves memory, against measured steps on a CPU.

Every case is QLoRA of rank 16 on all experts of a random Granite-shaped model, with checkpointing, except one that
trains all weights. Run

    python -m benchmarks.memory_settings [--only TEXT] [--out FILE]
"""

import argparse
import json
from dataclasses import asdict, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.peak_memory import SHAPES, compared
from benchmarks.server_start import RESULTS, machine
from tests.support.measured_memory import Case, measure

CODED = {"optimizer_type": "adamw_8bit"}
PLAIN = replace(SHAPES["granite, 512 wide"], bits=4, checkpointing=True, batch=1)
CASES: dict[str, Case] = {
    "adamw": PLAIN,
    "adamw_8bit": replace(PLAIN, optimizer=CODED),
    "adamw_8bit, adapter.dtype bf16": replace(
        PLAIN, optimizer=CODED, adapter={**(PLAIN.adapter or {}), "dtype": "bf16"}
    ),
    "adamw_8bit, all weights": replace(PLAIN, optimizer=CODED, adapter=None, bits=16),
}


def result(found: list[dict[str, Any]]) -> dict[str, Any]:
    """The contents of the result file."""
    ratios = [case["ratio"] for case in found]
    return {
        "what": "peak bytes of a training step with settings that save memory: estimated from the config, to measured "
        "by torch's CPU allocator",
        "command": "python -m benchmarks.memory_settings",
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "ratio_least_and_most": [min(ratios), max(ratios)],
        "found": found,
        "shape": asdict(PLAIN),
        "packages": {name: version(name) for name in ("torch", "transformers", "trl", "peft", "bitsandbytes")},
        "machine": machine(),
    }


def main() -> None:
    """Measure and print; the result file is written again after each case."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", metavar="TEXT", help="run only cases whose name contains TEXT")
    parser.add_argument(
        "--out", type=Path, default=RESULTS / f"memory_settings_{datetime.now(UTC):%Y-%m-%d}.json", help="result file"
    )
    options = parser.parse_args()
    found = []
    for name, case in CASES.items():
        if options.only in name:
            found.append(compared(name, case, measure(case)))
            print(json.dumps(found[-1]), flush=True)
            options.out.write_text(json.dumps(result(found), indent=2) + "\n")


if __name__ == "__main__":
    main()
