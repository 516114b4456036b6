"""Exports: of what a job has trained, what can be served; nothing is trained, and no step holds the model to merge it.

Each step stands for itself (`training.steps`): what fails is named at the end, and tried again when the job is resumed.
"""

import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from llama_stack_provider_moe.errors import CheckpointError, NoRoom
from llama_stack_provider_moe.export.alone import compare
from llama_stack_provider_moe.export.load_check import NotRecorded
from llama_stack_provider_moe.export.merge import bytes_needed, merge
from llama_stack_provider_moe.jobs.checkpoint_index import verify_files
from llama_stack_provider_moe.jobs.events import Finished, Plan, Resumed
from llama_stack_provider_moe.jobs.folder import Artifact, ArtifactKind, JobFolder, Manifest, write_atomic
from llama_stack_provider_moe.jobs.scan import saved_artifacts
from llama_stack_provider_moe.spec import ExportSpec
from llama_stack_provider_moe.spec.exports import shard_bytes
from llama_stack_provider_moe.training.checkpoints import describe, publish, remove
from llama_stack_provider_moe.training.session import Session
from llama_stack_provider_moe.training.steps import Done, Skipped, Step, Steps, clear_unfinished

_JSON: TypeAdapter[dict[str, Any]] = TypeAdapter(dict[str, Any])


@dataclass(frozen=True)
class Trained:
    """What a job has trained: an adapter, or all weights.

    Attributes:
        job: that trained it.
        folder: of the adapter, or of the model.
        entry: of the job's manifest.
    """

    job: JobFolder
    folder: Path
    entry: Artifact

    @property
    def is_adapter(self) -> bool:
        """Else all weights."""
        return self.entry.kind == "adapter"


def run(session: Session[ExportSpec]) -> Manifest:
    """Check what was trained, foresee the room, then step by step."""
    spec, folder, began = session.spec, session.folder, time.monotonic()
    clear_unfinished(folder)
    trained = find_trained(folder.root.parent / spec.of)
    folder.artifacts.mkdir(exist_ok=True)
    folder.work.mkdir(exist_ok=True)
    steps = Steps(session, plan(session, trained))
    told = {
        "recipe": spec.recipe,
        "of": spec.of,
        "model": spec.model,
        "trained": str(trained.folder),
        "steps": [each.name for each in steps.states],
    }
    write_atomic(folder.resolved, _JSON.dump_json(told, indent=2).decode())
    session.events.append(Plan(plan=told))
    if session.started_before:
        session.events.append(Resumed(step=0, checkpoint=None))
    print(f"exports    {trained.entry.kind} of job {spec.of}, of {spec.model}", flush=True)
    if why := verify_files(trained.folder):
        raise CheckpointError(f"the {trained.entry.kind} of job {spec.of!r} is not what it wrote: {why}")
    check_room(folder.root, steps.bytes_needed())
    steps.run()
    shutil.rmtree(folder.work)
    session.events.append(Finished(train_seconds=time.monotonic() - began))
    artifacts = list(saved_artifacts(folder))
    summary = {"artifacts": float(len(artifacts)), "bytes": float(sum(each.bytes for each in artifacts))}
    return Manifest(job_uuid=session.job_uuid, artifacts=artifacts, summary=summary)


def find_trained(root: Path) -> Trained:
    """The adapter, or the model, that the job in `root` left.

    Raises:
        CheckpointError: it left none, or its manifest is damaged.
    """
    job = JobFolder(root)
    try:
        manifest = job.read_manifest()
    except ValueError as error:
        raise CheckpointError(f"the manifest of job {root.name!r} can't be read: {error}") from error
    for kind, folder in (("adapter", job.adapter), ("model", job.model)):
        for entry in () if manifest is None else manifest.artifacts:
            if entry.kind == kind and folder.is_dir():
                return Trained(job, folder, entry)
    raise CheckpointError(f"job {root.name!r} has left neither an adapter nor a whole model")


def check_room(folder: Path, needed: int) -> None:
    """Raise `NoRoom` unless the disk has this many bytes free."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise NoRoom(f"the exports need {needed:,} bytes, and the disk of {folder} has {free:,} free; nothing was "
                     "written: free some and resume the job")  # fmt: skip


def plan(session: Session[ExportSpec], trained: Trained) -> list[Step]:
    """What is to be done, each after what it needs."""
    asked = session.spec.export
    steps = [load_check(session, trained)] if asked.load_check else []
    return [*steps, merged(session, trained)]


def load_check(session: Session[ExportSpec], trained: Trained) -> Step:
    """What lies on the disk, loaded anew, says what the trained model said at the end of its training."""

    def run() -> Done:
        try:
            if trained.is_adapter:
                answer = compare("adapter", trained.folder, session.spec.model)
            else:
                answer = compare("model", trained.folder)
        except NotRecorded as error:
            raise Skipped(str(error)) from None
        return Done(note=answer.text, figures=answer.figures)

    return Step("load_check", run)


def merged(session: Session[ExportSpec], trained: Trained) -> Step:
    """Base plus adapter as one folder; of a job that trained all weights, its model is that already."""
    spec, asked = session.spec, session.spec.export
    if not trained.is_adapter:
        told = f"all weights were trained, so artifact `model` of job {spec.of} is the whole model already"
        return Step("merged", lambda: Done(note=told))
    target = (session.folder.artifacts if asked.merged else session.folder.work) / "merged"

    def make() -> Done:
        written = target.with_name(f".{target.name}.writing")
        remove(written)
        report = merge(
            spec.model, trained.folder, written, asked.dtype, shard_bytes(asked.shard_size),
            say=lambda line: print(f"  {line}", flush=True),
        )  # fmt: skip
        note = (
            f"{report.merged} of {report.merged + report.replaced + report.copied} tensors merged, "
            f"{report.parameters:,} parameters in {report.shards} file(s), "
            f"{report.bytes / 1e6 / report.seconds:,.0f} MB/s"
        )
        figures = None
        if asked.load_check:
            figures, told = compare_merged(written, trained, spec.model)
            note = f"{note}; {told}"
        publish(written, target, trained.entry.step)
        return Done(listed(session, trained, target, "merged", figures) if asked.merged else None, note, figures)

    return Step(
        "merged", make, leaves=[target], lasts=asked.merged,
        bytes_needed=lambda: bytes_needed(spec.model, trained.folder, asked.dtype),
    )  # fmt: skip


def compare_merged(folder: Path, trained: Trained, base: str) -> tuple[dict[str, Any] | None, str]:
    """Logits of a merged folder beside those of the adapter on its base: figures, and what to say of them.

    Raises:
        ExportError: they differ by more than rounding; nothing of the folder is to be listed.
    """
    try:
        return compare("merged", folder, trained.folder, base)
    except NotRecorded as error:
        return None, f"not compared with the adapter: {error}"
    except BaseException:
        remove(folder)
        raise


def listed(
    session: Session[ExportSpec],
    trained: Trained,
    folder: Path,
    kind: ArtifactKind,
    verification: dict[str, Any] | None,
) -> Artifact:
    """The entry of a finished folder, with what training measured of the weights that are in it."""
    entry = trained.entry
    made = describe(session.job_uuid, kind, folder, entry.epoch, entry.step, entry.metrics)
    return made.model_copy(update={"verification": verification})
