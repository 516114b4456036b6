"""The memory of a real training step, measured: a job in a fresh process, its third step under torch's profiler.

At the step's beginning the bytes of all storages of model, codes and optimiser are added up. From there on the
profiler reports every allocation and release of torch's CPU allocator, those inside of kernels too; the largest running
sum of them is what the step took on top. Nothing is sampled, and the same job gives the same bytes. Run

    python -m tests.measured_memory '{"recipe": "sft", "family": "llama", ...}'

prints one JSON object; `measure` does that in a process of its own.
"""

import gc
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal


@dataclass(frozen=True)
class Case:
    """What is measured: `changes` go on top of the tiny config of `family`, `adapter` is the job's block."""

    recipe: str
    family: str
    changes: dict[str, Any] = field(default_factory=dict)
    adapter: dict[str, Any] = field(default_factory=dict)
    batch: int = 4
    length: int = 128
    bits: Literal[16, 4] = 16
    checkpointing: bool = False


@dataclass(frozen=True)
class Measured:
    """Bytes: `static` at the step's beginning, and the most on top of them."""

    static: int
    dynamic: int

    @property
    def peak(self) -> int:
        """Both."""
        return self.static + self.dynamic


def measure(case: Case) -> Measured:
    """Run a case in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.measured_memory", json.dumps(asdict(case))],
        capture_output=True, text=True, timeout=900, check=False,
        cwd=Path(__file__).parent.parent, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:] + done.stdout[-2000:]
    return Measured(**json.loads(done.stdout.splitlines()[-1]))


def estimated(case: Case) -> Any:
    """What the report says of it (`analysis.memory.Estimate`)."""
    from llama_stack_provider_moe.analysis.blank import blank
    from llama_stack_provider_moe.analysis.memory import Batch, estimate
    from llama_stack_provider_moe.spec import Adapter, Moe
    from tests import tiny_models

    adapted = blank(
        tiny_models.config(case.family, **case.changes), Adapter.model_validate(case.adapter), Moe(), case.bits
    )
    found = estimate(adapted, case.bits, Batch(case.batch, case.length), (0,), "cpu")
    return next(each for each in found if (each.recipe, each.checkpointing) == (case.recipe, case.checkpointing))


def run(case: Case) -> Measured:
    """Run a case in this process."""
    from llama_stack_provider_moe.training.recipes import dpo, sft
    from tests import tiny_models
    from tests.training_support import Workshop

    recipe: Any = {"sft": sft, "dpo": dpo}[case.recipe]
    own, watches = recipe.fit, []

    def watched(session: Any, base: Any, trainer: Any, foreseen_steps: int) -> Any:
        watches.append(_Watch(trainer))
        trainer.add_callback(watches[0].callback())
        return own(session, base, trainer, foreseen_steps)

    recipe.fit = watched
    with tempfile.TemporaryDirectory() as folder:
        workshop = Workshop(Path(folder))
        made = workshop.run(
            case.recipe,
            tiny_models.build(case.family, Path(folder) / "model", **case.changes),
            rows=_rows(case, 3 * case.batch),
            data={"validation_dataset_id": None, "shuffle": False},
            training={"batch_size": case.batch, "dtype": "bf16"},
            efficiency={"enable_activation_checkpointing": case.checkpointing},
            adapter={**case.adapter, "quantize_base": case.bits == 4},
            options={"max_length": case.length, "validation_split": 0.0},
        )
        assert made.exit_code == 0, made.reason
    return watches[0].measured()


def _rows(case: Case, count: int) -> list[Any]:
    """Rows that fill the length, but for the last of each batch, so that there is padding and a mask."""
    rows: list[Any] = []
    for number in range(count):
        words = case.length // 4 if number % case.batch == case.batch - 1 else 2 * case.length
        prompt, answer = f"Of {number}?", " ".join(["Write a letter to a friend."] * words)
        said = [{"role": "user", "content": prompt}]
        last = [{"role": "assistant", "content": answer}]
        if case.recipe == "sft":
            rows.append({"messages": said + last})
        else:
            rows.append({"prompt": said, "chosen": last, "rejected": [{**last[0], "content": "No. " + answer}]})
    return rows


class _Watch:
    """Measures a trainer's third step."""

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._static = 0
        self._profiler: Any = None

    def callback(self) -> Any:
        from transformers import TrainerCallback

        watch = self

        class Steps(TrainerCallback):
            def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                if state.global_step == 2:
                    watch.begin()

            def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                if state.global_step == 3:
                    watch.end()

        return Steps()

    def begin(self) -> None:
        import torch

        from llama_stack_provider_moe.experts.quantize import resident_bytes

        gc.collect()
        model, optimizer = self._trainer.model, self._trainer.optimizer
        states = [value for state in optimizer.state.values() for value in state.values()]
        self._static = resident_bytes(model) + sum(value.nbytes for value in states if isinstance(value, torch.Tensor))
        self._profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
        self._profiler.__enter__()

    def end(self) -> None:
        self._profiler.__exit__(None, None, None)

    def measured(self) -> Measured:
        events = self._profiler.profiler.kineto_results.events()
        changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
        now = most = 0
        for _, change in changes:
            now += change
            most = max(most, now)
        return Measured(self._static, most)


if __name__ == "__main__":
    measured = run(Case(**json.loads(sys.argv[1])))
    print(json.dumps(asdict(measured)))
