"""The first contact of our Triton kernels with a GPU, in one command and at most seven minutes: `make gpu-first`.

1. Each kernel alone, with every candidate of its tiles, against double precision, in a child process: a candidate that
   takes the process down is named, and the next one runs in a new process.
2. The layer table (`benchmarks.experts_gpu`): ours against PEFT on grouped_mm, split torch, Liger, the eager loop and
   dense products, the case of the targets first.
3. LoRA SFT steps of a whole model, by each backend.

The result file is written after each finding, so a run that is cut off leaves what it had. It needs torch, triton,
transformers and peft alone. Without a GPU

    python -m benchmarks.gpu_first --interpret   the same on tiny shapes, Triton interpreted on the CPU
    python -m benchmarks.gpu_first --compile     every kernel and candidate, compiled for sm_80, sm_90 and sm_100
"""

import argparse
import json
import os
import selectors
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.gpu.kernels_alone import KERNELS
from benchmarks.machine import RESULTS, gpu, machine, versions

ROOT = Path(__file__).parents[1]
PACKAGES = ("torch", "triton", "transformers", "peft", "liger-kernel", "quack-kernels", "bitsandbytes")
ENDING_S = 10.0  # from a child's last line to its end
SILENT_S = 90.0  # a child that prints nothing for so long hangs
KERNELS_SHARE, LAYERS_SHARE = 0.4, 0.75  # of the minutes, at whose end the next part begins
TARGET_CASES = "LoRA r=16, 8192 tokens, balanced"
STEPS = "LoRA SFT"
Result = dict[str, Any]


def main() -> int:
    """Measure, print and write; 1 if a kernel gave wrong results or did not run."""
    arguments = parsed()
    began = time.monotonic()
    result = empty(arguments)
    write(result, arguments.out)
    if arguments.compile:
        compile_all(result, arguments)
    else:
        end = began + 60 * arguments.minutes
        kernels(result, arguments, began + KERNELS_SHARE * (end - began))
        table(result, arguments, "layers", began + LAYERS_SHARE * (end - began))
        table(result, arguments, "end_to_end", end)
    result["seconds"] = round(time.monotonic() - began, 1)
    write(result, arguments.out)
    print(f"written to {arguments.out}; {len(result['faults'])} fault(s)")
    for fault in result["faults"]:
        print(f"fault: {fault}")
    return 1 if result["faults"] else 0


def parsed() -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=6.5, help="minutes in which to start work (default: 6.5)")
    parser.add_argument("--interpret", action="store_true", help="run tiny shapes on the CPU, Triton interpreted")
    parser.add_argument("--compile", action="store_true", help="compile every candidate; needs no GPU")
    parser.add_argument("--arch", action="append", choices=["80", "90", "100"], help="architecture to compile for")
    parser.add_argument("--only", default="", metavar="TEXT", help="run only kernels whose name contains TEXT")
    parser.add_argument("--out", type=Path, help="result file")
    arguments = parser.parse_args()
    if arguments.minutes <= 0:
        parser.error("--minutes must be > 0")
    if arguments.interpret and arguments.compile:
        parser.error("--interpret and --compile are two runs")
    if arguments.out is None:
        if arguments.interpret or arguments.compile:
            parser.error("--interpret and --compile need --out: what they find is no measurement to keep")
        arguments.out = RESULTS / f"gpu_first_{datetime.now(UTC):%Y-%m-%d}.json"
    return arguments


def empty(arguments: argparse.Namespace) -> Result:
    """The result file before anything was run."""
    here = arguments.interpret or arguments.compile
    device = None if here else gpu()
    return {
        "what": "first contact of the Triton kernels" + (", interpreted" if arguments.interpret else ""),
        "command": f"python -m benchmarks.gpu_first {' '.join(sys.argv[1:])}".strip(),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": "CPU" if device is None else device["name"],
        "gpu": device,
        "machine": machine(),
        "versions": versions(*PACKAGES),
        "seconds": 0.0,
        "kernels": {},
        "compiled": [],
        "layers": None,
        "end_to_end": None,
        "faults": [],
        "left_out": [],
    }


def write(result: Result, path: Path) -> None:
    """What there is so far."""
    path.parent.mkdir(parents=True, exist_ok=True)
    written = path.with_suffix(".tmp")
    written.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    written.replace(path)


def kernels(result: Result, arguments: argparse.Namespace, end: float) -> None:
    """Part 1."""
    for kernel in [each for each in KERNELS if arguments.only in each]:
        found: list[dict[str, Any]] = []
        result["kernels"][kernel] = found
        first = 0
        while first is not None:
            if time.monotonic() > end:
                result["left_out"].append(f"{kernel} from candidate {first} on")
                break
            first = alone(result, arguments, kernel, first, found)
            write(result, arguments.out)
        best = min((each["ms"] for each in found if each.get("right")), default=None)
        right = sum(bool(each.get("right")) for each in found)
        print(f"{kernel}: {right} of {len(found)} candidates are right; fastest {best} ms", flush=True)


