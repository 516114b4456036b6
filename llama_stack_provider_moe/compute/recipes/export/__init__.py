"""Exports: make files for serving from what a job trained. Nothing is trained, and no step loads the model to merge it.

Each step succeeds or fails alone (`compute.recipes.export.step_log`). The job names failed steps at its end, and tries
them again when it is resumed.
"""

import shutil
import time
from collections.abc import Sequence
from pathlib import Path

from pydantic import TypeAdapter

from llama_stack_provider_moe.compute.export.gguf import bytes_needed as bytes_of_files
from llama_stack_provider_moe.compute.export.merge import bytes_needed
from llama_stack_provider_moe.compute.export.projector import vision_entries
from llama_stack_provider_moe.compute.models.upcycle import model_folder
from llama_stack_provider_moe.compute.recipes.export.step_log import PlannedStep, Steps, clear_unfinished
from llama_stack_provider_moe.compute.recipes.export.steps import (
    PROJECTOR,
    Files,
    Trained,
    load_check,
    merged,
    pushed,
    step_of,
)
from llama_stack_provider_moe.compute.runtime.context import Session
from llama_stack_provider_moe.errors import CheckpointError, NoRoom
from llama_stack_provider_moe.jobdir.attempt import require_current
from llama_stack_provider_moe.jobdir.checkpoint_index import verify_files
from llama_stack_provider_moe.jobdir.events import Finished, Plan, Resumed
from llama_stack_provider_moe.jobdir.folder import JobFolder, Manifest, write_atomic
from llama_stack_provider_moe.jobdir.scan import saved_artifacts
from llama_stack_provider_moe.spec import DType, ExportSpec
from llama_stack_provider_moe.spec.gguf_types import GgufType

_LOSSLESS: dict[DType, GgufType] = {"bf16": "bf16", "fp16": "f16", "fp32": "f32"}
_JSON: TypeAdapter[dict[str, object]] = TypeAdapter(dict[str, object])


def run(session: Session[ExportSpec]) -> Manifest:
    """Check what was trained and the free disk space, then run the steps."""
    spec, folder, began = session.spec, session.folder, time.monotonic()
    clear_unfinished(folder)
    trained = find_trained(folder.root.parent / spec.of)
    folder.artifacts.mkdir(exist_ok=True)
    folder.work.mkdir(exist_ok=True)
    steps = Steps(session, plan(session, trained))
    told: dict[str, object] = {
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
        raise CheckpointError(f"the {trained.entry.kind} of job {spec.of!r} has changed since the job wrote it: {why}")
    check_room(folder.root, bytes_for(steps.undone, spec, trained))
    steps.run()
    require_current()
    shutil.rmtree(folder.work)
    session.events.append(Finished(train_seconds=time.monotonic() - began))
    artifacts = list(saved_artifacts(folder))
    summary = {"artifacts": float(len(artifacts)), "bytes": float(sum(each.bytes for each in artifacts))}
    return Manifest(job_uuid=session.job_uuid, artifacts=artifacts, summary=summary)


def find_trained(root: Path) -> Trained:
    """Find the adapter, or the model, that the job in `root` trained.

    Raises:
        CheckpointError: there is none, or the job's manifest is damaged.
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
    raise CheckpointError(f"job {root.name!r} has neither an adapter nor a whole model")


def check_room(folder: Path, needed: int) -> None:
    """Raise `NoRoom` unless the disk has `needed` bytes free."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise NoRoom(f"the exports need {needed:,} bytes, and the disk of {folder} has {free:,} free; nothing was "
                     "written. Free some space and resume the job")  # fmt: skip


def bytes_for(undone: Sequence[str], spec: ExportSpec, trained: Trained) -> int:
    """Disk space that the remaining steps need. Files that an earlier start wrote for them count again."""
    needed = 0
    if trained.is_adapter and "merged" in undone:
        needed = bytes_needed(spec.model, trained.folder, spec.export.dtype)
    types = {type_ for type_ in spec.export.gguf if step_of(type_) in undone}
    if types:
        if spec.export.dtype is not None:  # others are quantised from this type, not from the base's
            types.add(_LOSSLESS[spec.export.dtype])
        needed += bytes_of_files(_whole(spec, trained), types)
    if PROJECTOR in undone:
        needed += sum(entry.nbytes for entry in vision_entries(_whole(spec, trained)))
    return needed


def _whole(spec: ExportSpec, trained: Trained) -> Path:
    """A folder with tensors like those of the whole model, which may not be merged yet."""
    return model_folder(spec.model, "model") if trained.is_adapter else trained.folder


def plan(session: Session[ExportSpec], trained: Trained) -> list[PlannedStep]:
    """The steps of the job, each after those that it needs."""
    asked = session.spec.export
    steps = [load_check(session, trained)] if asked.load_check else []
    if asked.merged or (asked.gguf and trained.is_adapter):
        steps.append(merged(session, trained))
    files = Files(session, trained)
    steps += files.steps()
    if asked.serve:
        steps.append(files.serving())
    if asked.push is not None:
        steps.append(pushed(session, trained))
    return steps
