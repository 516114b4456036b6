"""The first contact of our Triton kernels with a GPU, in one command and at most seven minutes: `make gpu-first`.

0. All candidates are compiled, by as many processes as there are cores: one after the other that would take longer than
   everything else.
1. Each kernel alone, with every candidate of its tiles, against double precision, in a child process: a candidate that
   takes the process down is named, and the next one runs in a new process.
2. The layer table (`benchmarks.experts_gpu`): ours against PEFT on grouped_mm, split torch, quack-kernels, Liger, the
   eager loop and dense products, the case of the targets first. If a kernel loses the device there, or hangs, the table
   runs again without Triton.
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
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.gpu.kernels_alone import KERNELS
from benchmarks.machine import RESULTS, gpu, machine, versions

ROOT = Path(__file__).parents[1]
PACKAGES = ("torch", "triton", "transformers", "peft", "liger-kernel", "quack-kernels", "bitsandbytes")
ON_GPU, ON_CPU = 6.5, 60.0  # minutes; nobody waits for a lent GPU where the CPU interprets
ENDING_S = 10.0  # from a child's last line to its end
SILENT_S = 90.0  # a child that prints nothing for so long hangs
TABLE_SILENT_S = 150.0  # a table that finishes no case for so long hangs; in the first one kernels are tuned
AHEAD_S = 75.0  # compiling ahead ends then at the latest
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
        if not arguments.interpret:
            compile_ahead(result, arguments, min(end, began + AHEAD_S))
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
    parser.add_argument(
        "--minutes", type=float, help=f"minutes in which to start work (default: {ON_GPU}; with --interpret {ON_CPU})"
    )
    parser.add_argument("--interpret", action="store_true", help="run tiny shapes on the CPU, Triton interpreted")
    parser.add_argument("--compile", action="store_true", help="compile every candidate; needs no GPU")
    parser.add_argument("--arch", action="append", choices=["80", "90", "100"], help="architecture to compile for")
    parser.add_argument("--only", default="", metavar="TEXT", help="run only kernels whose name contains TEXT")
    parser.add_argument("--out", type=Path, help="result file")
    arguments = parser.parse_args()
    if arguments.minutes is None:
        arguments.minutes = ON_CPU if arguments.interpret else ON_GPU
    if arguments.minutes <= 0:
        parser.error("--minutes must be > 0")
    if not (arguments.interpret or arguments.compile) and not torch.cuda.is_available():
        parser.error("there is no CUDA device here; --interpret and --compile, with --out FILE, run without one")
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
        "ahead_s": 0.0,
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
        first: int | None = 0
        while first is not None:
            if time.monotonic() > end:
                result["left_out"].append(f"{kernel} from candidate {first} on")
                break
            first = alone(result, arguments, kernel, first, found, end)
            write(result, arguments.out)
        best = min((each["ms"] for each in found if each.get("right")), default=None)
        right = sum(bool(each.get("right")) for each in found)
        print(f"{kernel}: {right} of {len(found)} candidates are right; fastest {best} ms", flush=True)


def alone(
    result: Result, arguments: argparse.Namespace, kernel: str, first: int, found: list[dict[str, Any]], end: float
) -> int | None:
    """Candidates of a kernel from number `first` on, until the child or the time ends; the number to go on with."""
    command = [sys.executable, "-m", "benchmarks.gpu.kernels_alone", kernel, "--from", str(first)]
    command += ["--device", "cpu"] if arguments.interpret else []
    silent_s = (10 if arguments.interpret else 1) * SILENT_S  # a CPU may be busy with other work
    begun: dict[str, Any] | None = None
    with started(command, arguments) as child:
        for line in lines(child, silent_s):
            if "begins" in line:
                begun = line
            else:
                begun = None
                found.append(line)
                if not line["right"]:
                    why = line.get("why") or f"wrong by {max(line['worst_errors']):.2g}"
                    result["faults"].append(f"{kernel}, {line['candidate']}: {why}")
                write(result, arguments.out)
                if time.monotonic() > end:
                    return int(line["ends"]) + 1
        hung = not ended(child, min(ENDING_S, silent_s))
    if begun is None and child.returncode == 0:
        return None
    how = f"silent for {silent_s:g} s" if hung else f"exit code {child.returncode}"
    said = child.last_line
    what = "before its first candidate" if begun is None else begun["candidate"]
    result["faults"].append(f"{kernel}, {what}: {how}; {said}")
    if begun is None:
        return None
    found.append({"ends": begun["begins"], "candidate": begun["candidate"], "right": False, "why": f"{how}; {said}"})
    return int(begun["begins"]) + 1


def compile_ahead(result: Result, arguments: argparse.Namespace, end: float) -> None:
    """Part 0: compile what part 1 runs and part 2 tunes, into Triton's cache; what fails here fails there again."""
    began = time.monotonic()
    waiting = [each for each in KERNELS if arguments.only in each]
    with ExitStack() as stack:
        running: list[Child] = []
        while (waiting or running) and time.monotonic() < end:
            while waiting and len(running) < max(2, (os.cpu_count() or 2) - 1):
                command = [sys.executable, "-m", "benchmarks.gpu.kernels_alone", waiting.pop(0), "--ahead"]
                running.append(stack.enter_context(started(command, arguments, told=False)))
            time.sleep(0.2)
            running = [each for each in running if each.process.poll() is None]
    result["ahead_s"] = round(time.monotonic() - began, 1)
    write(result, arguments.out)
    print(f"compiled ahead in {result['ahead_s']} s", flush=True)


