"""Time from a job's submission to its first optimiser step, and from its last one to `completed`.

One server for each way (`supervisor.warm` false and true: cold, and forked from the forkserver) gets the same tiny
Mixture-of-Experts job many times; the jobs of the two servers alternate. The warm server's forkserver is ready before
the first job: its imports are measured separately. Times of events and of the end are those that the job's process and
the supervisor wrote, so they don't depend on how often this program asks. Run `make bench`, or

    python -m benchmarks.job_start [--runs N] [--out FILE]
"""

import argparse
import json
import logging
import os
import statistics
import tempfile
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.machine import RESULTS, machine, versions
from benchmarks.served_job import LIMIT_S, run_to_end
from llama_stack_provider_moe.jobdir.events import read
from llama_stack_provider_moe.jobdir.folder import JobFolder
from tests.support import tiny_models
from tests.support.host_harness import QUICKSTART, Server, run_config, serving

PACKAGES = ["llama-stack-provider-moe", "llama-stack", "torch", "transformers", "trl", "peft", "datasets"]
WAYS = {"cold": False, "warm": True}
ROWS = [{"prompt": f"Write word {number}.", "completion": "The capital of France is Paris."} for number in range(16)]


def start(folder: Path, warm: bool, stack: ExitStack) -> Server:
    """A server whose supervisor stays, and whose forkserver, if it has one, is ready."""
    folder.mkdir()
    changes = {
        "child_env": {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        "supervisor": {"warm": warm, "idle_exit_s": LIMIT_S},
    }
    server = stack.enter_context(serving(run_config(QUICKSTART, folder, provider=changes), folder / "state"))
    tiny_models.build("granitemoe", server.state_dir / "models" / "granitemoe")
    server.register("rows", ROWS)
    first_step(server, "first")  # starts the supervisor, and its forkserver; files are read from disk; not counted
    return server


def first_step(server: Server, job_id: str) -> dict[str, float]:
    """Submit a job and wait for it: seconds to its process, first step and last event, and from its last step."""
    body = {
        "recipe": "sft", "job_uuid": job_id, "model": str(server.state_dir / "models" / "granitemoe"),
        "data": {"dataset_id": "rows"}, "training": {"batch_size": 4, "max_steps_per_epoch": 2, "dtype": "fp32"},
        "adapter": {"rank": 4, "alpha": 8}, "options": {"max_length": 64, "validation_split": 0},
    }  # fmt: skip
    began = datetime.now(UTC)
    completed = datetime.fromisoformat(run_to_end(server, body, poll_s=0.5)["completed_at"])
    events = read(JobFolder(server.config().jobs_dir / job_id).events).events
    at = {kind: next(event.time for event in events if event.type == kind) for kind in ("started", "step")}
    last_step = max(event.time for event in events if event.type == "step")
    return {
        "started_s": (at["started"] - began).total_seconds(),
        "first_step_s": (at["step"] - began).total_seconds(),
        "ended_s": (events[-1].time - began).total_seconds(),
        "last_step_to_last_event_s": (events[-1].time - last_step).total_seconds(),
        "last_step_to_completed_s": (completed - last_step).total_seconds(),
    }


def import_seconds(server: Server) -> float:
    """How long the forkserver's imports took, as the supervisor logged it."""
    lines = (server.state_dir / "supervisor.log").read_text(encoding="utf-8").splitlines()
    (ready,) = [line for line in lines if "the forkserver is ready after" in line]
    return float(ready.split()[-2])


def main() -> None:
    """Measure, print, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5, help="number of jobs for each way (default: 5)")
    parser.add_argument(
        "--out", type=Path, default=RESULTS / f"job_start_{datetime.now(UTC):%Y-%m-%d}.json", help="result file"
    )
    arguments = parser.parse_args()
    logging.getLogger("httpx").setLevel(logging.WARNING)  # the client SDK's import turns its lines on
    runs: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    load_before = os.getloadavg()
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        servers = {way: start(Path(name) / way, warm, stack) for way, warm in WAYS.items()}
        for number in range(arguments.runs):
            for way in list(WAYS) if number % 2 == 0 else reversed(list(WAYS)):
                runs[way].append(first_step(servers[way], f"job-{number}"))
                print(way, json.dumps(runs[way][-1]), flush=True)
        imports_s = import_seconds(servers["warm"])
    spread = {
        way: {key: [round(pick(run[key] for run in found), 3) for pick in (min, statistics.median, max)]
              for key in found[0]}
        for way, found in runs.items()
    }  # fmt: skip
    ratio = spread["cold"]["first_step_s"][1] / spread["warm"]["first_step_s"][1]
    result: dict[str, Any] = {
        "what": "POST /jobs to the first optimiser step of a tiny Granite MoE, and its last step to `completed`, cold "
        "and from the forkserver",
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "cold_to_warm_first_step": round(ratio, 2),
        "forkserver_imports_s": imports_s,
        "min_median_max": spread,
        "runs": runs,
        "machine": machine(),
        "load_average": {"before": load_before, "after": os.getloadavg()},
        "versions": versions(*PACKAGES),
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps({key: result[key] for key in ("cold_to_warm_first_step", "min_median_max")}, indent=2))


if __name__ == "__main__":
    main()