def alone(
    result: Result, arguments: argparse.Namespace, kernel: str, first: int, found: list[dict[str, Any]]
) -> int | None:
    """Candidates of a kernel from number `first` on, until the child ends; the number to go on with, if any."""
    command = [sys.executable, "-m", "benchmarks.gpu.kernels_alone", kernel, "--from", str(first)]
    command += ["--device", "cpu"] if arguments.interpret else []
    begun: dict[str, Any] | None = None
    with started(command, arguments) as child:
        for line in lines(child, SILENT_S):
            if "begins" in line:
                begun = line
            else:
                begun = None
                found.append(line)
                if not line["right"]:
                    result["faults"].append(f"{kernel}, {line['candidate']}: wrong by {max(line['worst_errors']):.2g}")
                write(result, arguments.out)
        hung = not ended(child, min(ENDING_S, SILENT_S))
    if begun is None and child.returncode == 0:
        return None
    how = f"silent for {SILENT_S:g} s" if hung else f"exit code {child.returncode}"
    said = child.last_line
    what = "before its first candidate" if begun is None else begun["candidate"]
    result["faults"].append(f"{kernel}, {what}: {how}; {said}")
    if begun is None:
        return None
    found.append({"ends": begun["begins"], "candidate": begun["candidate"], "right": False, "why": f"{how}; {said}"})
    return int(begun["begins"]) + 1


def table(result: Result, arguments: argparse.Namespace, part: str, end: float) -> None:
    """Parts 2 and 3: `experts_gpu` in a child, which writes its own file after every case."""
    minutes = (end - time.monotonic()) / 60
    if minutes <= 0:
        result["left_out"].append(part)
        return
    out = arguments.out.with_name(f"{arguments.out.stem}.{part}.json")
    only = TARGET_CASES if part == "layers" else STEPS
    command = [sys.executable, "-m", "benchmarks.experts_gpu", "--minutes", f"{minutes:.2f}", "--out", str(out)]
    command += ["--smoke", "--repetitions", "3"] if arguments.interpret else ["--repetitions", "20"]
    command += ["--only", "LoRA r=4" if arguments.interpret and part == "layers" else only]
    with started(command, arguments) as child:
        in_time = ended(child, 60 * minutes + SILENT_S)
    fault = "" if child.returncode == 0 else f"exit code {child.returncode}; {child.last_line}"
    fault = fault if in_time else "it did not end in time"
    if fault:
        result["faults"].append(f"{part}: {fault}")
    if out.is_file():
        found = json.loads(out.read_text(encoding="utf-8"))
        result[part] = {name: found[name] for name in (part, "ceilings", "targets", "end_to_end_ratios", "skipped")}
        result["left_out"] += [f"{part}: {name}" for name in found["left_out"]]
        out.unlink()
    write(result, arguments.out)
    print(f"{part}: {fault or 'done'}", flush=True)


def compile_all(result: Result, arguments: argparse.Namespace) -> None:
    """Every kernel and candidate; a spill or an error of the compiler is a fault."""
    command = [sys.executable, "-m", "benchmarks.gpu.compiled", *(arguments.arch or ["90", "100", "80"])]
    with started(command, arguments) as child:
        for line in lines(child, 10 * SILENT_S):
            result["compiled"].append(line)
            if line["stack_bytes"]:
                name = f"{line['candidate']}, {line['arch']}"
                result["faults"].append(f"{name}: {line['stack_bytes']} bytes of stack, so registers spill")
            write(result, arguments.out)
        ended(child)
    if child.returncode != 0:
        result["faults"].append(f"compiling: exit code {child.returncode}; {child.last_line}")
    print(f"{len(result['compiled'])} candidates compiled", flush=True)


class Child(NamedTuple):
    """A process, and the lines of its standard error once it has ended."""

    process: "subprocess.Popen[bytes]"
    said: list[str]

    @property
    def last_line(self) -> str:
        """What it said last."""
        return self.said[-1][:300] if self.said else ""

    @property
    def returncode(self) -> int | None:
        """Its exit code, once it has ended."""
        return self.process.returncode


@contextmanager
def started(command: list[str], arguments: argparse.Namespace) -> Iterator[Child]:
    """A child in the repository's root, which is killed at the end of the block at the latest."""
    own = {"TRITON_INTERPRET": "1"} if arguments.interpret else {}
    with tempfile.TemporaryFile() as stderr, tempfile.TemporaryFile() as table:
        tables = "benchmarks.experts_gpu" in command  # its result is a file, and nobody reads its output
        with subprocess.Popen(
            command, stdout=table if tables else subprocess.PIPE, stderr=stderr, cwd=ROOT,
            env=os.environ | {"TRITON_DEFAULT_FP_FUSION": "1"} | own,
        ) as process:  # fmt: skip
            child = Child(process, [])
            try:
                yield child
            finally:
                process.kill()
                process.wait()
                stderr.seek(0)
                child.said.extend(stderr.read().decode(errors="replace").strip().splitlines())


def lines(child: Child, silent_s: float) -> Iterator[dict[str, Any]]:
    """What a child prints as JSON, until it closes its output or is silent for too long."""
    assert child.process.stdout is not None
    rest = b""
    with selectors.DefaultSelector() as selector:
        selector.register(child.process.stdout, selectors.EVENT_READ)
        while selector.select(silent_s):
            read = os.read(child.process.stdout.fileno(), 1 << 16)
            if not read:
                return
            *whole, rest = (rest + read).split(b"\n")
            yield from (json.loads(line) for line in whole if line.startswith(b"{"))


def ended(child: Child, within_s: float = ENDING_S) -> bool:
    """Whether a child ends in this time."""
    try:
        child.process.wait(within_s)
    except subprocess.TimeoutExpired:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
