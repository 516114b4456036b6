"""Experts on a GPU: one layer by every backend, and whole training steps, against all baselines in one process.

Five shapes of experts (`gpu/shapes.py`) by 1,024, 8,192 and 32,768 tokens, balanced, Zipf and one-hot routing, LoRA of
rank 16 and 64, 4-bit LoRA and full fine-tuning, forward and forward with backward: transformers' eager loop and
grouped_mm (LoRA by PEFT), Liger, ours in torch and in Triton, and dense products of as many FLOPs, which are the limit.
Then LoRA SFT and DPO steps of whole models. The result has the median and the 10th to 90th percentile of 30 repetitions
(fewer for slow work, as it states), with the cache flushed before each; compiling and tuning separately; peak memory;
output and every gradient against fp32. The most informative cases come first; the result names those that `--minutes`
leaves no time for, and every baseline that is not installed. It needs torch, triton, transformers and peft. Run from
the repository's root

    python -m benchmarks.experts_gpu [--minutes M] [--only TEXT] [--out FILE]
    python -m benchmarks.experts_gpu --smoke        every path that a CPU can run, on tiny shapes
    python -m benchmarks.experts_gpu --arithmetic   write the tables of NOTES.md
"""

import argparse
import gc
import json
import os
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import models, report
from benchmarks.gpu.cases import Bench, Case, in_order, tiny
from benchmarks.gpu.layers import PEERS, VARIANTS
from benchmarks.gpu.shapes import TINY, arithmetic
from benchmarks.gpu.timing import Clock, DeviceLost, ceilings
from benchmarks.machine import RESULTS, gpu, machine, versions

NOTES = Path(__file__).parent / "NOTES.md"
BEGIN, END = "<!-- arithmetic: by --arithmetic -->\n", "<!-- end of arithmetic -->"
PACKAGES = (
    "torch", "triton", "transformers", "peft", "bitsandbytes", "liger-kernel", "quack-kernels", "trl", "pydantic",
    "matplotlib",
)  # fmt: skip
FIRST = 5  # cases before the first end-to-end runs
Result = dict[str, Any]
Unit = tuple[str, Callable[[], None]]  # what it is called when it is left out, and the work


def main() -> None:
    """Measure, print, and write a result file."""
    arguments = parsed()
    if arguments.arithmetic:
        NOTES.write_text(with_tables(NOTES.read_text(encoding="utf-8")), encoding="utf-8")
        print(arithmetic())
        return
    began = time.monotonic()
    warnings.filterwarnings("ignore", category=FutureWarning)  # of libraries' own making
    torch.set_float32_matmul_precision("highest")  # the truth is fp32, not tf32
    result = empty(arguments)
    units = planned(arguments, result)
    gc.freeze()  # libraries' objects, which would be gone through at each `tidy`
    for number, (name, work) in enumerate(units):
        if time.monotonic() - began > 60 * arguments.minutes:
            result["left_out"] = [left for left, _ in units[number:]]
            break
        try:
            work()
        except torch.OutOfMemoryError as error:
            result["skipped"][name] = f"no memory for its inputs and its truth: {str(error)[:200]}"
        except (DeviceLost, RuntimeError) as error:  # torch.AcceleratorError among them: all later work fails, too
            result["skipped"]["the rest"] = f"lost the device in {name}: {str(error)[:300]}"
            result["left_out"] = [left for left, _ in units[number:]]
            break
        print(f"{time.monotonic() - began:6.1f} s  {name}", flush=True)
        write(result, arguments.out, time.monotonic() - began)
    gc.unfreeze()
    if why := report.chart(result, arguments.out.with_suffix(".png")):
        result["skipped"]["chart"] = why
    write(result, arguments.out, time.monotonic() - began)
    print(report.table(result))


