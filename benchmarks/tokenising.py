"""Tokenising rows on one and on two processes: rows a second, memory, and that both give the same files.

    $ OMP_NUM_THREADS=1 python -m benchmarks.tokenising

The rows are conversations of some 2 KB with two answers, the tokenizer is GPT-2's with a ChatML template. Each count of
processes is measured in a fresh process, from the first row that is read to the last file on the disk (fsync). With two
the time includes the start of Python's forkserver and the imports of the helpers. Then come the same rows again, which
are reused from the shards.
"""

import argparse
import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

from benchmarks.machine import RESULTS, machine, versions
from llama_stack_provider_moe.compute.data import tokenising
from llama_stack_provider_moe.compute.data.datasets import SFT_FEATURES
from llama_stack_provider_moe.compute.data.encoding import Limit, SftEncoder
from llama_stack_provider_moe.compute.data.rendering import Rendering
from llama_stack_provider_moe.compute.data.shards import Recipe, stretches
from llama_stack_provider_moe.compute.data.workers import fork_from_a_server
from llama_stack_provider_moe.ground import liveness
from tests.support import llama_support

ROWS = 40_000
WORDS = ("garden", "river", "letter", "spring", "answer", "friend", "stones", "light", "many", "careful", "question")


def write_rows(path: Path, count: int) -> int:
    """Write rows of some 2 KB; the bytes of the file."""
    choose = random.Random(0)

    def text(words: int) -> str:
        return " ".join(choose.choices(WORDS, k=words))

    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            turns = [("user", 60), ("assistant", 110), ("user", 20), ("assistant", 110)]
            messages = [{"role": role, "content": f"{number} {text(words)}"} for role, words in turns]
            file.write(json.dumps({"messages": messages}) + "\n")
    return path.stat().st_size


def measure(path: Path, folder: Path, processes: int) -> dict[str, Any]:
    """Tokenise the rows once, and once more from the shards; call it in a process that has done nothing before."""
    fork_from_a_server()
    encoder = SftEncoder(llama_support.tokenizer(), Rendering(), Limit(1024))
    recipe = Recipe(encoder, SFT_FEATURES, 1 << 16)
    seconds, firsts = list[float](), list[float]()
    folder.mkdir()
    liveness.EVERY_S = 0.0  # every chunk is reported, the first one too
    for _ in range(2):
        began = time.monotonic()
        source = tokenising.Source(path, "train", list(stretches(path)), {})
        with liveness.reports_to(lambda work: firsts.append(time.monotonic() - began) if work.done else None):  # noqa: B023
            made = tokenising.make_shards(recipe, source, folder, processes, lambda text, level: None)
        seconds.append(time.monotonic() - began)
    rows = sum(shard.counts.source for _, shard in made)
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.arrow")):
        digest.update(file.read_bytes())
    status = Path("/proc/self/status").read_text()
    return {
        "processes": processes,
        "seconds": round(seconds[0], 1),
        "rows_per_second": round(rows / seconds[0]),
        "seconds_to_the_first_rows": round(firsts[0], 1),
        "rows_per_second_after_them": round(rows / (seconds[0] - firsts[0])),
        "seconds_reused": round(seconds[1], 2),
        "peak_bytes_of_the_first_process": int(status.partition("VmHWM:")[2].split()[0]) * 1024,
        "arrow_bytes": sum(file.stat().st_size for file in folder.glob("*.arrow")),
        "arrow_sha256": digest.hexdigest(),
    }


def in_another_process(path: Path, folder: Path, processes: int) -> dict[str, Any]:
    """`measure` in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.tokenising", "--measure", str(path), str(folder), str(processes)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Measure, print, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=ROWS, help="number of rows")
    parser.add_argument("--note", default="nothing else that is known of", help="what else ran on the machine")
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)  # the child process
    parser.add_argument(
        "--out", type=Path, default=RESULTS / f"tokenising_{datetime.now(UTC):%Y-%m-%d}.json", help="result file"
    )
    options = parser.parse_args()
    if options.measure is not None:
        path, folder, processes = options.measure
        print(json.dumps(measure(Path(path), Path(folder), int(processes))))
        return
    load = psutil.getloadavg()
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "train.jsonl"
        size = write_rows(path, options.rows)
        found = [in_another_process(path, Path(name) / str(count), count) for count in (1, 2)]
    assert found[0]["arrow_sha256"] == found[1]["arrow_sha256"], "the files depend on the number of processes"
    result = {
        "what": "conversations of a JSONL file tokenised into Arrow files, on one and on two processes; the time with "
        "two includes the start of the helpers",
        "command": "OMP_NUM_THREADS=1 python -m benchmarks.tokenising",
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "rows": options.rows,
        "bytes_per_row": round(size / options.rows),
        "threads_per_process": int(os.environ.get("OMP_NUM_THREADS", "0")) or None,
        "load_average_before": [round(each, 1) for each in load],
        "also_running": options.note,
        "runs": found,
        "packages": versions("tokenizers", "transformers", "datasets", "pyarrow"),
        "machine": machine(),
    }
    print(json.dumps(result, indent=2))
    options.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
