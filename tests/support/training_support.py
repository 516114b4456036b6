"""Run one job in this process: `Workshop` writes a folder as the service would, and trains it."""

import json
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import Tensor

from llama_stack_provider_moe.compute.worker.main import train
from llama_stack_provider_moe.jobdir import events
from llama_stack_provider_moe.jobdir.folder import JobFolder, Manifest, write_atomic
from llama_stack_provider_moe.spec import JOB_SPEC
from tests.support import tiny_models

Row = dict[str, list[dict[str, str]]]
DomainRows = list[tuple[dict[str, Any], list[Row], list[Row]]]  # a domain's block, its rows, its held-out rows

WORDS = ("garden", "letter", "friend", "spring", "answer", "token", "France", "Paris")
ANSWERS = ("The capital of France is Paris.", "A few experts of many.", "Five, in one word.", "With care.")


def said(role: str, text: str) -> dict[str, str]:
    """One message."""
    return {"role": role, "content": text}


def sft_rows(count: int, first: int = 0) -> list[Row]:
    """Canonical rows of several lengths; row numbers make each prompt different."""
    return [
        {
            "messages": [
                said("user", f"Write {i} words about {WORDS[i % 8]}{' and the letter' * (i % 3)}."),
                said("assistant", ANSWERS[i % 4]),
            ]
        }
        for i in range(first, first + count)
    ]


def dpo_rows(count: int, first: int = 0) -> list[Row]:
    """Canonical pairs; the chosen answer is always the same, so that the model can learn to prefer it."""
    return [
        {
            "prompt": [said("user", f"What of {i} and {WORDS[i % 8]}?")],
            "chosen": [said("assistant", "The answer is five.")],
            "rejected": [said("assistant", ANSWERS[i % 4])],
        }
        for i in range(first, first + count)
    ]


def kto_rows(count: int, first: int = 0) -> list[Any]:
    """Canonical answers of which every second one has a thumb up: always the same one, as in `dpo_rows`."""
    rows = dpo_rows(count, first)
    return [
        {"prompt": row["prompt"], "completion": row["rejected" if i % 2 else "chosen"], "label": i % 2 == 0}
        for i, row in enumerate(rows)
    ]


def kept_rows(count: int, first: int = 0) -> list[Row]:
    """Canonical rows about something else than `sft_rows`, for a circuit breaker to retain."""
    return [
        {"messages": [said("user", f"Add {i} and {i + 3}, please."), said("assistant", f"That makes {2 * i + 3}.")]}
        for i in range(first, first + count)
    ]


def prompt_rows(count: int, first: int = 0) -> list[Any]:
    """Canonical prompts, each with the columns that graders read."""
    rows = [[said("user", f"Write {i} words about {WORDS[i % 8]}.")] for i in range(first, first + count)]
    return [{"messages": messages, "item": {"messages": messages, "number": i}} for i, messages in enumerate(rows)]


def domains_of(recipe: str, **first: Any) -> DomainRows:
    """Two domains, `words` (24 rows, 3 of 4 rows of an epoch) and `sums` (5); `first` changes the first one's block."""
    words, sums = (dpo_rows, _other_pairs) if recipe == "dpo" else (sft_rows, kept_rows)
    held_out = {"validation_dataset_id": "held-out"}
    return [
        ({"name": "words", "ratio": 3, **held_out, **first}, words(24), words(5, 100)),
        ({"name": "sums", **held_out}, sums(5), sums(2, 100)),
    ]


def _other_pairs(count: int, first: int = 0) -> list[Row]:
    return dpo_rows(count, first + 50)


@dataclass(frozen=True)
class Run:
    """The results of a run."""

    folder: JobFolder
    exit_code: int

    def events(self, kind: str) -> list[Any]:
        """Its events of one type, in order."""
        return [event for event in events.read(self.folder.events).events if event.type == kind]

    def steps(self, name: str) -> list[float]:
        """A metric by step."""
        return [event.metrics[name] for event in self.events("step")]

    def held_out(self, name: str) -> list[float]:
        """A held-out figure by evaluation."""
        return [event.metrics[name] for event in self.events("evaluation")]

    @property
    def resolved(self) -> dict[str, Any]:
        """`resolved.json`."""
        found: dict[str, Any] = json.loads(self.folder.resolved.read_text(encoding="utf-8"))
        return found

    @property
    def manifest(self) -> Manifest:
        """The manifest; a run without one shows why."""
        found = self.folder.read_manifest()
        assert found is not None, self.reason
        return found

    @property
    def reason(self) -> str:
        """The reason of the failure."""
        return "; ".join(event.reason for event in self.events("failed"))

    def adapter(self) -> dict[str, Tensor]:
        """The final adapter's tensors by name."""
        return dict(load_file(self.folder.adapter / "adapter_model.safetensors"))

    def checkpoint(self, name: str) -> dict[str, Tensor]:
        """The adapter's tensors in a checkpoint."""
        return dict(load_file(self.folder.root / "checkpoints" / name / "adapter_model.safetensors"))

    def final(self) -> dict[str, Tensor]:
        """The trained tensors, an adapter's or all weights."""
        return self.model() if self.folder.model.is_dir() else self.adapter()

    def model(self) -> dict[str, Tensor]:
        """The final model's tensors by name, if all weights were trained."""
        return dict(load_file(self.folder.model / "model.safetensors"))


