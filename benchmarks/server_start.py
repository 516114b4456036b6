"""What our provider costs a server: time until healthy, processor time and memory, with it and without it.

Both servers use `run_configs/quickstart.yaml`; the second one's copy has no post-training API. Runs alternate, and so
does the order of each pair, so that a busy machine disturbs both alike; the ratios are of medians. Run `make bench`, or

    python -m benchmarks.server_start [--runs N] [--out FILE]
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import yaml

from benchmarks.machine import RESULTS, machine, versions
from tests.support.host_harness import QUICKSTART, serving

PACKAGES = [
    "llama-stack-provider-moe", "llama-stack", "llama-stack-api", "fastapi", "pydantic", "sqlalchemy", "starlette",
    "uvicorn",
]  # fmt: skip
WITH, WITHOUT = "with_provider", "without_provider"
HEAVY = ("libtorch", "/torch/", "/triton/")  # in the path of a mapped file
COMPARED = ("healthy_s", "cpu_s", "rss_mib")
IDLE_WINDOWS, IDLE_WINDOW_S = 10, 0.5


def configs(folder: Path) -> dict[str, Path]:
    """The two run YAMLs, by variant."""
    content = yaml.safe_load(QUICKSTART.read_text(encoding="utf-8"))
    content["apis"].remove("post_training")
    del content["providers"]["post_training"]
    bare = folder / "bare.yaml"
    bare.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return {WITH: QUICKSTART, WITHOUT: bare}


def measure(config: Path, state_dir: Path) -> dict[str, float]:
    """One start, from an empty state folder, and a look at the server when it has come to rest."""
    with serving(config, state_dir, health="/v1/health") as server:
        root = psutil.Process(server.process.pid)
        processes = [root, *root.children(recursive=True)]
        cpu_s = sum(sum(process.cpu_times()[:2]) for process in processes)
        mapped = Path(f"/proc/{root.pid}/maps").read_text(encoding="utf-8")
        loaded = [name for name in HEAVY if name in mapped]
        assert "pydantic_core" in mapped, "this is the process that serves"
        assert not loaded, f"the server has loaded {loaded}"
        idle = []
        for _ in range(IDLE_WINDOWS):
            before = sum(root.cpu_times()[:2])
            time.sleep(IDLE_WINDOW_S)
            idle.append((sum(root.cpu_times()[:2]) - before) / IDLE_WINDOW_S)
        return {
            "healthy_s": server.healthy_s,
            "cpu_s": cpu_s,
            "rss_mib": sum(process.memory_info().rss for process in processes) / 2**20,
            "processes": len(processes),
            "idle_cpu_share_median": statistics.median(idle),
            "idle_cpu_share_min": min(idle),
        }


def summary(runs: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Ratios of medians, and whether they mean anything: on a busy machine the two variants' ranges overlap."""
    spread = {
        variant: {key: [round(pick(run[key] for run in found), 3) for pick in (min, statistics.median, max)]
                  for key in found[0]}
        for variant, found in runs.items()
    }  # fmt: skip
    compared = {}
    for key in COMPARED:
        (low, median, high), (low_bare, median_bare, high_bare) = spread[WITH][key], spread[WITHOUT][key]
        told_apart = low > high_bare or high < low_bare
        compared[key] = {"ratio_of_medians": round(median / median_bare, 3), "ranges_told_apart": told_apart}
    return {"with_to_without": compared, "min_median_max": spread}


def main() -> None:
    """Measure, print, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5, help="number of runs of each variant (default: 5)")
    parser.add_argument(
        "--out", type=Path, default=RESULTS / f"server_start_{datetime.now(UTC):%Y-%m-%d}.json", help="result file"
    )
    arguments = parser.parse_args()
    runs: dict[str, list[dict[str, float]]] = {WITH: [], WITHOUT: []}
    load_before = os.getloadavg()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        variants = configs(folder)
        measure(variants[WITH], folder / "warm-up")  # reads the libraries from disk; not counted
        for number in range(arguments.runs):
            for variant in (WITH, WITHOUT) if number % 2 == 0 else (WITHOUT, WITH):
                runs[variant].append(measure(variants[variant], folder / f"{variant}-{number}"))
                print(variant, json.dumps(runs[variant][-1]), flush=True)
    result = {
        "what": "llama stack run run_configs/quickstart.yaml, with and without inline::moe",
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        **summary(runs),
        "torch_in_server": False,  # asserted in every run, from /proc/PID/maps
        "runs": runs,
        "machine": machine(),
        "load_average": {"before": load_before, "after": os.getloadavg()},
        "versions": versions(*PACKAGES),
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(summary(runs), indent=2))


if __name__ == "__main__":
    main()
