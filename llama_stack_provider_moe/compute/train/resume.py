"""Which checkpoint a later start of a job resumes from.

Transformers' `resume_from_checkpoint` restores optimiser, schedule, step and random state. We restore the weights
(`models.saved_weights`), and what transformers does not save about a run (`RunState`).
"""

import shutil
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field, ValidationError

from llama_stack_provider_moe.compute.data.sampling import rows_a_step
from llama_stack_provider_moe.compute.runtime.context import AnySession
from llama_stack_provider_moe.compute.runtime.mirroring import bring_back, require_here
from llama_stack_provider_moe.errors import CheckpointError
from llama_stack_provider_moe.ground.counting import number_of
from llama_stack_provider_moe.jobdir.attempt import require_current
from llama_stack_provider_moe.jobdir.checkpoint_index import checkpoint_folders, read_checksums, verify
from llama_stack_provider_moe.jobdir.events import Resumed
from llama_stack_provider_moe.jobdir.folder import Artifact, write_atomic
from llama_stack_provider_moe.jobdir.reading import read_as
from llama_stack_provider_moe.jobdir.scan import saved_artifacts
from llama_stack_provider_moe.spec import Block

RUN_STATE = "run_state.json"
DAMAGED = ".damaged"


class RunState(Block):
    """The state of a run beside what transformers saves; it is in every checkpoint."""

    train_seconds: float = Field(default=0.0, ge=0, description="Seconds of training, over all starts so far.")
    epoch_losses: list[float] = Field(default_factory=list, description="Losses of the steps of the current epoch.")
    last: dict[str, float] = Field(default_factory=dict, description="Metrics of the last step.")
    held_out: dict[str, float] = Field(default_factory=dict, description="Figures of the last evaluation.")
    rows_a_step: int | None = Field(
        default=None, description="Rows of one step, over all processes; None: an older version wrote the checkpoint."
    )


@dataclass(frozen=True)
class Resume:
    """A checkpoint to resume from."""

    folder: Path
    step: int
    state: RunState
    artifacts: tuple[Artifact, ...]  # checkpoints of this step or before, oldest first


def write_run_state(folder: Path, state: RunState) -> None:
    """Write `state` into a checkpoint's folder."""
    write_atomic(folder / RUN_STATE, state)


def find_resume(session: AnySession) -> Resume | None:
    """Find the latest undamaged checkpoint of the job, and write to its events where it resumes.

    A damaged checkpoint is renamed, so that nothing uses it. Then the one before it is tried, unless a mirror has a
    copy.
    """
    latest = _latest_whole(session)
    if bring_back(session):
        latest = _latest_whole(session)
    found = None if latest is None else _read(session, latest)
    if found is not None or session.started_before:
        name = None if found is None else found.folder.name
        session.events.append(Resumed(step=0 if found is None else found.step, checkpoint=name))
        session.show(f"resuming from {name}" if name else "starting from the beginning: there is no checkpoint")
    return found


def _latest_whole(session: AnySession) -> Path | None:
    for folder in checkpoint_folders(session.folder, session.spec):
        require_current()
        wrong = verify(folder)
        if wrong is None:
            return folder
        session.say(
            f"checkpoint {folder.name} is damaged: {wrong}; it was renamed to {folder.name}{DAMAGED}", "warning"
        )
        shutil.rmtree(folder.with_name(folder.name + DAMAGED), ignore_errors=True)
        folder.rename(folder.with_name(folder.name + DAMAGED))
    return None


def agreed_resume(session: AnySession) -> Resume | None:
    """`find_resume` by rank 0, with checks in all processes.

    Raises:
        CheckpointError: a process does not see the checkpoint, or its steps have another number of rows.
    """
    resume = session.peers.agreed(find_resume(session) if session.peers.leads else None)
    if resume is not None:
        require_here(session, resume.folder)
    require_same_step(session, resume)
    return resume


def require_same_step(session: AnySession, resume: Resume | None) -> None:
    """Refuse a checkpoint whose steps had another number of rows, because its position in the data would be wrong.

    Raises:
        CheckpointError: the numbers differ.
    """
    here = rows_a_step(session.spec.training, session.peers.size)
    there = here if resume is None else resume.state.rows_a_step
    if there is not None and there != here:
        assert resume is not None
        processes = number_of(session.peers.size, "process", "processes")
        raise CheckpointError(
            f"{resume.folder.name} has steps of {there} rows, and this start has steps of {here}: "
            f"training.batch_size x gradient_accumulation_steps x {processes}; expected {there}"
        )


def lacks_random_state(session: AnySession, resume: Resume | None) -> bool:
    """Whether a checkpoint has no random state for this process, because the number of processes changed; it warns."""
    name = "rng_state.pth" if session.peers.size == 1 else f"rng_state_{session.peers.rank}.pth"
    if resume is None or (resume.folder / name).is_file():
        return False
    session.say(
        f"{resume.folder.name} was written with a different number of processes: dropout and router noise, if any, "
        "start from new random states",
        "warning",
    )
    return True


def _read(session: AnySession, folder: Path) -> Resume:
    sums = read_checksums(folder)
    assert sums is not None, "it was verified"
    try:
        state = read_as(RunState, (folder / RUN_STATE).read_bytes())
    except (OSError, ValidationError) as error:
        raise CheckpointError(f"{folder / RUN_STATE} is undamaged, but can't be read: {error}") from error
    # A start that wrote its final artifacts writes them again, so only checkpoints count.
    artifacts = tuple(
        artifact
        for artifact in saved_artifacts(session.folder)
        if artifact.step <= sums.step and artifact.kind == "checkpoint"
    )
    return Resume(folder, sums.step, state, artifacts)
