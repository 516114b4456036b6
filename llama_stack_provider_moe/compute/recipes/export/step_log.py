"""Steps of a job that succeed or fail independently. Their states are saved, so the next start runs what is not done.

A step writes under a hidden name and renames the complete result, so a killed process leaves nothing that is listed.
The file of the states (`JobFolder.exports`) is replaced as a whole at each change.
"""

import errno
import shutil
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from llama_stack_provider_moe.compute.runtime.context import Session
from llama_stack_provider_moe.compute.train.checkpoints import remove
from llama_stack_provider_moe.errors import ExportError, MoeError
from llama_stack_provider_moe.jobdir.attempt import require_current
from llama_stack_provider_moe.jobdir.checkpoint_index import verify_files
from llama_stack_provider_moe.jobdir.events import Export, Saved, now
from llama_stack_provider_moe.jobdir.export_steps import ExportStep, ExportSteps, StepState, read_steps
from llama_stack_provider_moe.jobdir.folder import Artifact, JobFolder, write_atomic
from llama_stack_provider_moe.spec import ExportSpec

_REASON_LIMIT = 600  # characters; a job's reason names several


Figures = dict[str, Any]  # measurements of a step, for JSON


class Done(NamedTuple):
    """The result of a step.

    Attributes:
        artifact: listed from now on.
        note: what was done, for the user.
        figures: what was measured.
    """

    artifact: Artifact | None = None
    note: str | None = None
    figures: Figures | None = None


class Skipped(ExportError):
    """A step raises this if it can't run and that is not an error. Other steps run, and the job does not fail.

    The text says why.
    """


@dataclass(frozen=True)
class PlannedStep:
    """One step.

    Attributes:
        name: the step's.
        run: does the step, also where an earlier start did a part of it.
        needs: steps that must be completed before.
        leaves: folders with checksums that are there once the step is completed.
        lasts: whether they stay; else they are deleted once all steps that need them are completed.
    """

    name: str
    run: Callable[[], Done]
    needs: Sequence[str] = ()
    leaves: Sequence[Path] = field(default=())
    lasts: bool = True


class Steps:
    """The steps of one job, in order. Steps that an earlier start completed stay completed.

    Args:
        session: the job's.
        steps: each after those that it needs.
    """

    def __init__(self, session: Session[ExportSpec], steps: Sequence[PlannedStep]) -> None:
        self._session = session
        self._steps = steps
        earlier = {each.name: each for each in read_steps(session.folder)}
        found: dict[str, ExportStep] = {}
        for step in reversed(steps):  # in reverse, because steps that need this one decide
            is_needed = any(step.name in each.needs and not _is_done(found[each.name]) for each in steps)
            found[step.name] = self._taken_up(step, earlier.get(step.name), is_needed)
        self._states = [found[step.name] for step in steps]
        self._write()

    def _taken_up(self, step: PlannedStep, earlier: ExportStep | None, is_needed: bool) -> ExportStep:
        if earlier is None or not _is_done(earlier):
            return ExportStep(name=step.name)
        if not (step.lasts or is_needed):
            return earlier
        for folder in step.leaves:
            why = verify_files(folder, deep=False)
            if why is not None:
                self._session.say(f"{step.name}: making {folder.name} again: {why}", "warning")
                return ExportStep(name=step.name)
        return earlier

    @property
    def states(self) -> list[ExportStep]:
        """The steps' states."""
        return self._states

    @property
    def undone(self) -> list[str]:
        """Names of the steps that are not completed."""
        return [state.name for state in self._states if not _is_done(state)]

    def run(self) -> list[Artifact]:
        """Run the steps that are not completed, and return their artifacts.

        Raises:
            ExportError: some steps failed, after all others ran. The text names them.
        """
        made = []
        for number, step in enumerate(self._steps):
            if not _is_done(self._states[number]):
                made += self._one(number, step)
        self._raise_for_failures()
        return made

    def _one(self, number: int, step: PlannedStep) -> list[Artifact]:
        by_name = {each.name: each for each in self._states}
        missing = [name for name in step.needs if not _is_done(by_name[name])]
        if missing:
            self._set(number, StepState.SKIPPED, reason=f"needs {', '.join(missing)}, which did not complete")
            return []
        self._set(number, StepState.IN_PROGRESS)
        try:
            for folder in step.leaves:  # an earlier start left it damaged or unlisted
                remove(folder)
            done = step.run()
        except Skipped as skipped:
            self._set(number, StepState.SKIPPED, reason=str(skipped)[:_REASON_LIMIT])
            return []
        except Exception as error:  # noqa: BLE001  no error of a step may stop the others
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
        reasons = "; ".join(f"{each.name}: {each.reason}" for each in failed)
        undone = [each.name for each in self._states if each.state is StepState.SKIPPED]
        more = f"; so {', '.join(undone)} could not be made" if undone else ""
        raise ExportError(
            f"{len(failed)} of {len(self._states)} steps failed: {reasons}{more}. The others are completed; "
            "resume the job to try again"
        )


def clear_unfinished(folder: JobFolder) -> None:
    """Delete unfinished files of an earlier start that was killed."""
    require_current()
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