def parsed() -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--minutes", type=float, default=7.5, help="minutes after which no further case starts (default: 7.5)"
    )
    parser.add_argument("--repetitions", type=int, default=30, help="repetitions of each measurement (default: 30)")
    parser.add_argument("--only", default="", metavar="TEXT", help="run only cases and runs whose name contains TEXT")
    parser.add_argument(
        "--without", action="append", default=[], choices=list(VARIANTS), help="leave out this implementation"
    )
    parser.add_argument("--loop", action="store_true", help="end to end by a plain loop, also where trl is installed")
    parser.add_argument("--smoke", action="store_true", help="run tiny shapes in fp32 on the CPU")
    parser.add_argument("--arithmetic", action="store_true", help="write the tables of NOTES.md without measuring")
    parser.add_argument("--out", type=Path, help="result file; the chart is written beside it")
    arguments = parser.parse_args()
    if arguments.minutes <= 0 or arguments.repetitions < 3:
        parser.error("--minutes must be > 0, --repetitions >= 3")
    if not (arguments.smoke or arguments.arithmetic or torch.cuda.is_available()):
        parser.error("there is no CUDA device here; --smoke runs tiny shapes on the CPU")
    if arguments.out is None:
        if arguments.smoke:
            parser.error("--smoke needs --out: what it measures is no result to keep")
        arguments.out = RESULTS / f"experts_gpu_{datetime.now(UTC):%Y-%m-%d}.json"
    return arguments


def empty(arguments: argparse.Namespace) -> Result:
    """The result file before anything was measured."""
    options = [f"--minutes {arguments.minutes:g}", f"--repetitions {arguments.repetitions}"]
    options += [f"--only '{arguments.only}'"] if arguments.only else []
    options += [f"--without {each}" for each in arguments.without]
    options += ["--loop"] * arguments.loop + ["--smoke"] * arguments.smoke
    skipped = {
        name: "installed here, but run in an environment of its own" if find_spec(name) else f"not installed; {why}"
        for name, why in PEERS.items()
    }
    device = None if arguments.smoke else gpu()
    return {
        "what": "one experts layer and whole LoRA steps, by backend" + (", tiny, on a CPU" if arguments.smoke else ""),
        "command": f"python -m benchmarks.experts_gpu {' '.join(options)}",
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": 0.0,
        "device": "CPU" if device is None else device["name"],
        "gpu": device,
        "variants": VARIANTS,
        "ceilings": {},
        "targets": {},
        "layers": [],
        "end_to_end": [],
        "end_to_end_ratios": {},
        "skipped": skipped,
        "left_out": [],
        "machine": machine() | {"load_average": os.getloadavg()},
        "versions": versions(*PACKAGES),
    }


def planned(arguments: argparse.Namespace, result: Result) -> list[Unit]:
    """All that is to be done, the most telling first; each unit puts what it finds into `result`."""
    smoke, interpreted = arguments.smoke, os.environ.get("TRITON_INTERPRET") == "1"
    clock = Clock(
        torch.device("cpu") if smoke else torch.device("cuda", 0), arguments.repetitions, 0.05 if smoke else 4.0
    )
    dtype = torch.float32 if smoke else torch.bfloat16
    variants = tuple(each for each in VARIANTS if each not in arguments.without)
    bench = Bench(clock, dtype, interpreted, variants)
    steps = models.Steps(clock, dtype, interpreted, **({"counted": 2, "preload": 1} if smoke else {}))

    def layer(case: Case) -> Unit:
        def work() -> None:
            found = bench.run(case)
            result["layers"].append(found | {"ratios": report.ratios(found)})

        return case.name, work

    def step(run: models.Run) -> Unit:
        return f"{run.name}, {run.backend}", lambda: result["end_to_end"].append(steps.run(run))

    def limits() -> None:
        result["ceilings"] = ceilings(clock, 64 if smoke else 8192, dtype)

    cases = [layer(case) for case in (tiny(TINY) if smoke else in_order())]
    found = models.tiny_runs() if smoke else models.runs()
    found = [run for run in found if run.way == "loop" or not arguments.loop or not smoke]  # tiny runs have both ways
    found = [replace(run, way="loop") for run in found] if arguments.loop else found
    runs = [step(run) for run in found if run.backend not in arguments.without]
    units = [("ceilings", limits), *cases[:FIRST], *runs, *cases[FIRST:]]
    return [unit for unit in units if arguments.only in unit[0] or unit[0] == "ceilings"]


def write(result: Result, path: Path, seconds: float) -> None:
    """What there is so far: a run that is cut off leaves what it had."""
    result["seconds"] = round(seconds, 1)
    result["end_to_end_ratios"] = report.step_ratios(result["end_to_end"])
    result["targets"] = report.targets(result["layers"], result["device"])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def with_tables(text: str) -> str:
    """NOTES.md with its arithmetic as the formulas have it."""
    before, _, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise ValueError(f"{NOTES.name} has no '{BEGIN.strip()}' with '{END}' after it")
    return f"{before}{BEGIN}\n{arithmetic()}\n\n{end}{after}"


if __name__ == "__main__":
    main()
