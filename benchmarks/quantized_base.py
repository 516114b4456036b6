"""A real Mixture-of-Experts model over 4, 8 and 16 bits: bytes, and its loss, step by step.

The 4 bits have scales of 32 or of 8 bits (double quantisation).
SmolLM2-4x135M (380 million parameters) is the model of `make demo`; run that first. Bytes are those of weights and
codes, and of a process's resident set before and after quantising. Then the same SFT job, LoRA on all experts, runs
over each base, through the HTTP API: same rows, same order, same seed. Run

    python -m benchmarks.quantized_base [--model FOLDER] [--steps N] [--out FILE]
"""

import argparse
import gc
import json
import logging
import multiprocessing
import os
import shutil
import statistics
import tempfile
from datetime import UTC, datetime
from itertools import pairwise
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.machine import RESULTS, machine, versions
from benchmarks.served_job import run_to_end
from llama_stack_provider_moe.jobdir.events import read
from llama_stack_provider_moe.jobdir.folder import JobFolder
from tests.support.host_harness import QUICKSTART, Server, run_config, serving

ROOT = Path(__file__).parent.parent
MODEL = ROOT / ".cache" / "demo" / "models" / "SmolLM2-4x135M"
BASES: dict[str, dict[str, Any]] = {
    "16 bits": {},
    "8 bits": {"quantize_base": True, "quantize_bits": 8},
    "4 bits": {"quantize_base": True},
    "4 bits, 8-bit scales": {"quantize_base": True, "quantize_scales": True},
}
CODINGS = {base: (adapter.get("quantize_bits", 4), adapter.get("quantize_scales", False))
           for base, adapter in BASES.items() if adapter}  # fmt: skip
BATCH = 4


def weigh(model: Path, base: str, pipe: Connection) -> None:
    """A process's work: load in bf16, quantise, and tell bytes of tensors and of the resident set."""
    import torch
    from transformers import AutoModelForCausalLM

    from benchmarks.cpu_experts import status
    from llama_stack_provider_moe.compute.moe.codes import Coding
    from llama_stack_provider_moe.compute.moe.derive import find_layout
    from llama_stack_provider_moe.compute.moe.quantize import quantize

    torch.set_num_threads(1)
    bare = status("VmRSS")
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    for parameter in loaded.parameters():  # of its own, no longer a view of the file
        parameter.data = parameter.data.clone()
    gc.collect()
    before = status("VmRSS")
    report = quantize(loaded, find_layout(loaded), Coding(*CODINGS[base]), torch.device("cpu"))
    gc.collect()
    after = status("VmRSS")
    pipe.send(report.as_json() | {"resident_before": before - bare, "resident_after": after - bare})


def weighed(model: Path, base: str) -> dict[str, Any]:
    """In a process of its own, whose large blocks go back to the system at once."""
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    process = spawn.Process(target=weigh, args=(model, base, theirs))
    process.start()
    found: dict[str, Any] = ours.recv()
    process.join()
    return found


def losses(server: Server, name: str, adapter: dict[str, Any], steps: int) -> dict[str, Any]:
    """Run the job and read its figures."""
    job_id = name.replace(" ", "-").replace(",", "")
    body = {
        "recipe": "sft", "job_uuid": job_id, "model": str(server.state_dir / "models" / MODEL.name),
        "data": {"dataset_id": "train", "validation_dataset_id": "held-out"},
        "training": {"batch_size": BATCH, "max_steps_per_epoch": steps, "dtype": "bf16"},
        "optimizer": {"lr": 2e-4}, "adapter": {"rank": 8, "alpha": 16, **adapter},
        "moe": {"router_aux_loss_coef": 0.01}, "options": {"max_length": 256},
    }  # fmt: skip
    run_to_end(server, body, poll_s=2)
    events = read(JobFolder(server.config().jobs_dir / job_id).events, limit=10_000).events
    held_out = [event.metrics["validation_loss"] for event in events if event.type == "evaluation"]
    return {
        "held_out_before_after": [round(held_out[0], 4), round(held_out[-1], 4)],
        "median_step_s": round(statistics.median(_durations(events)), 2),
        "cross_entropy": [round(event.metrics["ce"], 4) for event in events if event.type == "step"],
    }


def _durations(events: list[Any]) -> list[float]:
    times = [event.time for event in events if event.type == "step"]
    return [(later - earlier).total_seconds() for earlier, later in pairwise(times)]


def rows(name: str) -> list[dict[str, Any]]:
    """Rows of the demo's data."""
    lines = (ROOT / "examples" / "data" / name).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def main() -> None:
    """Measure, print, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL, help="folder of the model")
    parser.add_argument("--steps", type=int, default=50, help="optimiser steps of each job (default: 50)")
    parser.add_argument(
        "--out", type=Path, default=RESULTS / f"quantized_base_{datetime.now(UTC):%Y-%m-%d}.json", help="result file"
    )
    arguments = parser.parse_args()
    if not (arguments.model / "config.json").is_file():
        parser.error(f"{arguments.model} is no model; `make demo` makes it")
    logging.getLogger("httpx").setLevel(logging.WARNING)  # the client SDK's import turns its lines on
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(256 * 1024)
    weights = {base: weighed(arguments.model, base) for base in CODINGS}
    print(json.dumps(weights, indent=2), flush=True)
    curves: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        changes = {"child_env": {"HF_HUB_OFFLINE": "1"}}
        with serving(run_config(QUICKSTART, Path(name), provider=changes), Path(name) / "state") as server:
            shutil.copytree(arguments.model, server.state_dir / "models" / MODEL.name)
            server.register("train", rows("instructions.jsonl"))
            server.register("held-out", rows("instructions_heldout.jsonl"))
            for base, adapter in BASES.items():
                curves[base] = losses(server, base, adapter, arguments.steps)
                print(base, json.dumps(curves[base]), flush=True)
    plain = curves["16 bits"]["cross_entropy"]
    result = {
        "what": f"{MODEL.name}, LoRA r=8 on attention and all experts, {arguments.steps} steps of {BATCH} rows, bf16",
        "command": f"python -m benchmarks.quantized_base --steps {arguments.steps}",
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "bytes_to_16_bits": {
            base: round(each["bytes_after"] / each["bytes_before"], 3) for base, each in weights.items()
        },
        "mean_cross_entropy_above_16_bits": {
            base: round(statistics.mean(each["cross_entropy"]) - statistics.mean(plain), 4)
            for base, each in curves.items()
            if base != "16 bits"
        },
        "step_time_to_16_bits": {
            base: round(each["median_step_s"] / curves["16 bits"]["median_step_s"], 2)
            for base, each in curves.items()
            if base != "16 bits"
        },
        "bytes": weights,
        "curves": curves,
        "machine": machine() | {"load_average": os.getloadavg()},
        "versions": versions("torch", "transformers", "peft", "trl", "bitsandbytes"),
    }
    arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps({key: value for key, value in result.items() if key != "curves"}, indent=2))


if __name__ == "__main__":
    main()
