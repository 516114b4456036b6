"""How the cost of a poll grows with a job: `status` and `metrics?since_step=` at 1,000 and at 50,000 steps.

    python -m benchmarks.polling [--folder DIR] [--out FILE]

Two jobs in progress with tables of 8 layers of 128 experts at every step, as `moe.routing_every_n_steps` 1 writes
them: the longer one has 1.05 GB of events. Between two polls one step is appended. The routes run in this process
without a host, so that its processor time is the server's; each figure is a mean over the polls. `follow_cost` has the
other looks at a job, and its followers.
"""

import argparse
import asyncio
import json
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

from benchmarks.follow_cost import PACKAGES, Shape, job, of_polls
from benchmarks.machine import RESULTS, machine, versions
from tests.support.host_support import app_of, serving_in_process

SHAPES = (Shape("short", 1_000, 8, 128), Shape("long", 50_000, 8, 128))
TARGETS_MS = {"status": 10.0, "metrics since the last step": 20.0}


def measure(folder: Path, shapes: tuple[Shape, ...] = SHAPES) -> dict[str, Any]:
    """Milliseconds of each poll of each job, how they grow from the first to the last, and the targets."""
    jobs: dict[str, dict[str, Any]] = {}
    for shape in shapes:
        with serving_in_process(folder / shape.name) as service:
            writer, job_folder = job(service, shape)
            size = job_folder.events.stat().st_size
            polls = asyncio.run(of_polls(app_of(service), shape, writer, job_folder.events))
            job_folder.events.unlink()
        jobs[shape.name] = {"steps": shape.steps, "bytes": size, "cpu_ms": {name: polls[name] for name in TARGETS_MS}}
    first, last = (jobs[shape.name]["cpu_ms"] for shape in (shapes[0], shapes[-1]))
    return {
        "jobs": jobs,
        "growth": {name: round(last[name] / first[name], 2) for name in TARGETS_MS},
        "targets_ms": TARGETS_MS,
        "hit": {name: last[name] <= limit for name, limit in TARGETS_MS.items()},
    }


def main() -> None:
    """Measure, and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where the files go; by default a temporary folder")
    parser.add_argument("--out", type=Path, default=RESULTS / f"polling_{date.today()}.json", help="result file")
    arguments = parser.parse_args()
    if arguments.folder is not None:
        arguments.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        found = measure(Path(name))
    written = {"command": "python -m benchmarks.polling", "machine": machine(), "versions": versions(*PACKAGES)}
    arguments.out.write_text(json.dumps(written | found, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
