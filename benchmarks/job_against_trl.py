"""A whole SFT job on a CPU, by our training process and by a plain script with TRL's SFTTrainer and PEFT.

Both train the same model (fp32) on the same rows in the same order, with LoRA on the same projections (experts by
`target_parameters` in PEFT), and both leave a checkpoint with the optimiser's state and the adapter. Each run is a new
process, measured from its start to its end by another one: before the first step's figures, between those and the last
step's, and after. Processor time counts, because other programs may use the cores; the runs of the two alternate. Run

    python -m benchmarks.job_against_trl [--runs N] [--only NAME] [--out FILE]
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.machine import RESULTS, machine, versions
from llama_stack_provider_moe.jobdir.folder import JobFolder, write_atomic
from llama_stack_provider_moe.spec import JOB_SPEC
from tests.support import tiny_models

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from smollm2 import smollm2

PACKAGES = ("llama-stack-provider-moe", "torch", "transformers", "trl", "peft", "datasets")
MARK = b'"type":"step"'
POLL_S = 0.005
PARTS = ("before", "steps", "after", "whole")
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
WORDS = ("garden", "letter", "friend", "spring", "answer", "token", "capital", "France", "words", "and", "the", "of")


@dataclass(frozen=True)
class Case:
    """A model and its job.

    Attributes:
        family: of a model made for this case; None: SmolLM2-135M-Instruct.
        steps: optimiser steps, of `batch_size` rows.
        words: of each row's answer.
        modules: linear layers with LoRA, by PEFT's names.
        experts: parameters of experts with LoRA.
        changes: the made model's config.
    """

    family: str | None
    steps: int
    batch_size: int
    words: int
    modules: list[str]
    experts: list[str] = field(default_factory=list)
    changes: dict[str, Any] = field(default_factory=dict)

    def model(self, folder: Path) -> Path:
        """Its folder."""
        if self.family is None:
            return smollm2()
        return tiny_models.build(self.family, folder, **self.changes)


MLP = ["gate_proj", "up_proj", "down_proj"]
_EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
CASES = {
    "tiny dense": Case("llama", 12, 4, 40, ATTENTION + MLP),
    # Per token, experts take 70% of the operations, about as in Granite-3.0-1b-a400m.
    "small MoE": Case(
        "qwen3_moe", 24, 4, 40, ATTENTION, _EXPERTS,
        {"hidden_size": 512, "moe_intermediate_size": 256, "num_experts": 32, "num_experts_per_tok": 8, "head_dim": 64,
         "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4, "initializer_range": 0.02},
    ),
    "SmolLM2-135M": Case(None, 5, 2, 60, ATTENTION + MLP),
}  # fmt: skip


def rows(case: Case) -> list[tuple[str, str]]:
    """Prompts and answers, all of about the same length."""
    return [
        (
            f"Write {number} words about {WORDS[number % 8]}.",
            " ".join(WORDS[(number + place) % 12] for place in range(case.words)),
        )
        for number in range(case.steps * case.batch_size)
    ]


def ours(case: Case, model: Path, folder: Path) -> tuple[list[str], Path]:
    """Write the job's folder as the server would: the command of its process, and the file with its steps."""
    job = JobFolder(folder / "jobs" / "ours")
    job.data.mkdir(parents=True)
    body = {
        "recipe": "sft", "job_uuid": "ours", "model": str(model), "data": {"dataset_id": "rows", "shuffle": False},
        "training": {"batch_size": case.batch_size, "dtype": "fp32"}, "optimizer": {"lr": LR},
        "adapter": {"rank": RANK, "alpha": 2 * RANK},
        "options": {"max_length": MAX_LENGTH, "validation_split": 0, "lr_scheduler": "linear"},
    }  # fmt: skip
    write_atomic(job.spec, JOB_SPEC.validate_python(body))
    lines = [
        {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]}
        for asked, answer in rows(case)
    ]
    job.train_rows.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return [sys.executable, "-m", "llama_stack_provider_moe.compute.worker.main", str(job.root)], job.events


def theirs(case: Case, model: Path, folder: Path) -> tuple[list[str], Path]:
    """The same of the plain script."""
    data, marks = folder / "rows.jsonl", folder / "marks"
    lines = [
        {
            "prompt": [{"role": "user", "content": asked}],
            "completion": [{"role": "assistant", "content": answer}],
        }
        for asked, answer in rows(case)
    ]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    job = {
        "model": str(model), "rows": str(data), "out": str(folder / "out"), "marks": str(marks),
        "batch_size": case.batch_size, "lr": LR, "max_length": MAX_LENGTH, "rank": RANK, "modules": case.modules,
        "experts": case.experts or None,
    }  # fmt: skip
    path = folder / "job.json"
    path.write_text(json.dumps(job), encoding="utf-8")
    return [sys.executable, "-m", "benchmarks.plain_trl", str(path)], marks


