"""`JobFolder`: the paths of all files of a job, which the server, the supervisor and the training process share.

jobs/<job_uuid>/
  spec.json              the whole JobSpec                                      written by the server
  later.json             a job whose names are resolved later (`jobdir.later`)  written by the server
  data/train.jsonl       canonical rows (see `spec.rows`)                       written by the server
  data/validation.jsonl  validation rows, if a validation data set was named    written by the server
  data/<part>.jsonl      rows of further data sets (`row_sources`)              written by the server
  data/<part>.domains    domains of rows by a column of theirs (`jobdir.row_domains`)  written by the server
  data/images/<sha256>.<png|jpg|webp>  images of the rows, once each       written by the server
  data/report.json       what the rows have (`jobdir.row_reports`)              written by the server
  data/sources.json      where the rows came from (`jobdir.row_sources`)        written by the server
  samples/<step>.jsonl   answers of a GRPO or distill job (`jobdir.samples`)    written by the training process
  resolved.json          what was decided from the model (layout, targets ...)  written by the training process
  events.jsonl           typed events, one per line                             written by the training process
  output.log             standard output and error of the training process      written by the training process
  checkpoints/<name>/    `epoch-N`, `step-N`; elsewhere with `checkpoint_dir`   written by the training process
  experts.json           what computes the experts now (`experts_backend`)      by the training process, or at a resume
  artifacts/adapter/     the final adapter, loadable by plain PEFT              written by the training process
  artifacts/model/       the final model, if all weights were trained           written by the training process
  artifacts/merged/      base plus adapter, on request                          written by the training process
  artifacts/routing/     a routing analysis: routing.json and its charts        written by the training process
  artifacts/domains/     routing on the domains of the data: routing.json, charts  written by the training process
  artifacts/positions/   perplexity by position of a job with `rope_scaling`    written by the training process
  artifacts/measurements/ mean states of `ablation_measure`, and their report   written by the training process
  artifacts/probe/       a probe: probe.json, probe.safetensors                  written by the training process
  before.json            what `eval` measured before training                   written by the training process
  before.safetensors     what an ablation's `eval` compares the edited model with  written by the training process
  artifacts/evaluation/  eval.json: before, after, differences                  written by the training process
  trackers/<name>/       files of TensorBoard, trackio, MLflow or wandb         written by the training process
  exports.json           states of an export job's steps (`export_steps`)       written by the training process
  served.json            a model that an export put on an inference server      written by the training process
  prompts/               prompts to a playground and their answers (`jobdir.prompts`)
  readers/               shields that read its files (`jobdir.readers`)         written by servers with shields
  work/                  temporary files of an export job's steps               written by the training process
  mirror.json            where copies of checkpoints and artifacts are          written by the training process
  manifest.json          what the job leaves; written last and atomically       written by the training process
  attempt.json           which attempt of the job counts (`jobdir.attempt`)     written by the supervisor
"""

import json
import os
import uuid
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, Field

from llama_stack_provider_moe.jobdir.attempt import ATTEMPT_FILE, require_current
from llama_stack_provider_moe.jobdir.later import LATER_FILE
from llama_stack_provider_moe.jobdir.reading import read_as, read_with, unknown_fields
from llama_stack_provider_moe.jobdir.state import StoppedBy
from llama_stack_provider_moe.spec.blocks import Block

if TYPE_CHECKING:  # every model of a job; whoever reads one has it, and others need not load it
    from llama_stack_provider_moe.spec import JobSpec

ArtifactKind = Literal["checkpoint", "adapter", "model", "merged", "analysis", "evaluation", "gguf"]


class Metrics(Block):
    """The API's PostTrainingMetric: losses in nats per token (SFT) or nats per pair (DPO)."""

    epoch: int
    train_loss: float
    validation_loss: float
    perplexity: float


class Artifact(Block):
    """An artifact of a job: a folder that is complete when it is listed."""

    identifier: str = Field(description="Identifier `<job_uuid>/<name>`, unique within the server.")
    kind: ArtifactKind | str = Field(pattern=r"^[a-z0-9_]{1,64}$", description="Later versions may add kinds.")
    path: str
    epoch: int = Field(description="Number of epochs finished when it was written; 0 during the first epoch.")
    step: int = Field(description="Number of optimiser steps taken.")
    created_at: datetime
    bytes: int
    metrics: Metrics | None = Field(default=None, description="Held-out metrics; null if nothing was held out.")
    sha256: str | None = Field(
        default=None,
        description="SHA-256 of the GGUF file, or of checksums.json for an artifact of several files.",
    )
    verification: dict[str, Any] | None = Field(default=None, description="What was compared, with the results.")


