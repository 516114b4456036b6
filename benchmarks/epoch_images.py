"""An epoch over many rows with an image each: the memory of the server that receives them, and of the job.

    python -m benchmarks.epoch_images [--rows 500 10000]

A server gets data sets of so many rows, one after the other, and trains a tiny random Qwen3-VL-MoE on each for one
epoch, 32 rows a step. Each row has an image of its own, 24 x 16 pixels. The server's largest resident size is read
after each job; a job's process tells its own with each step. Writes `benchmarks/results/epoch_images_DATE.json`.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.machine import RESULTS, machine, versions
from benchmarks.rows_with_images import peak_bytes
from llama_stack_provider_moe.jobdir import events
from llama_stack_provider_moe.jobdir.folder import JobFolder
from tests.support import tiny_vlms
from tests.support.host_harness import QUICKSTART, Server, run_config, serving
from tests.support.image_bytes import asked, part, png
from tests.support.shared_server import PROVIDER

MIB = 1 << 20
FAMILY = "qwen3_vl_moe"
BATCH = 32
ROWS = (500, 10_000)
LIMIT_S = 1800.0


def lines(count: int) -> Iterator[bytes]:
    """Yield the rows of the body, each with another image."""
    for number in range(count):
        yield json.dumps(asked(part(png(24, 16, number)), text="Which?", answer=f"{number:,}.")).encode() + b"\n"


def measured(server: Server, count: int) -> dict[str, Any]:
    """Push so many rows, train on them, and return the figures."""
    name, began = f"epoch-{count}", time.monotonic()
    with server.http(timeout_s=LIMIT_S) as http:
        http.headers["Connection"] = "close"  # the server closes idle connections after 5 s
        stored = http.put(f"/datasets/{name}", content=lines(count)).raise_for_status().json()
        pushed = time.monotonic()
        body = {
            "recipe": "sft", "job_uuid": name, "model": str(server.state_dir / "models" / FAMILY),
            "data": {"dataset_id": f"data:{name}"}, "training": {"batch_size": BATCH, "dtype": "fp32"},
            "adapter": {"rank": 4}, "options": {"max_length": 64, "validation_split": 0.0}, "resources": {"gpus": 0},
        }  # fmt: skip
        http.post("/jobs", json=body).raise_for_status()
        while (job := http.get(f"/jobs/{name}").raise_for_status().json())["status"] in ("scheduled", "in_progress"):
            if time.monotonic() - began > LIMIT_S:
                raise RuntimeError(f"{name} has not ended after {LIMIT_S:g} s")
            time.sleep(1)
    if job["status"] != "completed":
        raise RuntimeError(f"{name}: {job.get('reason')}")
    folder = JobFolder(server.state_dir / "jobs" / name)
    resolved = json.loads(folder.resolved.read_text(encoding="utf-8"))
    steps = [event for event in events.read(folder.events).events if event.type == "step"]
    return {
        "rows": stored["rows"],
        "rows_trained_on": resolved["train_rows"],
        "images": len(list(folder.images.iterdir())),
        "steps": len(steps),
        "push_s": round(pushed - began, 1),
        "job_s": round(time.monotonic() - pushed, 1),
        "server_peak_mib": round(peak_bytes(server.process.pid) / MIB, 1),
        "job_peak_mib": round(max(step.metrics["memory_bytes"] for step in steps) / MIB, 1),
    }


def run(folder: Path, counts: tuple[int, ...]) -> list[dict[str, Any]]:
    """Measure data sets of so many rows on one server, smallest first."""
    state = folder / "state"
    tiny_vlms.build(FAMILY, state / "models" / FAMILY)
    with serving(run_config(QUICKSTART, folder, PROVIDER), state) as server:
        return [measured(server, count) for count in sorted(counts)]


def main() -> None:
    """Measure, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=list(ROWS), help="rows with an image each")
    given = parser.parse_args()
    load_before = os.getloadavg()
    with tempfile.TemporaryDirectory() as folder:
        figures = run(Path(folder), tuple(given.rows))
    result = {
        "what": f"an epoch of SFT of a tiny {FAMILY} over rows with an image of 24 x 16 pixels each, {BATCH} a step",
        "time": events.now().isoformat(timespec="seconds"),
        "batch": BATCH,
        "figures": figures,
        "machine": machine() | {"load_average": {"before": load_before, "after": os.getloadavg()}},
        "versions": versions("llama-stack", "torch", "transformers", "trl", "torchvision", "pillow"),
    }
    path = RESULTS / f"epoch_images_{events.now():%Y-%m-%d}.json"
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(path.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
