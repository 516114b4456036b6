"""How many rows a second `moe-train data check` reads, without and with a model, on one core and on all.

The rows are those of `benchmarks.bring_data` (2 KB each). Only the model's tokenizer and chat template count; without
`--model` they are those of the tests' tiny models. Each figure is of a whole command, with its start and imports. Run

    python -m benchmarks.data_check [--rows N] [--token-rows N] [--model FOLDER] [--out FILE]
"""

import argparse
import json
import os
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.bring_data import ROW_BYTES, write
from benchmarks.machine import RESULTS, machine, versions
from llama_stack_provider_moe.jobdir.events import now
from tests.support import tiny_models
from tests.support.cli_support import MOE_TRAIN


def check(path: Path, model: str | None, cores: set[int]) -> dict[str, Any]:
    """Check a file with the whole command on `cores`; the figures of it."""
    words = [*MOE_TRAIN, "data", "check", str(path), "--json", *([] if model is None else ["--model", model])]
    began = time.perf_counter()
    done = subprocess.run(
        words, capture_output=True, check=True, preexec_fn=lambda: os.sched_setaffinity(0, cores),
    )  # fmt: skip
    seconds = time.perf_counter() - began
    profile = json.loads(done.stdout)
    assert profile["refused"] == 0
    assert (profile["tokens"] is None) == (model is None)
    return {
        "rows": profile["rows"],
        "tokens": None if model is None else profile["tokens"]["lengths"]["total"],
        "seconds": round(seconds, 2),
        "rows_per_s": round(profile["rows"] / seconds),
    }


def main() -> None:
    """Measure, print, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000, help="rows without a model (default: 100000)")
    parser.add_argument("--token-rows", type=int, default=20_000, help="rows with a model (default: 20000)")
    parser.add_argument("--model", help="folder of a model with a tokenizer (default: a tiny one of the tests)")
    parser.add_argument("--out", type=Path, default=RESULTS / f"data_check_{now():%Y-%m-%d}.json", help="result file")
    arguments = parser.parse_args()
    load_before = os.getloadavg()
    every = os.sched_getaffinity(0)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        model = arguments.model or str(tiny_models.build("mixtral", Path(folder) / "model"))
        for count, given in ((arguments.rows, None), (arguments.token_rows, model)):
            path = Path(folder) / f"{count}.jsonl"
            write(path, count)
            for cores in ({min(every)}, every):
                name = f"{'without a model' if given is None else 'with a model'}, {len(cores)} core(s)"
                found[name] = check(path, given, cores)
                print(f"{name}: {found[name]}", flush=True)
    result = {
        "what": f"moe-train data check of JSON Lines with rows of {ROW_BYTES:,} bytes, whole commands",
        "model": "tiny model of the tests" if arguments.model is None else Path(arguments.model).name,
        "time": now().isoformat(timespec="seconds"),
        "checks": found,
        "machine": machine() | {"load_average": {"before": load_before, "after": os.getloadavg()}},
        "versions": versions("tokenizers", "transformers", "torch"),
    }
    arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
