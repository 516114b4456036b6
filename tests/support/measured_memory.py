"""The memory of a real training step, measured: a job in a fresh process, its third step under torch's profiler.

At the step's start the bytes of all storages of model, codes and optimiser are summed. From then on the
profiler reports every allocation and release of torch's CPU allocator, also inside kernels; the largest running
sum of them is what the step needs in addition. Nothing is sampled, and the same job gives the same bytes.

In a job of two processes (gloo) everything allocated from the wrapping of the model to the end of the third step
counts, in both: the buffers that average gradients are made before the first step. The larger one counts. The pixels of
a batch are made before the step, so they are in neither figure. Run

    python -m tests.support.measured_memory '{"recipe": "sft", "family": "llama", ...}'

prints one JSON object; `measure` does that in a separate process.
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

from llama_stack_provider_moe.compute.runtime.threads import forbid_threads
from llama_stack_provider_moe.jobdir.folder import JobFolder

_MARKS = 40  # tokens of the template, of the question and around an image


@dataclass(frozen=True)
class Case:
    """The job to measure: `changes` to the tiny config of `family`, and the job's `adapter` block."""

    recipe: str
    family: str
    changes: dict[str, Any] = field(default_factory=dict)
    adapter: dict[str, Any] | None = field(default_factory=dict)
    batch: int = 4
    length: int = 128
    bits: Literal[16, 4] = 16
    nested: bool = False  # the scales of 4 bits are quantised too
    checkpointing: bool = False
    strategy: Literal["ddp", "fsdp"] | None = None  # of two processes; None: one
    accumulation: int = 1
    optimizer: dict[str, Any] = field(default_factory=dict)
    offload: bool = False  # experts in main memory
    images: int = 0  # in each row; `family` is one of `tiny_vlms` then, and `changes` is empty
    side: int = 64  # of each, in pixels


@dataclass(frozen=True)
class Measured:
    """Bytes: `static` at the step's start, and the maximum in addition."""

    static: int
    dynamic: int

    @property
    def peak(self) -> int:
        """The sum of both."""
        return self.static + self.dynamic


def measure(case: Case) -> Measured:
    """Run a case in a separate process, which may fork."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    forbid_threads(environment)
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.measured_memory", json.dumps(asdict(case))],
        capture_output=True, text=True, timeout=800, check=False,
        cwd=Path(__file__).parents[2], env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:] + done.stdout[-2000:]
    return Measured(**json.loads(done.stdout.splitlines()[-1]))


def estimated(case: Case) -> Any:
    """The planner's estimate (`compute.planning.memory.MemoryEstimate`) for one process, as in the report."""
    from llama_stack_provider_moe.compute.planning.planner import Machine, Planner
    from llama_stack_provider_moe.compute.planning.tower_inputs import ImageSize, assumed, processor_limits
    from llama_stack_provider_moe.spec import JOB_SPEC
    from tests.support import tiny_models, tiny_vlms

    body = {"model": "tiny", "data": {"dataset_id": "rows"}, **_blocks(case), "recipe": case.recipe}
    if not case.images:
        planner = Planner(tiny_models.config(case.family, **case.changes), Machine("cpu", 1 << 40))
    else:
        with tempfile.TemporaryDirectory() as folder:
            tiny_vlms.processor(case.family).save_pretrained(folder)
            limits = processor_limits(Path(folder))
        images = assumed(case.images, ImageSize(case.side, case.side), limits)
        planner = Planner(tiny_vlms.config(case.family), Machine("cpu", 1 << 40), images)
    return planner.estimate(JOB_SPEC.validate_python(body), case.strategy or "ddp")[0]  # type: ignore[arg-type]


def _blocks(case: Case) -> dict[str, Any]:
    return {
        "training": {"batch_size": case.batch, "dtype": "bf16", "gradient_accumulation_steps": case.accumulation},
        "efficiency": {"enable_activation_checkpointing": case.checkpointing, "offload_experts": case.offload},
        "optimizer": case.optimizer,
        "adapter": None
        if case.adapter is None
        else {**case.adapter, "quantize_base": case.bits == 4, "quantize_scales": case.nested},
        "options": {"max_length": case.length, "validation_split": 0.0},
        "resources": {} if case.strategy is None else {"gpus": 0, "processes": 2, "strategy": case.strategy},
    }