def table(result: Result, arguments: argparse.Namespace, part: str, end: float) -> None:
    """Parts 2 and 3: `experts_gpu` in a child, which writes its own file after every case."""
    fault = one_table(result, arguments, part, end, ())
    if fault is not None and end - time.monotonic() > 30:
        one_table(result, arguments, part, end, ("triton",))
    write(result, arguments.out)


def one_table(
    result: Result, arguments: argparse.Namespace, part: str, end: float, without: tuple[str, ...]
) -> str | None:
    """The table without some implementations; what ended it early, if anything."""
    minutes = (end - time.monotonic()) / 60
    if minutes <= 0:
        result["left_out"].append(part)
        return None
    out = arguments.out.with_name(f"{arguments.out.stem}.{part}.json")
    only = TARGET_CASES if part == "layers" else STEPS
    command = [sys.executable, "-m", "benchmarks.experts_gpu", "--minutes", f"{minutes:.2f}", "--out", str(out)]
    command += ["--smoke", "--repetitions", "3"] if arguments.interpret else ["--repetitions", "20"]
    command += ["--only", "LoRA r=4" if arguments.interpret and part == "layers" else only, "--loop"]
    for each in without:
        command += ["--without", each]
    with started(command, arguments, told=False) as child:
        how = watched(child, out, end + SILENT_S, (10 if arguments.interpret else 1) * TABLE_SILENT_S)
    fault = how or ("" if child.returncode == 0 else f"exit code {child.returncode}; {child.last_line}")
    if out.is_file():
        found = json.loads(out.read_text(encoding="utf-8"))
        fault = fault or found["skipped"].get("the rest", "")
        kept = {name: found[name] for name in (part, "ceilings", "targets", "end_to_end_ratios", "skipped")}
        result[part if not without else f"{part} without {', '.join(without)}"] = kept
        result["left_out"] += [f"{part}: {name}" for name in found["left_out"]]
        out.unlink()
    if fault:
        result["faults"].append(f"{part}{' without ' if without else ''}{', '.join(without)}: {fault}")
    write(result, arguments.out)
    print(f"{part}: {fault or 'done'}", flush=True)
    return fault or None


def watched(child: "Child", out: Path, end: float, silent_s: float) -> str:
    """Wait for a table; why it is not waited for any longer, or an empty text."""
    seen, changed = -1.0, time.monotonic()
    while child.process.poll() is None:
        with suppress(FileNotFoundError):
            if (written := out.stat().st_mtime) != seen:
                seen, changed = written, time.monotonic()
        if time.monotonic() > end:
            return "it did not end in time"
        if time.monotonic() - changed > silent_s:
            return f"no case in {silent_s:g} s"
        time.sleep(0.2)
    return ""


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
def started(command: list[str], arguments: argparse.Namespace, *, told: bool = True) -> Iterator[Child]:
    """A child in the repository's root, which is killed at the end of the block at the latest.

    `told`: somebody reads its output.
    """
    own = {"TRITON_INTERPRET": "1"} if arguments.interpret else {}
    with tempfile.TemporaryFile() as stderr, subprocess.Popen(
        command, stdout=subprocess.PIPE if told else subprocess.DEVNULL, stderr=stderr, cwd=ROOT,
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
