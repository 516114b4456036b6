"""From a training job that has completed to the job that exports what it left, where it asked for that.

The folder of the new job is made before the one transaction that ends the old job and inserts the new one. A
supervisor that dies in between leaves a folder that no store knows; its successor, which settles the same job, makes
the same one again, for the name follows from the job's.
"""

import hashlib
import shutil
import uuid
from pathlib import Path

from llama_stack_provider_moe.errors import NotFound
from llama_stack_provider_moe.jobs.folder import JobFolder, write_atomic
from llama_stack_provider_moe.jobs.store import Job, JobStore, NewJob
from llama_stack_provider_moe.spec import ExportSpec, TrainingSpec


def prepare_export(store: JobStore, job: Job) -> NewJob | None:
    """The export job that `job` asks for, its folder made, to be inserted; None where it asks for none.

    Raises:
        ValueError: the job's spec.json is damaged.
        OSError: the folder can't be made.
    """
    try:
        spec = JobFolder(Path(job.folder)).read_spec()
    except FileNotFoundError:
        return None
    if not isinstance(spec, TrainingSpec) or spec.export is None:
        return None
    job_id = _name_for(store, job.id)
    export = ExportSpec(recipe="export", job_uuid=job_id, of=job.id, model=spec.model, export=spec.export).resolved()
    folder = JobFolder(Path(job.folder).with_name(job_id))  # beside the one that it reads
    if folder.root.exists():  # of a supervisor that died here
        shutil.rmtree(folder.root)
    folder.root.mkdir(mode=0o700)
    write_atomic(folder.spec, export)
    gpus = export.resources.gpus
    return NewJob(job_id, job.owner, export.recipe, export.model, str(folder.root), gpus, parent=job.id)


def _name_for(store: JobStore, parent: str) -> str:
    name = f"export-{hashlib.sha256(parent.encode()).hexdigest()[:12]}"
    try:
        store.get(name, None)
    except NotFound:
        return name
    return f"export-{uuid.uuid4().hex[:12]}"  # somebody has a job of that name
