"""Steps of a job that stand or fall each for itself, written down so that the next start takes up what is not done.

A step writes under a hidden name and renames what is whole, so a process that is killed leaves nothing that is listed;
the file of the states (`JobFolder.exports`) is replaced whole at each change.
"""

import errno
import shutil
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from llama_stack_provider_moe.errors import ExportError, MoeError
from llama_stack_provider_moe.jobs.checkpoint_index import verify_files
from llama_stack_provider_moe.jobs.events import Export, Saved, now
from llama_stack_provider_moe.jobs.exports import ExportStep, ExportSteps, StepState, read_steps
from llama_stack_provider_moe.jobs.folder import Artifact, JobFolder, write_atomic
from llama_stack_provider_moe.spec import ExportSpec
from llama_stack_provider_moe.training.checkpoints import remove
from llama_stack_provider_moe.training.session import Session

_REASON_LIMIT = 600  # characters; a job's reason names several


class Done(NamedTuple):
    """What a step leaves.

    Attributes:
        artifact: that is listed from now on.
        note: what was done, for a person.
        figures: what was measured.
    """

    artifact: Artifact | None = None
    note: str | None = None
    figures: dict[str, Any] | None = None


class Skipped(ExportError):
    """A step for which something is missing that nobody can be blamed for; others go on, and it does not fail the job.

    Raised in a step; its text says why.
    """


@dataclass(frozen=True)
class Step:
    """One thing to do.

    Attributes:
        name: its own.
        run: does it; also where an earlier start did a part of it.
        needs: steps that must be completed before.
        leaves: folders that are there when it is completed, each with its checksums.
        lasts: else what it leaves is gone, once all that need it are completed.
    """

    name: str
    run: Callable[[], Done]
    needs: Sequence[str] = ()
    leaves: Sequence[Path] = field(default=())
    lasts: bool = True


class Steps:
    """The steps of one job, in their order; those of an earlier start that are completed stay so.

    Args:
        session: of the job.
        steps: each after those that it needs.
    """

    def __init__(self, session: Session[ExportSpec], steps: Sequence[Step]) -> None:
        self._session = session
        self._steps = steps
        earlier = {each.name: each for each in read_steps(session.folder)}
        found: dict[str, ExportStep] = {}
        for step in reversed(steps):  # those that need it are known before it
            is_needed = any(step.name in each.needs and not _is_done(found[each.name]) for each in steps)
            found[step.name] = self._taken_up(step, earlier.get(step.name), is_needed)
        self._states = [found[step.name] for step in steps]
        self._write()

    def _taken_up(self, step: Step, earlier: ExportStep | None, is_needed: bool) -> ExportStep:
        if earlier is None or not _is_done(earlier):
            return ExportStep(name=step.name)
        if not (step.lasts or is_needed):
            return earlier
        for folder in step.leaves:
            why = verify_files(folder, deep=False)
            if why is not None:
                self._session.say(f"{step.name}: {folder.name} is made again: {why}", "warning")
                return ExportStep(name=step.name)
        return earlier

    @property
    def states(self) -> list[ExportStep]:
        """How they stand."""
        return self._states

    @property
    def undone(self) -> list[str]:
        """Names of those that are not completed."""
        return [state.name for state in self._states if not _is_done(state)]

    def run(self) -> list[Artifact]:
        """Do what is not completed; what this start's steps left.

        Raises:
            ExportError: some failed; it names them. All others have been done by then.
        """
        made = []
        for number, step in enumerate(self._steps):
            if not _is_done(self._states[number]):
                made += self._one(number, step)
        self._raise_for_failures()
        return made

    def _one(self, number: int, step: Step) -> list[Artifact]:
        by_name = {each.name: each for each in self._states}
        missing = [name for name in step.needs if not _is_done(by_name[name])]
        if missing:
            self._set(number, StepState.SKIPPED, reason=f"needs {', '.join(missing)}, which did not complete")
            return []
        self._set(number, StepState.IN_PROGRESS)
        try:
            for folder in step.leaves:  # of an earlier start: damaged, or not told of
                remove(folder)
            done = step.run()
        except Skipped as skipped:
            self._set(number, StepState.SKIPPED, reason=str(skipped)[:_REASON_LIMIT])
            return []
        except Exception as error:  # noqa: BLE001  one that fails must leave the others alone, whatever it is
            traceback.print_exc()
            self._set(number, StepState.FAILED, reason=_reason(error)[:_REASON_LIMIT])
            return []
        except BaseException:  # asked to stop
            self._set(number, StepState.SCHEDULED)
            raise
        if done.artifact is not None:
            self._session.events.append(Saved(artifact=done.artifact.model_dump(mode="json")))
        self._set(number, StepState.COMPLETED, done=done)
        return [] if done.artifact is None else [done.artifact]

    def _set(self, number: int, state: StepState, reason: str | None = None, done: Done | None = None) -> None:
        old = self._states[number]
        begins = state in (StepState.IN_PROGRESS, StepState.SCHEDULED)
        artifact = None if done is None or done.artifact is None else done.artifact.identifier
        self._states[number] = ExportStep(
            name=old.name,
            state=state,
            started_at=now() if state is StepState.IN_PROGRESS else None if begins else old.started_at,
            ended_at=None if begins else now(),
            reason=reason,
            note=None if done is None else done.note,
            artifact=artifact,
            figures=None if done is None else done.figures,
        )
        self._write()
        self._session.events.append(Export(step=old.name, state=state.value, reason=reason))
        note = reason or (done.note if done is not None else None)
        print(f"{old.name:<12} {state.value}{f': {note}' if note else ''}", flush=True)

    def _write(self) -> None:
        write_atomic(self._session.folder.exports, ExportSteps(steps=self._states))

    def _raise_for_failures(self) -> None:
        failed = [each for each in self._states if each.state is StepState.FAILED]
        if not failed:
            return
        told = "; ".join(f"{each.name}: {each.reason}" for each in failed)
        undone = [each.name for each in self._states if each.state is StepState.SKIPPED]
        more = f"; so {', '.join(undone)} could not be made" if undone else ""
        raise ExportError(
            f"{len(failed)} of {len(self._states)} steps failed: {told}{more}. The others are done and stay; "
            "resume the job to try again"
        )


def clear_unfinished(folder: JobFolder) -> None:
    """Delete what an earlier start of the job was writing when it was killed."""
    for place in (folder.artifacts, folder.work):
        if place.is_dir():
            for path in place.iterdir():
                if path.name.startswith("."):
                    shutil.rmtree(path) if path.is_dir() else path.unlink()


def _is_done(step: ExportStep) -> bool:
    return step.state is StepState.COMPLETED


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return f"the disk is full ({error})"
    return str(error) if isinstance(error, MoeError) else f"{type(error).__name__}: {error}"
