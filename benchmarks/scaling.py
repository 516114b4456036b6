"""The cost of a second process: the same job in one process and in two, by DDP and by FSDP2 (gloo, one machine's CPU).

Two processes take half of a step's rows each, with one thread each, as the single process has: on as many free cores,
twice the steps a second would be perfect. Each run is a job in its own processes (`compute.worker.main`). Runs of the
variants alternate, in turns that begin with a different variant each time, and ratios are of medians, so that other
work on the machine disturbs all alike; the result has the load average at each run. The steps after the first `WARM`
of a run count:

    steps_per_s    by the times of the job's own step events
    written        bytes that rank 0 wrote in a step (`wchar` of /proc/self/io: sockets, and a job's few files)
    rss            the largest memory of a process, and the sum over processes

    python -m benchmarks.scaling [--turns N] [--out FILE]
"""

import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.machine import RESULTS, machine, versions

WARM, COUNTED = 2, 6  # steps
ROWS = 8  # of a step
SHAPE = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4,
         "num_key_value_heads": 2}  # fmt: skip
LENGTH = 128
PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate")


@dataclass(frozen=True)
class Variant:
    """A job; `strategy` None: one process."""

    name: str
    strategy: str | None
    whole: bool = False


VARIANTS = (
    Variant("lora, one process", None),
    Variant("lora, two by ddp", "ddp"),
    Variant("lora, two by fsdp", "fsdp"),
    Variant("all weights, one process", None, whole=True),
    Variant("all weights, two by ddp", "ddp", whole=True),
)


