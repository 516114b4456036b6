"""The run as events: every step, every router, every evaluation, every checkpoint; and the wish to stop, heard.

Two callbacks. `Reporter` writes what happens and ends a run whose numbers are no numbers. `Saver` makes a checkpoint
at each epoch's end (and on a stop), then evaluates: the checkpoint is whole on disk before the evaluation, which may
take long, begins.
"""

import math
import resource
import sys
import time
from collections import deque
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback

from llama_stack_provider_moe.errors import TrainingError
from llama_stack_provider_moe.jobs.events import Evaluation, LayerRouting, Routing, Saved, Step
from llama_stack_provider_moe.jobs.folder import Artifact, Metrics
from llama_stack_provider_moe.training.checkpoints import describe, publish
from llama_stack_provider_moe.training.session import AnySession, Stopped

if TYPE_CHECKING:
    from llama_stack_provider_moe.training.trainer import RecordingTrainer

# What TRL and transformers log that is bookkeeping and no metric of a step.
NOT_METRICS = frozenset({"epoch", "num_tokens", "step", "total_flos"})
WINDOW = 50  # steps that the estimate of the remaining time looks back on


class Reporter(TrainerCallback):
    """Events of steps, routers and evaluations."""

    def __init__(self, session: AnySession, trainer: "RecordingTrainer") -> None:
        self._session = session
        self._trainer = trainer
        self._durations_s: deque[float] = deque(maxlen=WINDOW)
        self._began_s = 0.0
        self._tokens_before = 0.0
        self._epoch_losses: list[float] = []
        self.last: dict[str, float] = {}
        self.held_out: dict[str, float] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """From here on a wish to stop waits for the step's end; then the untouched model's figures."""
        self._session.stop.between_steps()
        if self._session.spec.options.eval_before_training and self._trainer.eval_dataset is not None:
            self.evaluate()

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """A fresh mean of the training loss."""
        self._epoch_losses.clear()

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start the step's clock."""
        self._began_s = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Stop the clock."""
        self._durations_s.append(time.perf_counter() - self._began_s)

    def on_prediction_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """An evaluation is given up at once: what it would follow is saved already."""
        if self._session.stop.requested:
            raise Stopped(state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        """One optimiser step."""
        if logs is None or "loss" not in logs:
            return
        metrics = {name: float(value) for name, value in logs.items() if name not in NOT_METRICS}
        self._refuse_nonsense(metrics, state.global_step)
        metrics.update(self._speed(logs), memory_bytes=float(peak_memory_bytes(args.device)))
        metrics.update(self._bare_loss(metrics))
        self._epoch_losses.append(metrics[self.bare_name])
        self.last = metrics
        left = state.max_steps - state.global_step
        step = Step(
            step=state.global_step,
            max_steps=state.max_steps,
            epoch=state.epoch,
            metrics=metrics,
            eta_s=left * sum(self._durations_s) / len(self._durations_s),
        )
        self._session.events.append(step)
        print(_line(step), flush=True)
        recorder = self._trainer.recorder
        if recorder is not None:
            layers = [LayerRouting.model_validate(asdict(layer)) for layer in recorder.take()]
            self._session.events.append(Routing(step=state.global_step, layers=layers))

    @property
    def bare_name(self) -> str:
        """Name of the loss without balance terms, the one that held-out loss compares with."""
        return "ce" if self._session.spec.recipe == "sft" else "preference_loss"

    def train_loss(self) -> float:
        """Mean of that loss over the steps of this epoch."""
        return sum(self._epoch_losses) / len(self._epoch_losses)

    def evaluate(self) -> dict[str, float]:
        """Evaluate now, write it, and give the figures by their names without `eval_`."""
        metrics = self._trainer.evaluate()
        speed = ("runtime", "per_second", "preparation_time")
        figures = {
            name.removeprefix("eval_"): float(value) for name, value in metrics.items() if not name.endswith(speed)
        }
        figures = {name: value for name, value in figures.items() if name not in {*NOT_METRICS, "loss"}}
        self.held_out = figures
        state = self._trainer.state
        self._session.events.append(Evaluation(step=state.global_step, epoch=state.epoch or 0.0, metrics=figures))
        shown = " ".join(f"{name} {value:.4g}" for name, value in sorted(figures.items()))
        print(f"held out after step {state.global_step}: {shown}", flush=True)
        return figures

    def _bare_loss(self, metrics: dict[str, float]) -> dict[str, float]:
        resolved = self._trainer.resolved
        balance = resolved.aux_coef * metrics.get("aux_loss", 0.0) + resolved.z_coef * metrics.get("router_z_loss", 0.0)
        return {self.bare_name: metrics["loss"] - balance}

    def _speed(self, logs: dict[str, float]) -> dict[str, float]:
        tokens = logs["num_tokens"] - self._tokens_before
        self._tokens_before = logs["num_tokens"]
        return {"tokens_per_s": tokens / max(self._durations_s[-1], 1e-9)}

    def _refuse_nonsense(self, metrics: dict[str, float], step: int) -> None:
        # fp16 scales its loss and skips the steps whose gradient overflows; there, an infinite norm is nothing wrong.
        watched = ("loss",) if self._session.spec.training.dtype == "fp16" else ("loss", "grad_norm")
        wrong = [f"{name} is {metrics[name]}" for name in watched if not math.isfinite(metrics[name])]
        if wrong:
            raise TrainingError(
                f"step {step}: {' and '.join(wrong)}; the run has diverged (last finite loss "
                f"{self.last.get('loss', math.nan):.4g}). Try a lower optimizer.lr, more optimizer.num_warmup_steps, a "
                "lower options.max_grad_norm, or training.dtype 'fp32'"
            )


class Saver(TrainerCallback):
    """Checkpoints, each followed by its evaluation."""

    def __init__(self, session: AnySession, trainer: "RecordingTrainer", reporter: Reporter) -> None:
        self._session = session
        self._trainer = trainer
        self._reporter = reporter
        self._name = ""
        self.artifacts: list[Artifact] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        """Hear the wish to stop."""
        if self._session.stop.requested:
            self._name = f"step-{state.global_step}"
            control.should_save = True
        return control

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        """Ask for the epoch's checkpoint."""
        self._name = f"epoch-{round(state.epoch)}"
        control.should_save = True
        return control

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The trainer has written everything: give it its name, evaluate, tell; on a stop, that was all."""
        stopping = self._name.startswith("step-")
        folder = self._session.folder.checkpoints(self._session.spec) / self._name
        publish(Path(args.output_dir) / f"checkpoint-{state.global_step}", folder)
        metrics: Metrics | None = None
        try:
            if not stopping and self._trainer.eval_dataset is not None:
                metrics = self._measure(round(state.epoch))
        finally:
            made = describe(self._session.job_uuid, "checkpoint", folder, int(state.epoch), state.global_step, metrics)
            self.artifacts.append(made)
            self._session.events.append(Saved(artifact=made.model_dump(mode="json")))
        if stopping:
            raise Stopped(state.global_step)

    def _measure(self, epoch: int) -> Metrics:
        figures = self._reporter.evaluate()
        return Metrics(
            epoch=epoch,
            train_loss=self._reporter.train_loss(),
            validation_loss=figures["validation_loss"],
            perplexity=figures["perplexity"],
        )


def peak_memory_bytes(device: torch.device) -> int:
    """Greatest memory so far: of this process's tensors on a GPU, of the process itself on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB


def _line(step: Step) -> str:
    first = ("loss", "ce", "preference_loss", "aux_loss", "router_z_loss", "rewards/accuracies", "rewards/margins")
    shown = [
        f"{name} {step.metrics[name]:.4g}" for name in (*first, "grad_norm", "learning_rate") if name in step.metrics
    ]
    eta = "" if step.eta_s is None else f" eta {step.eta_s:.0f} s"
    return f"step {step.step}/{step.max_steps} {' '.join(shown)}{eta}"
