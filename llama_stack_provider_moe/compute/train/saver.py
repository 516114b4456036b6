"""When checkpoints are written, which ones are kept, and when a run ends before its last step.

A checkpoint is written at the end of each epoch, after `autosave_minutes` without one, when the time budget is spent,
and when the job is asked to stop. It is complete on disk before its evaluation starts, which may take long. If an
evaluation is interrupted, it runs again when the job is resumed.
"""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NoReturn

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from llama_stack_provider_moe.compute.runtime.context import AnySession, Stopped
from llama_stack_provider_moe.compute.runtime.mirroring import STOP_S, Mirroring
from llama_stack_provider_moe.compute.train.checkpoints import describe, publish, remove
from llama_stack_provider_moe.compute.train.reporter import Reporter
from llama_stack_provider_moe.compute.train.resume import Resume, write_run_state
from llama_stack_provider_moe.jobdir.events import Saved, StoppedBy
from llama_stack_provider_moe.jobdir.folder import Artifact, Metrics

if TYPE_CHECKING:
    from llama_stack_provider_moe.compute.train.trainer import RecordingTrainer

Cause = Literal["autosave", "budget", "recipe", "stop", "epoch"]
# If several apply at one step, the last one here counts.
CLOCKS: tuple[Cause | None, ...] = (None, "autosave", "budget", "recipe", "stop")


class NothingLeftToTrain(Exception):
    """The run was resumed at its end, so there is nothing left to train."""


class Interrupted(BaseException):
    """A request to stop came in all processes before a step has learnt anything: the state is the last step's.

    Not an `Exception`, for the reason that `Stopped` is none.
    """


