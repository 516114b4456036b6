"""`JobFolder`: the name of every file of a job. The server, the supervisor and the child meet here.

jobs/<job_uuid>/
  spec.json            the JobSpec in full                                    written by the service
  data/train.jsonl     canonical rows (see `datarows`)                        written by the service
  data/validation.jsonl  the same, where a validation data set was named      written by the service
  data/<part>.jsonl    the same of a job's further data sets (`row_sources`)  written by the service
  resolved.json        what was decided from the model (layout, targets ...)  written by the child
  events.jsonl         typed events, one a line                               written by the child
  output.log           standard output and error of the child                 written by the child
  checkpoints/<name>/  `epoch-N`, `step-N`; or elsewhere by `checkpoint_dir`  written by the child
  artifacts/adapter/   the final adapter, loadable by plain PEFT              written by the child
  artifacts/model/     the final model, where all weights were trained        written by the child
  artifacts/merged/    base plus adapter, on request                          written by the child
  artifacts/routing/   a routing analysis: routing.json, and its charts       written by the child
  before.json          what `eval` measured before training                   written by the child
  artifacts/evaluation/  eval.json: before, after, differences                written by the child
  trackers/<name>/     what TensorBoard, trackio, MLflow or wandb show        written by the child
  exports.json         of an export job: how its steps stand (`jobs.exports`)  written by the child
  work/                of an export job: what its steps need until it is done  written by the child
  mirror.json          where copies of checkpoints and artifacts are          written by the child
  manifest.json        what the job leaves; last and atomic                   written by the child
"""

import os
import tempfile
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field

from llama_stack_provider_moe.jobs.events import StoppedBy
from llama_stack_provider_moe.spec import JOB_SPEC, Block, ExportSpec, JobSpec, RoutingAnalysisSpec

ArtifactKind = Literal["checkpoint", "adapter", "model", "merged", "analysis", "evaluation", "gguf"]


class Metrics(Block):
    """The API's PostTrainingMetric: losses in nats a token (SFT) or nats a pair (DPO)."""

    epoch: int
    train_loss: float
    validation_loss: float
    perplexity: float


class Artifact(Block):
    """One thing a job leaves: a folder, complete when it is listed."""

    identifier: str = Field(description="Unique within the server: `<job_uuid>/<name>`.")
    kind: ArtifactKind
    path: str
    epoch: int = Field(description="Epochs finished when it was written, from 1; 0: before the first ended.")
    step: int = Field(description="Optimiser steps taken.")
    created_at: datetime
    bytes: int
    metrics: Metrics | None = Field(default=None, description="None where nothing was held out.")
    sha256: str | None = Field(
        default=None,
        description="Of the GGUF file; of what has many files, of its checksums.json.",
    )
    verification: dict[str, Any] | None = Field(default=None, description="What was compared, and how it came out.")


class Manifest(Block):
    """What a finished job leaves; its presence is what tells a finished job from a dead one."""

    job_uuid: str
    artifacts: list[Artifact]
    summary: dict[str, float] = Field(description="Final figures, by the names of the step metrics.")
    stopped_by: StoppedBy | None = Field(default=None, description="What ended training before its last step.")


class JobFolder:
    """Paths of one job. `checkpoints` is the only one that may lie elsewhere."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.spec = root / "spec.json"
        self.data = root / "data"
        self.train_rows = self.rows("train")
        self.validation_rows = self.rows("validation")
        self.resolved = root / "resolved.json"
        self.events = root / "events.jsonl"
        self.output = root / "output.log"
        self.artifacts = root / "artifacts"
        self.adapter = root / "artifacts" / "adapter"
        self.model = root / "artifacts" / "model"
        self.merged = root / "artifacts" / "merged"
        self.routing = root / "artifacts" / "routing"
        self.before = root / "before.json"
        self.evaluation = root / "artifacts" / "evaluation"
        self.trackers = root / "trackers"
        self.exports = root / "exports.json"
        self.work = root / "work"
        self.mirror = root / "mirror.json"
        self.manifest = root / "manifest.json"

    def rows(self, part: str) -> Path:
        """Canonical rows of one of the job's data sets (`RowSource.part`)."""
        return self.data / f"{part}.jsonl"

    def checkpoints(self, spec: JobSpec) -> Path:
        """Folder of the checkpoints: one of this job's own, also inside a `checkpoint_dir`."""
        if isinstance(spec, RoutingAnalysisSpec | ExportSpec) or spec.checkpoint_dir is None:
            return self.root / "checkpoints"
        return Path(spec.checkpoint_dir) / self.root.name

    def read_spec(self) -> JobSpec:
        """The job as submitted, defaults filled in."""
        return JOB_SPEC.validate_json(self.spec.read_bytes())

    def read_manifest(self) -> Manifest | None:
        """What the job left, or None while it has not finished."""
        try:
            return Manifest.model_validate_json(self.manifest.read_bytes())
        except FileNotFoundError:
            return None


def write_atomic(path: Path, content: BaseModel | str) -> None:
    """Write `path` whole or not at all: a temporary file beside it, synced, then renamed."""
    text = content if isinstance(content, str) else content.model_dump_json(indent=2)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