def run(case: Case) -> Measured:
    """Run a case in this process."""
    from tqdm import tqdm

    from llama_stack_provider_moe.compute.train import fit
    from llama_stack_provider_moe.compute.worker.main import train, train_together
    from tests.support import tiny_models, tiny_vlms
    from tests.support.training_support import Run, Workshop, signals_put_back

    own = fit.train_and_save
    tqdm.monitor_interval = 0  # it would start a thread, which no fork would have

    with tempfile.TemporaryDirectory() as folder:

        def watched(session: Any, base: Any, trainer: Any, foreseen_steps: int) -> Any:
            watch = _Watch(trainer, Path(folder) / f"measured-{session.peers.rank}")
            trainer.add_callback(watch.callback())
            if session.peers.size > 1:
                watch.begin()
            return own(session, base, trainer, foreseen_steps)

        fit.train_and_save = watched
        workshop = Workshop(Path(folder))
        rows = _rows(case, 3 * case.batch * case.accumulation * (1 if case.strategy is None else 2))
        if case.images:
            _put_images(rows, case, JobFolder(workshop.next_folder(case.recipe)))
        build = tiny_vlms.build if case.images else tiny_models.build
        made = workshop.job(
            case.recipe,
            build(case.family, Path(folder) / "model", **case.changes),
            rows=rows,
            data={"validation_dataset_id": None, "shuffle": False},
            **_blocks(case),
        )
        try:
            with signals_put_back():
                code = train(made) if case.strategy is None else train_together(made, 2)
        finally:
            fit.train_and_save = own
        assert code == 0, Run(made, code).reason
        found = [json.loads(path.read_text()) for path in Path(folder).glob("measured-*")]
    assert len(found) == (1 if case.strategy is None else 2)
    return max((Measured(**each) for each in found), key=lambda each: each.peak)


def _rows(case: Case, count: int) -> list[Any]:
    """Rows of full length, except the last of each batch, so that there is padding and a mask.

    Rows with images are never cut: theirs have about that length.
    """
    rows: list[Any] = []
    for number in range(count):
        words = case.length // 4 if number % case.batch == case.batch - 1 else 2 * case.length
        prompt, answer = f"Of {number}?", " ".join(["Write a letter to a friend."] * words)
        if case.images:
            answer = "x" * (case.length - _image_tokens(case) - _MARKS - 4 * (number % 2))
        said = [{"role": "user", "content": prompt}]
        last = [{"role": "assistant", "content": answer}]
        if case.recipe == "sft":
            rows.append({"messages": said + last})
        else:
            rows.append({"prompt": said, "chosen": last, "rejected": [{**last[0], "content": "No. " + answer}]})
    return rows


def _image_tokens(case: Case) -> int:
    """Tokens of the images in a row."""
    import torch

    from llama_stack_provider_moe.compute.models.images import Images
    from llama_stack_provider_moe.compute.models.row_images import Image
    from tests.support import tiny_vlms

    processor: Any = tiny_vlms.processor(case.family)
    images = Images(processor, JobFolder(Path()), processor.image_token, torch.float32)
    text = images.tokens(Image("", "png", case.side, case.side))
    return case.images * len(processor.tokenizer(text)["input_ids"])


def _put_images(rows: list[Any], case: Case, folder: JobFolder) -> None:
    """Put images before the text of each row's question."""
    from tests.support import tiny_vlms

    for number, row in enumerate(rows):
        files = [tiny_vlms.drawn("red", case.side, case.side, place=number + place) for place in range(case.images)]
        [asked, *_] = row["messages" if case.recipe == "sft" else "prompt"]
        asked["content"] = [*(tiny_vlms.put(folder, file) for file in files),
                            {"type": "text", "text": asked["content"]}]  # fmt: skip


class _Watch:
    """Measures a trainer's third step, or everything from a given start to that step's end."""

    def __init__(self, trainer: Any, told: Path) -> None:
        self._trainer = trainer
        self._told = told
        self._static = 0
        self._profiler: Any = None

    def callback(self) -> Any:
        from transformers import TrainerCallback

        watch = self

        class Steps(TrainerCallback):
            def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                if state.global_step == 2 and watch._profiler is None:
                    watch.begin()

            def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                if state.global_step == 3:
                    watch.end()

        return Steps()

    def begin(self) -> None:
        import torch

        gc.collect()
        model, optimizer = self._trainer.model, self._trainer.optimizer
        states = [] if optimizer is None else [value for state in optimizer.state.values() for value in state.values()]
        # By storage: the codes of bitsandbytes are one tensor in all weights' states.
        kept = {value.data_ptr(): value.nbytes for value in states if isinstance(value, torch.Tensor)}
        self._static = _resident(model) + sum(kept.values())
        self._profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
        self._profiler.__enter__()

    def end(self) -> None:
        self._profiler.__exit__(None, None, None)
        self._told.write_text(json.dumps(asdict(self._measured())))

    def _measured(self) -> Measured:
        events = self._profiler.profiler.kineto_results.events()
        changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
        now = most = 0
        for _, change in changes:
            now += change
            most = max(most, now)
        return Measured(self._static, most)


def _resident(model: Any) -> int:
    """The bytes of a model in this process, which may have only a part of its weights."""
    from torch.distributed.tensor import DTensor

    from llama_stack_provider_moe.compute.moe.quantize import resident_bytes

    parts = [weight.to_local() for weight in model.parameters() if isinstance(weight, DTensor)]
    if not parts:
        return resident_bytes(model)
    whole = [weight for weight in [*model.parameters(), *model.buffers()] if not isinstance(weight, DTensor)]
    return sum(tensor.nbytes for tensor in [*parts, *whole])


if __name__ == "__main__":
    measured = run(Case(**json.loads(sys.argv[1])))
    print(json.dumps(asdict(measured)))