class Manifest(Block):
    """What a finished job leaves. Its presence distinguishes a finished job from a dead one."""

    job_uuid: str
    artifacts: list[Artifact]
    summary: dict[str, float] = Field(description="Final figures, by the names of the step metrics.")
    stopped_by: StoppedBy | str | None = Field(default=None, description="What stopped training before its last step.")


class JobFolder:
    """Paths of one job. Only the checkpoints may be elsewhere."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.spec = root / "spec.json"
        self.later = root / LATER_FILE
        self.data = root / "data"
        self.train_rows = self.rows("train")
        self.validation_rows = self.rows("validation")
        self.row_reports = self.data / "report.json"
        self.resolved = root / "resolved.json"
        self.samples = root / "samples"
        self.events = root / "events.jsonl"
        self.output = root / "output.log"
        self.artifacts = root / "artifacts"
        self.adapter = root / "artifacts" / "adapter"
        self.model = root / "artifacts" / "model"
        self.merged = root / "artifacts" / "merged"
        self.routing = root / "artifacts" / "routing"
        self.domains = root / "artifacts" / "domains"
        self.positions = root / "artifacts" / "positions"
        self.measurements = root / "artifacts" / "measurements"
        self.probe = root / "artifacts" / "probe"
        self.before = root / "before.json"
        self.before_states = root / "before.safetensors"
        self.evaluation = root / "artifacts" / "evaluation"
        self.trackers = root / "trackers"
        self.exports = root / "exports.json"
        self.served = root / "served.json"
        self.prompts = root / "prompts"
        self.work = root / "work"
        self.mirror = root / "mirror.json"
        self.manifest = root / "manifest.json"
        self.attempt = root / ATTEMPT_FILE

    def rows(self, part: str) -> Path:
        """Return the file with the canonical rows of one of the job's data sets (`RowSource.part`)."""
        return self.data / f"{part}.jsonl"

    @property
    def images(self) -> Path:
        """Return the folder of the images that the rows name by SHA-256."""
        return self.root / "data" / "images"

    def image(self, sha256: str, format: str) -> Path:
        """Return the file of an image; `format` is png, jpeg or webp."""
        return self.images / f"{sha256}.{'jpg' if format == 'jpeg' else format}"

    def domains_of_rows(self, part: str) -> Path:
        """Return the file with the domain of each row of a part, where a column names it (`jobdir.row_domains`)."""
        return self.data / f"{part}.domains"

    def checkpoints(self, spec: "JobSpec") -> Path:
        """Return the folder of the checkpoints. Inside a `checkpoint_dir`, each job has its own folder."""
        from llama_stack_provider_moe.spec import TrainingSpec

        if not isinstance(spec, TrainingSpec) or spec.checkpoint_dir is None:
            return self.root / "checkpoints"
        return Path(spec.checkpoint_dir) / self.root.name

    def read_spec(self) -> "JobSpec":
        """Read the submitted job with all defaults; fields that only a later version knows are left out.

        Raises:
            ValidationError: It is damaged, or a known field has a value that this version does not know.
        """
        from llama_stack_provider_moe.spec import JOB_SPEC

        return read_with(JOB_SPEC, self.spec.read_bytes())

    def unknown_settings(self) -> list[str]:
        """Return the settings in `spec.json` that this version does not know and ignores, as `path = value`."""
        return unknown_fields(json.loads(self.spec.read_bytes()), self.read_spec().model_dump(mode="json"))

    def read_manifest(self) -> Manifest | None:
        """Read what the job left; None if it has not finished.

        Raises:
            ValidationError: The file is damaged.
        """
        try:
            return read_as(Manifest, self.manifest.read_bytes())
        except FileNotFoundError:
            return None


def write_atomic(path: Path, content: BaseModel | str, mode: int = 0o640) -> None:
    """Write `path` completely or not at all: write a temporary file beside it, flush it, then rename it.

    Args:
        path: The file.
        content: Content of the file; a model is written as JSON.
        mode: Mode of the file, minus the process's umask (`private`).
    """
    text = content if isinstance(content, str) else content.model_dump_json(indent=2)
    name = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    handle = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        require_current()
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
