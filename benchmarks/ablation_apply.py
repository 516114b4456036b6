"""A direction taken out of a checkpoint on disk: throughput against a plain copy of the same files, and memory.

    $ OMP_NUM_THREADS=1 python -m benchmarks.ablation_apply   # a synthetic Mixture-of-Experts of some 4 GB

The checkpoint is that of `benchmarks.merge`: a Mixtral of random bf16 numbers, with one tensor per expert on disk. The
plan edits attention, all routed experts and all routers of every block. `benchmarks.against_copy` says how both are
timed; memory is the peak resident set of a fresh process during the edit, minus its resident set before, with torch
imported and one tiny edit done.
"""

import argparse
import json
import os
import shutil
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks.against_copy import FULL as FULL_FOLDER
from benchmarks.against_copy import OUT, compared, timed
from benchmarks.against_copy import in_another_process as another_process
from benchmarks.machine import RESULTS, machine, versions
from benchmarks.merge import FULL, TINY, Shape, write_base
from llama_stack_provider_moe.compute.ablation import measurements
from llama_stack_provider_moe.compute.ablation.apply import apply
from llama_stack_provider_moe.compute.ablation.fingerprint import fingerprint
from llama_stack_provider_moe.compute.ablation.measurements import MeasuredSet, MeasuredStates, Measurements, Provenance
from llama_stack_provider_moe.spec.ablation import AblationPlan

_MEASURED = "measurements.safetensors"
_ROWS = 8


def write_measurements(folder: Path, shape: Shape, out: Path) -> None:
    """Random means of a checkpoint that `write_base` wrote."""
    layers, width = shape.layers, shape.hidden
    states = [
        MeasuredStates(
            torch.randn(layers, width, dtype=torch.float64),
            torch.randn(2, layers, width, dtype=torch.float64),
            torch.randn(_ROWS, layers),
        )
        for _ in range(2)
    ]
    provenance = Provenance(
        model=str(folder), fingerprint=fingerprint(folder), adapter=None, model_type="mixtral", layers=layers,
        width=width, position=-1, dtype="bf16", quantize_bits=None, chat_template="",
        sets={name: MeasuredSet(source=name, rows=_ROWS, sha256="") for name in measurements.SETS},
        router_norms=dict.fromkeys(range(layers), "post_attention_layernorm"), normed_outputs=[],
    )  # fmt: skip
    measurements.write(Measurements(provenance, *states), out)


def plan(layers: int) -> AblationPlan:
    """Everything that can be edited."""
    entry = {"layer": f"0-{layers - 1}", "measurement": layers // 2}
    return AblationPlan.model_validate({"ablate_individual_experts": True, "gate_scale": 1.0, "ablate": [entry]})


def write_all(folder: Path, shape: Shape) -> int:
    """A tiny and a full checkpoint with their measurements; bytes of the full one."""
    total = 0
    for name, of in (("tiny", TINY), ("full", shape)):
        (folder / name).mkdir()
        total = write_base(folder / name, of)
        write_measurements(folder / name, of, folder / f"{name}_{_MEASURED}")
    return total


def apply_measured(folder: Path, layers: int) -> dict[str, Any]:
    """Edit what `write_all` wrote; call it in a process that has done nothing before."""
    tiny = measurements.read(folder / f"tiny_{_MEASURED}", "tiny")
    apply(str(folder / "tiny"), plan(TINY.layers), tiny, folder / "tiny_out")
    shutil.rmtree(folder / "tiny_out")
    found = measurements.read(folder / f"{FULL_FOLDER}_{_MEASURED}", "full")

    def work() -> dict[str, Any]:
        report = apply(str(folder / FULL_FOLDER), plan(layers), found, folder / OUT)
        return {
            "edited_tensors": len(report.touched),
            "copied_tensors": sum(map(len, report.skipped.values())),
            "edited_bytes": report.bytes_touched,
            "largest_matrix_bytes_in_fp32": report.largest_bytes,
        }

    return timed(work)


def in_another_process(folder: Path, layers: int) -> dict[str, Any]:
    """`apply_measured` in a fresh process."""
    return another_process("benchmarks.ablation_apply", ["--apply", str(folder), "--layers", str(layers)])


def measure(folder: Path, shape: Shape, rounds: int) -> dict[str, Any]:
    """Write a checkpoint below `folder`, copy and edit it."""
    total = write_all(folder, shape)
    return {
        "checkpoint_bytes": total,
        "files": len(list((folder / FULL_FOLDER).glob("*.safetensors"))),
        **compared("apply", folder, total, rounds, lambda: in_another_process(folder, shape.layers)),
    }


def main() -> None:
    """Measure, print, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--layers", type=int, default=FULL.layers, help="number of layers in the checkpoint, some 200 MB each"
    )
    parser.add_argument("--rounds", type=int, default=3, help="number of edits, with a copy before and after each")
    parser.add_argument("--apply", type=Path, help=argparse.SUPPRESS)  # the child process: edit the checkpoint there
    parser.add_argument(
        "--out", type=Path, default=RESULTS / f"ablation_apply_{datetime.now(UTC):%Y-%m-%d}.json", help="result file"
    )
    options = parser.parse_args()
    if options.apply is not None:
        print(json.dumps(apply_measured(options.apply, options.layers)))
        return
    shape = FULL._replace(layers=options.layers)
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder), shape, options.rounds)
    result = {
        "what": "a direction taken out of a checkpoint on disk, against shutil.copyfile of the same files, both synced",
        "command": "OMP_NUM_THREADS=1 python -m benchmarks.ablation_apply",
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "shape": shape._asdict(),
        "threads": torch.get_num_threads(),
        "niceness": os.nice(0),
        "load_average": [round(each, 1) for each in os.getloadavg()],
        **found,
        "packages": versions("torch", "transformers"),
        "machine": machine(),
    }
    print(json.dumps(result, indent=2))
    options.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
