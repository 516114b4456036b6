"""What is known about a branch: the job that trained it, from which model, on which rows."""

from dataclasses import dataclass
from pathlib import Path

from llama_stack_provider_moe.compute.ablation.fingerprint import fingerprint, sha256
from llama_stack_provider_moe.compute.mixing.sources import Source, shown
from llama_stack_provider_moe.errors import InvalidInput, ModelError
from llama_stack_provider_moe.jobdir.folder import JobFolder
from llama_stack_provider_moe.spec import ExportSpec, JobSpec, TrainingSpec

_MOST_STAGES = 32  # jobs that were trained on one another's results


@dataclass(frozen=True)
class Known:
    """Facts from jobs' folders; None: unknown, since no job beside this one trained the branch, or it is gone.

    Attributes:
        job: the job that trained it.
        base: the model that the job's chain of jobs started from.
        dataset_id: what the job was trained on; the data sets of its domains are joined by commas.
        dataset_sha256: of its canonical rows; None for a job with domains.
    """

    job: str | None = None
    base: str | None = None
    dataset_id: str | None = None
    dataset_sha256: str | None = None


def known(branch: Source, base: Source) -> Known:
    """What the folders of jobs say about a branch.

    Raises:
        InvalidInput: they say that it was trained from another model than the base.
    """
    found = _trainer(branch.folder)
    if found is None:
        return Known()
    job, spec = found
    models = [spec.model]
    while (before := _trainer(Path(models[-1]))) is not None and len(models) < _MOST_STAGES:
        models.append(before[1].model)
    if not any(_is(model, base.folder) for model in models):
        raise InvalidInput(branch.field, branch.shown, f"a model that was trained from `model`; job "
                           f"{job.root.name!r} trained it from {shown(models[-1])!r}")  # fmt: skip
    rows = job.rows("train")
    trained_on = ", ".join(spec.data.training_ids)
    return Known(job.root.name, models[-1], trained_on, sha256(rows) if rows.is_file() else None)


def _trainer(folder: Path) -> tuple[JobFolder, TrainingSpec] | None:
    """The job that trained the model in `folder`, which may be an export's, and its spec."""
    inside = folder.resolve().parent
    if inside.name not in ("artifacts", "checkpoints"):
        return None
    job = JobFolder(inside.parent)
    spec = _spec(job)
    if isinstance(spec, ExportSpec):
        job = JobFolder(job.root.parent / spec.of)
        spec = _spec(job)
    return (job, spec) if isinstance(spec, TrainingSpec) else None


def _spec(job: JobFolder) -> JobSpec | None:
    try:
        return job.read_spec()
    except (OSError, ValueError):  # deleted, or not a job's folder
        return None


def _is(model: str, base: Path) -> bool:
    """Whether a job's model is the base: the same folder, or a copy of it."""
    path = Path(model)
    if not path.is_dir():
        return model.replace("/", "--") in str(base)  # a hub id; the hub's cache has its folder
    if path.resolve() == base.resolve():
        return True
    try:
        return fingerprint(path) == fingerprint(base)
    except ModelError:
        return False