class Saver(TrainerCallback):
    """Asks the trainer for checkpoints and gives them their names.

    Args:
        session: the job's.
        trainer: the recipe's.
        reporter: has the figures that go into a checkpoint.
        resume: the checkpoint that this start resumes from, if any.
    """

    def __init__(
        self, session: AnySession, trainer: "RecordingTrainer", reporter: Reporter, resume: Resume | None
    ) -> None:
        self._session = session
        self._trainer = trainer
        self._reporter = reporter
        self._resume = resume
        self.mirroring = Mirroring(session)
        self._cause: Cause = "epoch"
        self._saved_s = 0.0  # time.monotonic() of the newest checkpoint
        self.artifacts: list[Artifact] = [] if resume is None else list(resume.artifacts)
        self.stopped_by: StoppedBy | None = None

    @property
    def best(self) -> Artifact | None:
        """The checkpoint with the lowest held-out loss; the earliest of equal ones."""
        measured = [artifact for artifact in self.artifacts if artifact.metrics is not None]
        return min(measured, key=_held_out, default=None)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        """Start the clocks, and finish what an earlier start did not: copies, an evaluation, early stopping."""
        self._saved_s = time.monotonic()
        for artifact in self.artifacts:
            self.mirroring.keep(artifact)
        if self._resume is None or not _at_epoch_end(state):
            return
        here = self._resume.folder
        if self._trainer.eval_dataset is not None and not any(
            artifact.metrics for artifact in self.artifacts if Path(artifact.path) == here
        ):
            self.artifacts = [artifact for artifact in self.artifacts if Path(artifact.path) != here]
            self._evaluate_and_record(here, state)
        self._stop_if_no_better(round(state.epoch))
        if self.stopped_by is not None:
            raise NothingLeftToTrain

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> TrainerControl:
        """Check for a request to stop, and the clocks. `on_epoch_end` does it for an epoch's last step."""
        if not _at_epoch_end(state):
            self._ask(control, None)
        return control

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> TrainerControl:
        """Ask for the epoch's checkpoint, unless the run ends within the epoch."""
        if self.stopped_by is None:
            self._ask(control, "epoch")
        return control

    def _ask(self, control: TrainerControl, otherwise: Cause | None) -> None:
        # All processes must act at one step, but their clocks differ, and a signal reaches them at different steps.
        cause = CLOCKS[int(self._session.peers.maximum(CLOCKS.index(self._due())))]
        if cause in (None, "autosave") and otherwise is not None:
            cause = otherwise
        if cause is not None:
            self._cause = cause
            control.should_save = True

    def _due(self) -> Cause | None:
        """Why this process would save now, if at all; only rank 0's clocks count."""
        options = self._session.spec.options
        if self._session.stop.requested:
            return "stop"
        if self._trainer.ended_by is not None:
            return "recipe"
        if not self._session.peers.leads:
            return None
        if options.max_hours is not None and self._reporter.train_seconds() >= options.max_hours * 3600:
            return "budget"
        if time.monotonic() - self._saved_s >= options.autosave_minutes * 60:
            return "autosave"
        return None

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> TrainerControl:
        """The trainer has written a checkpoint: name, evaluate and record it; then end the run if it is time."""
        cause = self._cause
        name = f"epoch-{round(state.epoch)}" if _at_epoch_end(state) else f"step-{state.global_step}"
        written = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        folder = self._session.folder.checkpoints(self._session.spec) / name
        self._session.peers.wait()  # until each process has written its random state
        if self._session.peers.leads:
            write_run_state(written, self._reporter.run_state())
            publish(written, folder, state.global_step)
        self._session.peers.wait()
        self._saved_s = time.monotonic()
        if cause in ("epoch", "budget", "recipe") and self._trainer.eval_dataset is not None:
            self._evaluate_and_record(folder, state)
        else:
            self._record(folder, state, None)
        self._prune()
        if cause == "stop":
            self.mirroring.finish(STOP_S)
            raise Stopped(state.global_step)
        if cause == "budget":
            self.stopped_by = "time_budget"
            self._session.say(
                f"options.max_hours: the job has trained for {self._session.spec.options.max_hours:g} h; stopping"
            )
        if cause == "recipe":
            self.stopped_by = self._trainer.ended_by
        if cause == "epoch":
            self._stop_if_no_better(round(state.epoch))
        control.should_training_stop |= self.stopped_by is not None
        return control

    def save_last_step(self) -> None:
        """Write a checkpoint of the last step after a kernel failed in the next one; only in a single process."""
        self._cause = "autosave"
        self._trainer.write_checkpoint()
        self.on_save(self._trainer.args, self._trainer.state, self._trainer.control)
        self.mirroring.finish(STOP_S)

    def stop_at_last_step(self) -> NoReturn:
        """Save the last step, if no checkpoint has it, after a request to stop `Interrupted` the next one.

        Raises:
            Stopped: always.
        """
        step = self._trainer.state.global_step
        if step > max((artifact.step for artifact in self.artifacts), default=0):
            self._cause = "stop"
            self._trainer.write_checkpoint()
            self.on_save(self._trainer.args, self._trainer.state, self._trainer.control)
        self.mirroring.finish(STOP_S)
        raise Stopped(step)

    def _stop_if_no_better(self, epoch: int) -> None:
        patience, best = self._session.spec.options.early_stopping_patience, self.best
        if patience is None or best is None or best.metrics is None or epoch - best.metrics.epoch < patience:
            return
        self.stopped_by = "early_stopping"
        self._session.say(
            f"options.early_stopping_patience: no lower held-out loss since epoch {best.metrics.epoch} "
            f"({best.metrics.validation_loss:.4f}); stopping"
        )

    def _evaluate_and_record(self, folder: Path, state: TrainerState) -> None:
        metrics: Metrics | None = None
        try:
            figures = self._reporter.evaluate()
            metrics = Metrics(
                epoch=round(state.epoch),
                train_loss=self._reporter.train_loss(),
                validation_loss=figures["validation_loss"],
                perplexity=figures["perplexity"],
            )
        finally:
            self._record(folder, state, metrics)

    def _record(self, folder: Path, state: TrainerState, metrics: Metrics | None) -> None:
        made = self._session.peers.agreed(
            describe(self._session.job_uuid, "checkpoint", folder, int(state.epoch), state.global_step, metrics)
        )
        self.artifacts.append(made)
        self.mirroring.keep(made)
        self._session.events.append(Saved(artifact=made.model_dump(mode="json")))

    def _prune(self) -> None:
        """Keep the last few and the best of the epochs' checkpoints, and the newest one; delete the others."""
        epochs = [artifact for artifact in self.artifacts if Path(artifact.path).name.startswith("epoch-")]
        kept = {artifact.path for artifact in epochs[-self._session.spec.options.keep_checkpoints :]}
        kept.add(self.artifacts[-1].path)
        if (best := self.best) is not None:
            kept.add(best.path)
        for artifact in self.artifacts:
            if artifact.path not in kept and self._session.peers.leads:
                remove(Path(artifact.path))
                self.mirroring.forget(Path(artifact.path))
        self.artifacts = [artifact for artifact in self.artifacts if artifact.path in kept]


def _at_epoch_end(state: TrainerState) -> bool:
    steps_per_epoch: int = state.max_steps // state.num_train_epochs
    return bool(state.global_step % steps_per_epoch == 0)


def _held_out(artifact: Artifact) -> float:
    assert artifact.metrics is not None
    return artifact.metrics.validation_loss
