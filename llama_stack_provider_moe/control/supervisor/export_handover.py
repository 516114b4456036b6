"""Create the export job that a completed training job asked for.

The folder of the new job is created elsewhere. It moves to its place in the transaction that ends the training job and
inserts the export job, so a supervisor that was superseded moves nothing. A supervisor that dies in between leaves a
folder that no store knows; its successor sets that folder aside.
"""

import hashlib
import shutil
import uuid
from pathlib import Path
from typing import NamedTuple

from llama_stack_provider_moe.control.store import intake
from llama_stack_provider_moe.control.store.references import uses_of
from llama_stack_provider_moe.control.store.store import Job, JobStore, NewJob
from llama_stack_provider_moe.control.store.transitions import First
from llama_stack_provider_moe.errors import NotFound
from llama_stack_provider_moe.jobdir.folder import JobFolder, write_atomic
from llama_stack_provider_moe.spec import ExportSpec, TrainingSpec


class Handover(NamedTuple):
    """An export job that is ready to be inserted.

    Attributes:
        new: Its row.
        staged: Its temporary folder.
    """

    new: NewJob
    staged: Path

    def placing(self, before: First | None) -> First:
        """Return a callback that calls `before` and moves the folder to its place, for the transaction of the move."""

        def place() -> None:
            if before is not None:
                before()
            intake.place(self.staged, Path(self.new.folder))

        return place

    def discard(self) -> None:
        """Remove the temporary folder if it was not moved."""
        shutil.rmtree(self.staged, ignore_errors=True)


def prepare_export(store: JobStore, job: Job) -> Handover | None:
    """Prepare the export job that `job` asks for, with its folder; None if it asks for none.

    Raises:
        ValueError: The job's spec.json is damaged.
        OSError: The folder can't be created.
    """
    home = Path(job.folder)
    try:
        spec = JobFolder(home).read_spec()
    except FileNotFoundError:
        return None
    if not isinstance(spec, TrainingSpec) or spec.export is None:
        return None
    job_id = _name_for(store, job)
    export = ExportSpec(
        recipe="export", job_uuid=job_id, of=job.id, model=spec.model, model_from=spec.model_from, export=spec.export
    ).resolved()
    staged = JobFolder(home.parent.parent / "staging" / uuid.uuid4().hex)  # leftovers there are removed after a day
    staged.root.mkdir(mode=0o750, parents=True)  # minus this process's umask
    write_atomic(staged.spec, export)
    uses = uses_of(export, home.parent)
    new = NewJob(
        job_id, job.owner, export.recipe, job.model, str(home.with_name(job_id)),
        export.resources.gpus, parent=job.id, uses=uses.always, uses_to_complete=uses.to_complete,
    )  # fmt: skip
    return Handover(new, staged.root)


def _name_for(store: JobStore, parent: Job) -> str:
    name = f"export-{hashlib.sha256(parent.id.encode()).hexdigest()[:12]}"
    try:
        store.get(name, None)
    except NotFound:
        if not intake.results_in(Path(parent.folder).with_name(name)):
            return name
    return f"export-{uuid.uuid4().hex[:12]}"  # a job or a folder already has the first name
