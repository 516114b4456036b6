"""Whether a job has saved what it can go on from."""

from pydantic import ValidationError

from llama_stack_provider_moe.errors import Conflict
from llama_stack_provider_moe.host import exports, views
from llama_stack_provider_moe.jobs import checkpoint_index
from llama_stack_provider_moe.jobs.store import Job


def must_have_saved(job: Job) -> None:
    """Raise `Conflict` unless a job that ended can go on: from a whole checkpoint, or an export, which needs none."""
    if job.recipe == exports.RECIPE:
        return
    folder = views.folder_of(job)
    try:
        found = checkpoint_index.checkpoint_folders(folder, folder.read_spec()) if folder.spec.exists() else []
    except ValidationError:
        raise Conflict(f"job {job.id!r} can't be resumed: its spec.json is damaged; submit it again") from None
    reasons = []
    for path in found:
        why = checkpoint_index.verify(path)
        if why is None:
            return
        reasons.append(f"{path.name}: {why}")
    told = f"none of its checkpoints is whole ({'; '.join(reasons[:3])})" if found else "it has saved no checkpoint"
    raise Conflict(f"job {job.id!r} can't be resumed: {told}; submit it again")