RANK, LR, MAX_LENGTH = 16, 1e-4, 512
SIDES = {"ours": ours, "plain TRL": theirs}


def watched(command: list[str], marks: Path, steps: int, output: Path) -> dict[str, dict[str, float]]:
    """Run a command: part -> seconds of the clock and of the processor."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    began = time.monotonic()
    with output.open("wb") as file:
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT)
    seen: dict[int, tuple[float, float]] = {}  # steps done -> when, and the processor time by then
    content = b""
    while True:
        ended, status, usage = os.wait4(process.pid, os.WNOHANG)
        if ended:
            break
        if marks.exists() and len(fresh := marks.read_bytes()) > len(content):
            content = fresh
            seen.setdefault(content.count(MARK), (time.monotonic() - began, processor_s(process.pid)))
        time.sleep(POLL_S)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, output.read_text(encoding="utf-8")[-4000:]
    end = (time.monotonic() - began, usage.ru_utime + usage.ru_stime)
    assert max(seen) == steps, f"{max(seen)} steps, expected {steps}"
    first, last = seen[min(each for each in seen if each)], seen[steps]
    spans = {"before": ((0.0, 0.0), first), "steps": (first, last), "after": (last, end), "whole": ((0.0, 0.0), end)}
    return {
        part: {"wall_s": until[0] - since[0], "cpu_s": until[1] - since[1]} for part, (since, until) in spans.items()
    }


def processor_s(pid: int) -> float:
    """Processor seconds of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measure(name: str, case: Case, runs: int) -> dict[str, Any]:
    """Medians of a case, and TRL's share of the processor time as a ratio to ours."""
    found: dict[str, list[dict[str, dict[str, float]]]] = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory() as temporary:
        model = case.model(Path(temporary) / "model")
        for run in range(runs):
            for side in list(SIDES)[:: 1 if run % 2 else -1]:
                folder = Path(temporary) / f"{side}-{run}".replace(" ", "-")
                folder.mkdir()
                command, marks = SIDES[side](case, model, folder)
                taken = watched(command, marks, case.steps, folder / "output")
                shown = {part: round(each["cpu_s"], 2) for part, each in taken.items()}
                print(name, side, shown, flush=True)
                found[side].append(taken)
    medians = {
        side: {
            part: {
                clock: round(statistics.median(run[part][clock] for run in each), 3) for clock in ("wall_s", "cpu_s")
            }
            for part in PARTS
        }
        for side, each in found.items()
    }
    mine, other = medians["ours"], medians["plain TRL"]
    return {
        "times_as_fast": {part: round(other[part]["cpu_s"] / mine[part]["cpu_s"], 2) for part in ("whole", "steps")},
        "times_the_time": {part: round(mine[part]["cpu_s"] / other[part]["cpu_s"], 2) for part in ("before", "after")},
        "medians": medians,
        "runs": found,
    }


def main() -> None:
    """Measure, print, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3, help="runs of each (default: 3)")
    parser.add_argument("--only", choices=list(CASES), help="only this case")
    parser.add_argument(
        "--out", type=Path, default=RESULTS / f"job_against_trl_{datetime.now(UTC):%Y-%m-%d}.json", help="result file"
    )
    arguments = parser.parse_args()
    before = os.getloadavg()
    cases = {name: case for name, case in CASES.items() if arguments.only in (None, name)}
    found: dict[str, Any] = {}
    result: dict[str, Any] = {
        "what": "an SFT job with LoRA on a CPU in fp32, one thread, whole processes; ours and a plain script with TRL",
        "command": f"python -m benchmarks.job_against_trl --runs {arguments.runs}",
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "cases": found,
        "machine": machine(),
        "load_average": {"before": before},
        "versions": versions(*PACKAGES),
    }
    for name, case in cases.items():
        found[name] = measure(name, case, arguments.runs)
        result["load_average"]["after"] = os.getloadavg()
        arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")  # a run may be cut off
        print(name, found[name]["times_as_fast"], found[name]["times_the_time"], flush=True)


if __name__ == "__main__":
    main()
