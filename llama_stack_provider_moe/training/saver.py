"""Checkpoints, when they are made and which are kept; and every reason to end a run before its last step.

A checkpoint is written at each epoch's end, after `autosave_minutes` without one, when the time budget is spent and
when the job is asked to stop. It is whole on disk before its evaluation, which may take long, begins; an evaluation
that did not get to its end is made up for when the run goes on.
"""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from transformers import TrainerCallback

from llama_stack_provider_moe.jobs.events import Saved, StoppedBy
from llama_stack_provider_moe.jobs.folder import Artifact, Metrics
from llama_stack_provider_moe.training.callbacks import Reporter
from llama_stack_provider_moe.training.checkpoints import describe, publish, remove
from llama_stack_provider_moe.training.mirroring import STOP_S, Mirroring
from llama_stack_provider_moe.training.resume import Resume, write_run_state
from llama_stack_provider_moe.training.session import AnySession, Stopped

if TYPE_CHECKING:
    from llama_stack_provider_moe.training.trainer import RecordingTrainer

Cause = Literal["autosave", "budget", "stop", "epoch"]
# Of causes at one step the last one here that holds counts.
CLOCKS: tuple[Cause | None, ...] = (None, "autosave", "budget", "stop")


class Enough(Exception):
    """A run that goes on from its end: there is nothing left to train."""


class Saver(TrainerCallback):
    """Asks the trainer for checkpoints and gives them their names.

    Args:
        session: of the job.
        trainer: that trains.
        reporter: whose figures a checkpoint carries.
        resume: what this start goes on from.
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
        """The checkpoint with the lowest held-out loss, the earlier one of two that are equal."""
        measured = [artifact for artifact in self.artifacts if artifact.metrics is not None]
        return min(measured, key=_held_out, default=None)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start the clocks; make up for what an earlier start saved and had no time to copy, evaluate, or act on."""
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
            self._measure_and_tell(here, state)
        self._stop_if_no_better(round(state.epoch))
        if self.stopped_by is not None:
            raise Enough

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        """Hear the wish to stop, and the clocks. An epoch's last step is followed by the epoch's end at once."""
        if not _at_epoch_end(state):
            self._ask(control, None)
        return control

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        """Ask for the epoch's checkpoint, unless the run has just ended within it."""
        if self.stopped_by is None:
            self._ask(control, "epoch")
        return control

    def _ask(self, control: Any, otherwise: Cause | None) -> None:
        # One step for all processes: their clocks differ, and a signal reaches them at different steps.
        cause = CLOCKS[int(self._session.peers.most(CLOCKS.index(self._due())))]
        if cause in (None, "autosave") and otherwise is not None:
            cause = otherwise
        if cause is not None:
            self._cause = cause
            control.should_save = True

    def _due(self) -> Cause | None:
        """What this process would save for now; only rank 0's clocks count."""
        options = self._session.spec.options
        if self._session.stop.requested:
            return "stop"
        if not self._session.peers.leads:
            return None
        if options.max_hours is not None and self._reporter.train_seconds() >= options.max_hours * 3600:
            return "budget"
        if time.monotonic() - self._saved_s >= options.autosave_minutes * 60:
            return "autosave"
        return None

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        """The trainer has written everything: give it its name, evaluate, tell; then end the run where that is due."""
        cause = self._cause
        name = f"epoch-{round(state.epoch)}" if _at_epoch_end(state) else f"step-{state.global_step}"
        written = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        folder = self._session.folder.checkpoints(self._session.spec) / name
        self._session.peers.wait()  # each process has written its random state
        if self._session.peers.leads:
            write_run_state(written, self._reporter.run_state())
            publish(written, folder, state.global_step)
        self._session.peers.wait()
        self._saved_s = time.monotonic()
        if cause in ("epoch", "budget") and self._trainer.eval_dataset is not None:
            self._measure_and_tell(folder, state)
        else:
            self._tell(folder, state, None)
        self._prune()
        if cause == "stop":
            self.mirroring.finish(STOP_S)
            raise Stopped(state.global_step)
        if cause == "budget":
            self.stopped_by = "time_budget"
            self._session.say(f"options.max_hours: {self._session.spec.options.max_hours:g} h are spent; stopping")
        if cause == "epoch":
            self._stop_if_no_better(round(state.epoch))
        control.should_training_stop |= self.stopped_by is not None
        return control

    def _stop_if_no_better(self, epoch: int) -> None:
        patience, best = self._session.spec.options.early_stopping_patience, self.best
        if patience is None or best is None or best.metrics is None or epoch - best.metrics.epoch < patience:
            return
        self.stopped_by = "early_stopping"
        self._session.say(
            f"options.early_stopping_patience: no lower held-out loss since epoch {best.metrics.epoch} "
            f"({best.metrics.validation_loss:.4f}); stopping"
        )

    def _measure_and_tell(self, folder: Path, state: Any) -> None:
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
            self._tell(folder, state, metrics)

    def _tell(self, folder: Path, state: Any, metrics: Metrics | None) -> None:
        made = self._session.peers.agreed(
            describe(self._session.job_uuid, "checkpoint", folder, int(state.epoch), state.global_step, metrics)
        )
        self.artifacts.append(made)
        self.mirroring.keep(made)
        self._session.events.append(Saved(artifact=made.model_dump(mode="json")))

    def _prune(self) -> None:
        """Of the epochs' checkpoints the last few and the best stay; another one stays while it is the newest."""
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


def _at_epoch_end(state: Any) -> bool:
    steps_per_epoch: int = state.max_steps // state.num_train_epochs
    return bool(state.global_step % steps_per_epoch == 0)


def _held_out(artifact: Artifact) -> float:
    assert artifact.metrics is not None
    return artifact.metrics.validation_loss
