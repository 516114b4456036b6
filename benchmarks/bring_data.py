"""How fast rows come to the server, and what that costs it: `moe-train data push` to a real server, end to end.

Serves `run_configs/quickstart.yaml` by `llama stack run`, and pushes files of rows of 2 KB: as JSON Lines, gzipped, CSV
and Parquet. Then one file of 1 GB, while the server's memory is sampled and another client asks for the health. Server
and command share the machine. A push includes the start of the command, the checks of every row, and the flush of the
stored file to the disk. In the end JSON Lines again, with server, command and
all else on one core. Run `make bench`, or

    python -m benchmarks.bring_data [--rows N] [--large-bytes N] [--out FILE]
"""

import argparse
import csv
import gzip
import json
import os
import random
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import httpx
import psutil

from benchmarks.machine import RESULTS, machine, versions
from benchmarks.server_start import PACKAGES
from llama_stack_provider_moe.jobdir.events import now
from tests.support.cli_support import MOE_TRAIN
from tests.support.host_harness import API, QUICKSTART, Server, run_config, serving

ROW_BYTES = 2000
FORMATS = ("rows.jsonl", "rows.jsonl.gz", "rows.csv", "rows.parquet")
SAMPLE_S = 0.05
WORDS = (
    "expert",
    "router",
    "token",
    "layer",
    "gradient",
    "answer",
    "question",
    "model",
    "loss",
    "batch",
    "warm",
    "step",
)


def rows(count: int) -> Iterator[dict[str, str]]:
    """Rows of `ROW_BYTES` bytes as JSON, of words, so that they compress like text."""
    dice = random.Random(0)
    for number in range(count):
        completion = " ".join(dice.choices(WORDS, k=400))
        row = {"prompt": f"Question {number}?", "completion": completion}
        surplus = len(json.dumps(row)) + 1 - ROW_BYTES
        row["completion"] = completion[:-surplus] if surplus > 0 else completion + "." * -surplus
        yield row


def write(path: Path, count: int) -> None:
    """Write `count` rows in the format of the file's name."""
    if path.suffix == ".parquet":
        arrow, parquet = import_module("pyarrow"), import_module("pyarrow.parquet")
        parquet.write_table(arrow.Table.from_pylist(list(rows(count))), path)
    elif path.suffix == ".csv":
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, ["prompt", "completion"])
            writer.writeheader()
            writer.writerows(rows(count))
    else:
        with gzip.open(path, "wb", 6) if path.suffix == ".gz" else path.open("wb") as file:
            for row in rows(count):
                file.write(json.dumps(row).encode() + b"\n")


class Watch:
    """Samples the server's memory, and the time of answers to another client, until the block ends."""

    def __init__(self, server: Server) -> None:
        self._process = psutil.Process(server.process.pid)
        self._url = f"{server.url}{API}/health"
        self._ends = threading.Event()
        self._threads = [threading.Thread(target=run) for run in (self._sample, self._ask)]
        self.rss_before = self._process.memory_info().rss
        self.rss_peak = self.rss_before
        self.answers_s: list[float] = []

    def __enter__(self) -> "Watch":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ends.set()
        for thread in self._threads:
            thread.join()

    def _sample(self) -> None:
        while not self._ends.wait(SAMPLE_S):
            self.rss_peak = max(self.rss_peak, self._process.memory_info().rss)

    def _ask(self) -> None:
        with httpx.Client(timeout=60) as client:
            while not self._ends.wait(SAMPLE_S):
                began = time.perf_counter()
                client.get(self._url).raise_for_status()
                self.answers_s.append(time.perf_counter() - began)

    def figures(self) -> dict[str, Any]:
        """Figures for the result file."""
        return {
            "server_rss_mb": {
                "before": round(self.rss_before / 1e6, 1), "peak": round(self.rss_peak / 1e6, 1),
                "after": round(self._process.memory_info().rss / 1e6, 1),
            },
            "health_ms": {"median": round(1e3 * statistics.median(self.answers_s), 1),
                          "max": round(1e3 * max(self.answers_s), 1), "n": len(self.answers_s)},
        }  # fmt: skip


def push(server: Server, path: Path, name: str) -> dict[str, Any]:
    """Push a file as a user does; the figures of it."""
    command = [*MOE_TRAIN, "data", "push", str(path), "--name", name, "--json", "--url", server.url]  # fmt: skip
    began = time.perf_counter()
    done = subprocess.run(command, capture_output=True, check=True)
    seconds = time.perf_counter() - began
    answer = json.loads(done.stdout)
    assert answer["is_new"], "the figure is of rows that were stored"
    return {
        "rows": answer["rows"], "stored_mb": round(answer["bytes"] / 1e6, 1), "sent_mb": round(
            answer["received_bytes"] / 1e6, 1), "seconds": round(seconds, 2),
        "rows_per_s": round(answer["rows"] / seconds), "stored_mb_per_s": round(answer["bytes"] / 1e6 / seconds, 1),
    }  # fmt: skip


def measure(folder: Path, count: int, large_bytes: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Push each file to one server."""
    settings = {"supervisor": {"start": False}}
    found: dict[str, Any] = {}
    with serving(run_config(QUICKSTART, folder, settings), folder / "state") as server:
        warm_up = folder / "warm-up.jsonl"
        write(warm_up, 1000)
        push(server, warm_up, "warm-up")
        for number, name in enumerate(FORMATS):
            path = folder / name
            write(path, count)
            found[name] = push(server, path, f"data-{number}")
            path.unlink()
            say(f"{name}: {found[name]}")
        large = folder / "large.jsonl"
        write(large, large_bytes // ROW_BYTES)
        with Watch(server) as watch:
            found["large.jsonl"] = push(server, large, "large")
        found["large.jsonl"] |= watch.figures()
        say(f"large.jsonl: {found['large.jsonl']}")
    return found


def measure_on_one_core(folder: Path, count: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Push a file of JSON Lines, with everything that this process starts on one core."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    try:
        path = folder / FORMATS[0]
        write(path, count)
        with serving(run_config(QUICKSTART, folder, {"supervisor": {"start": False}}), folder / "state") as server:
            found = push(server, path, "data")
    finally:
        os.sched_setaffinity(0, cores)
    say(f"one core: {found}")
    return found


def main() -> None:
    """Measure, print, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000, help="rows of each file (default: 100000)")
    parser.add_argument("--large-bytes", type=int, default=10**9, help="size of the large file (default: 1 GB)")
    parser.add_argument("--out", type=Path, default=RESULTS / f"bring_data_{now():%Y-%m-%d}.json", help="result file")
    arguments = parser.parse_args()
    load_before = os.getloadavg()

    def say(line: str) -> None:
        print(line, flush=True)

    with tempfile.TemporaryDirectory() as folder:
        figures = measure(Path(folder), arguments.rows, arguments.large_bytes, say)
    with tempfile.TemporaryDirectory() as folder:
        figures["rows.jsonl on one core"] = measure_on_one_core(Path(folder), arguments.rows, say)
    result = {
        "what": f"moe-train data push of {arguments.rows:,} rows of {ROW_BYTES:,} bytes in each format, then of one "
        f"file of {arguments.large_bytes:,} bytes, to llama stack run run_configs/quickstart.yaml",
        "time": now().isoformat(timespec="seconds"),
        "pushes": figures,
        "machine": machine() | {"load_average": {"before": load_before, "after": os.getloadavg()}},
        "versions": versions(*PACKAGES, "pyarrow"),
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