class Workshop:
    """Tiny models, made once, and jobs that train them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.jobs = 0

    def model(self, family: str, **changes: Any) -> Path:
        """Folder of the tiny model of a family."""
        folder = self.root / "models" / "-".join([family, *map(str, changes.values())])
        return folder if folder.is_dir() else tiny_models.build(family, folder, **changes)

    def run(
        self,
        recipe: str,
        family: str | Path,
        rows: list[Row] | None = None,
        validation: list[Row] | None = None,
        **blocks: Any,
    ) -> Run:
        """Run a job: 16 rows, 4 held out, 8 a step, lr 5e-3 constant, fp32, LoRA of rank 4; `blocks` change this.

        `adapter=None` trains all weights; `domains`: see `domains_of`.
        """
        return self.again(Run(self.job(recipe, family, rows, validation, **blocks), 0))

    def job(
        self,
        recipe: str,
        family: str | Path,
        rows: list[Row] | None = None,
        validation: list[Row] | None = None,
        domains: "DomainRows | None" = None,
        **blocks: Any,
    ) -> JobFolder:
        """The folder of such a job, which has not started."""
        make = {"dpo": dpo_rows, "grpo": prompt_rows, "distill": prompt_rows, "kto": kto_rows, "reward": dpo_rows}.get(
            recipe, sft_rows
        )
        self.jobs += 1
        folder = JobFolder(self.root / "jobs" / f"{recipe}-{self.jobs}")
        folder.data.mkdir(parents=True, exist_ok=True)
        body: dict[str, Any] = {
            "recipe": recipe,
            "job_uuid": folder.root.name,
            "model": str(family if isinstance(family, Path) else self.model(family)),
            "data": {"dataset_id": "train", "validation_dataset_id": "held-out"},
            "training": {"batch_size": 8, "dtype": "fp32"},
            "optimizer": {"lr": 5e-3},
            "adapter": {"rank": 4, "alpha": 8},
            "options": {"max_length": 96, "lr_scheduler": "constant"},
        }
        if recipe == "circuit_breaker":
            body["circuit_breaker"] = {"retain": {"dataset_id": "kept", "validation_dataset_id": "kept-held-out"}}
            body["training"]["batch_size"] = 4
        if recipe == "grpo":  # four groups of two short answers, of which a tiny model gives some the reward
            body["rl"] = {"n_generations": 2, "max_completion_length": 6}
            body["reward"] = [{"grader": {"type": "regex", "name": "has e", "pattern": "e"}}]
        if recipe == "distill":  # from another model of the family
            body["teacher"] = str(self.model("granitemoe", seed=5))
            body["generation"] = {"max_completion_length": 6}
        for name, block in blocks.items():
            inside = isinstance(block, dict) and isinstance(body.get(name), dict)
            body[name] = {**body[name], **block} if inside else block
        if domains is not None:
            named = {"dataset_id", "validation_dataset_id"}
            others = {name: value for name, value in body["data"].items() if name not in named}
            body["data"] = {**others, "domains": [each | {"dataset_id": each["name"]} for each, _, _ in domains]}
        write_atomic(folder.spec, JOB_SPEC.validate_python(body))
        for each, rows_of, held_out in domains or []:
            _write(folder.rows(f"train-{each['name']}"), rows_of)
            if each.get("validation_dataset_id"):
                _write(folder.rows(f"validation-{each['name']}"), held_out)
        _write(folder.train_rows, make(16) if rows is None else rows)
        if body["data"].get("validation_dataset_id") is not None:
            _write(folder.validation_rows, make(4, first=100) if validation is None else validation)
        for part in body.get("circuit_breaker", {}).keys() & {"retain", "safe"}:
            _write(folder.rows(part), kept_rows(12))
            _write(folder.rows(f"{part}-validation"), kept_rows(3, first=100))
        return folder

    def again(self, run: Run) -> Run:
        """Start a job's process again, as a supervisor does after it was lost."""
        with signals_put_back():
            return Run(run.folder, train(run.folder))

    def next_folder(self, recipe: str) -> Path:
        """The folder of the next job that `run` makes."""
        return self.root / "jobs" / f"{recipe}-{self.jobs + 1}"

    def copied(self, run: Run) -> JobFolder:
        """A second job in the state of `run` just before its end: all checkpoints, no manifest."""
        self.jobs += 1
        old, new = run.folder.root, self.root / "jobs" / f"copy-{self.jobs}"
        shutil.copytree(old, new, ignore=shutil.ignore_patterns("manifest.json", "artifacts"))
        for name in ("spec.json", "events.jsonl"):
            text = (new / name).read_text(encoding="utf-8")
            (new / name).write_text(text.replace(str(old), str(new)).replace(f'"{old.name}', f'"{new.name}'))
        return JobFolder(new)


def _write(path: Path, rows: list[Row]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@contextmanager
def signals_put_back() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    """A workshop for this test module."""
    return Workshop(tmp_path_factory.mktemp("workshop"))