def measure(variant: Variant) -> dict[str, float]:
    """One run, in processes of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.scaling", "--run", json.dumps(asdict(variant))],
        capture_output=True, text=True, timeout=900, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:] + done.stdout[-2000:]
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def run(variant: Variant) -> dict[str, float]:
    """One run, led by this process."""
    from tqdm import tqdm

    from llama_stack_provider_moe.compute.train import fit
    from llama_stack_provider_moe.compute.worker.main import train, train_together
    from tests.support import tiny_models
    from tests.support.training_support import Run, Workshop, said

    tqdm.monitor_interval = 0  # it would start a thread, which no fork would have
    own, size = fit.train_and_save, 1 if variant.strategy is None else 2
    with tempfile.TemporaryDirectory() as folder:

        def watched(session: Any, base: Any, trainer: Any, foreseen_steps: int) -> Any:
            trainer.add_callback(_watch(Path(folder) / f"rank-{session.peers.rank}"))
            return own(session, base, trainer, foreseen_steps)

        fit.train_and_save = watched
        workshop = Workshop(Path(folder))
        rows = [
            {"messages": [said("user", f"Of {i}?"), said("assistant", "Write a letter to a friend. " * LENGTH)]}
            for i in range((WARM + COUNTED) * ROWS)
        ]
        job = workshop.job(
            "sft", tiny_models.build("mixtral", Path(folder) / "model", **SHAPE),
            rows=rows,
            data={"validation_dataset_id": None, "shuffle": False},
            training={"batch_size": ROWS // size, "dtype": "fp32"},
            adapter=None if variant.whole else {"plan": "all_experts", "rank": 8},
            options={"max_length": LENGTH, "validation_split": 0.0},
            resources={} if size == 1 else {"gpus": 0, "processes": size, "strategy": variant.strategy},
        )  # fmt: skip
        code = train(job) if size == 1 else train_together(job, size)
        assert code == 0, Run(job, code).reason
        ranks = [json.loads((Path(folder) / f"rank-{rank}").read_text()) for rank in range(size)]
    return {
        "steps_per_s": ranks[0]["steps_per_s"],
        "written_mb": ranks[0]["written"] / 1e6,
        "rss_mb": max(rank["rss"] for rank in ranks) / 1e6,
        "rss_of_all_mb": sum(rank["rss"] for rank in ranks) / 1e6,
        "load": os.getloadavg()[0],
    }


def _watch(told: Path) -> Any:
    from transformers import TrainerCallback

    class Steps(TrainerCallback):
        began: tuple[float, int] = (0.0, 0)

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == WARM:
                self.began = time.monotonic(), _written()
            if state.global_step == WARM + COUNTED:
                took, written = time.monotonic() - self.began[0], _written() - self.began[1]
                rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
                told.write_text(json.dumps({"steps_per_s": COUNTED / took, "written": written / COUNTED, "rss": rss}))

    return Steps()


def _written() -> int:
    lines = Path("/proc/self/io").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("wchar"))


def trained_bytes() -> dict[str, int]:
    """Gradients of the two kinds of job, and of what FSDP2 gathers: from the config."""
    import torch

    from llama_stack_provider_moe.compute.planning.meta_model import blank
    from llama_stack_provider_moe.compute.planning.per_process import process_memory, weights_of
    from llama_stack_provider_moe.spec import Adapter, Moe, Optimizer
    from tests.support import tiny_models

    config = tiny_models.config("mixtral", **SHAPE)
    lora = process_memory(
        weights_of(blank(config, Adapter(plan="all_experts", rank=8), Moe(), dtype=torch.float32)),
        "ddp",
        2,
        Optimizer(),
    )
    whole = process_memory(weights_of(blank(config, None, Moe(), dtype=torch.float32)), "ddp", 2, Optimizer())
    return {"lora_gradients": lora.gradients, "all_gradients": whole.gradients, "base": lora.weights}


def result(found: dict[str, list[dict[str, float]]], sizes: dict[str, int]) -> dict[str, Any]:
    """The contents of the result file."""
    median = {
        name: {key: statistics.median(each[key] for each in runs) for key in runs[0]} for name, runs in found.items()
    }
    alone = {variant.whole: median.get(variant.name) for variant in VARIANTS if variant.strategy is None}
    ratios = {}
    for variant in VARIANTS:
        one, two = alone[variant.whole], median.get(variant.name)
        if variant.strategy is not None and one and two:
            ratios[variant.name] = {
                "steps_per_s": round(two["steps_per_s"] / one["steps_per_s"], 3),
                "of_perfect": round(two["steps_per_s"] / one["steps_per_s"] / 2, 3),
                "rss": round(two["rss_mb"] / one["rss_mb"], 3),
            }
    # With two processes a ring sends each byte of a reduction once from each; a gather sends a process's half.
    sizes = {
        **sizes,
        "calculated_written_ddp_lora": sizes["lora_gradients"],
        "calculated_written_ddp_all": sizes["all_gradients"],
        "calculated_written_fsdp_lora": sizes["lora_gradients"] + sizes["base"],
    }
    return {
        "what": "steps a second of the same job in two processes, to one; bytes that rank 0 writes a step",
        "command": "python -m benchmarks.scaling",
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "turns": min(map(len, found.values())),
        "ratios_of_medians": ratios,
        "medians": median,
        "bytes": sizes,
        "runs": found,
        "shape": {**SHAPE, "rows": ROWS, "length": LENGTH, "steps": COUNTED},
        "packages": versions(*PACKAGES),
        "machine": machine(),
    }


def main() -> None:
    """Measure and print; the result file is written again after each turn."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=5, help="runs of each variant (default: 5)")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    parser.add_argument(
        "--out", type=Path, default=RESULTS / f"scaling_{datetime.now(UTC):%Y-%m-%d}.json", help="result file"
    )
    options = parser.parse_args()
    if options.run is not None:
        print(json.dumps(run(Variant(**json.loads(options.run)))))
        return
    sizes, found = trained_bytes(), {variant.name: [] for variant in VARIANTS}  # type: ignore[var-annotated]
    order = list(VARIANTS)
    for _ in range(options.turns):
        random.shuffle(order)
        for variant in order:
            found[variant.name].append(measure(variant))
            print(variant.name, json.dumps(found[variant.name][-1]), flush=True)
        options.out.write_text(json.dumps(result(found, sizes), indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
