"""Writes every step, router and evaluation as events, and ends a run whose loss or gradient is not finite."""

import math
import resource
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from llama_stack_provider_moe.compute.data.sampling import rows_a_step
from llama_stack_provider_moe.compute.planning.throughput import peak_flops
from llama_stack_provider_moe.compute.runtime.context import AnySession, Stopped
from llama_stack_provider_moe.compute.train.prepared import Batch
from llama_stack_provider_moe.compute.train.resume import Resume, RunState
from llama_stack_provider_moe.compute.train.routing_events import RoutingEvents
from llama_stack_provider_moe.compute.train.trackers import OpenTrackers
from llama_stack_provider_moe.errors import TrainingError
from llama_stack_provider_moe.ground import liveness
from llama_stack_provider_moe.jobdir.attempt import require_current
from llama_stack_provider_moe.jobdir.events import Evaluation, Routing, Step

if TYPE_CHECKING:
    from llama_stack_provider_moe.compute.train.trainer import RecordingTrainer

# TRL and transformers log these too, but they are not metrics of a step.
NOT_METRICS = frozenset({"epoch", "num_tokens", "step", "total_flos"})
WINDOW = 50  # the last steps, on which the estimate of the remaining time is based


class Reporter(TrainerCallback):
    """Writes events of steps, routers and evaluations.

    Args:
        session: the job's.
        trainer: the recipe's.
        trackers: get the figures too.
        resume: the checkpoint that this start resumes from, if any.
    """

    def __init__(
        self, session: AnySession, trainer: "RecordingTrainer", trackers: OpenTrackers, resume: Resume | None
    ) -> None:
        self._session = session
        self._trainer = trainer
        self._trackers = trackers
        before = RunState() if resume is None else resume.state
        self._durations_s: deque[float] = deque(maxlen=WINDOW)
        self._train_began_s = 0.0
        self._began_s = 0.0
        self._tokens_before = 0.0
        self._done: tuple[float, ...] = (0.0, 0.0, 0.0)  # tokens, operations, seconds of this start's steps
        device = trainer.args.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
        self._peak = peak_flops(name, session.spec.training.dtype)
        self._seconds_before = before.train_seconds
        self._epoch_losses = list(before.epoch_losses)
        self._fresh_start = resume is None
        self._within_epoch = resume is not None and not resume.folder.name.startswith("epoch-")
        self._batches: liveness.Counter | None = None  # of the evaluation that runs
        self._micro_batches: liveness.Counter | None = None  # of the training that runs
        every = trainer.steps_between_tables
        self._routing = None if every is None else RoutingEvents(every)
        self.last = dict(before.last)
        self.held_out = dict(before.held_out)

    @contextmanager
    def training(self) -> Iterator[None]:
        """Report training as a stage: one step of many micro-batches may take longer than the watchdog waits."""
        with liveness.stage("training", unit="micro-batches") as self._micro_batches:
            yield
        self._micro_batches = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        """From here on a request to stop waits for the step's end. Then evaluate the untrained model, if asked."""
        self._session.stop.between_steps(self._session.peers)
        self._train_began_s = time.monotonic()
        if (
            self._fresh_start
            and self._session.spec.options.eval_before_training
            and self._trainer.eval_dataset is not None
        ):
            self.evaluate()

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        """Start a new mean of the training loss, unless this start resumes within the epoch."""
        if not self._within_epoch:
            self._epoch_losses.clear()
        self._within_epoch = False

    def train_seconds(self) -> float:
        """Seconds of training, over all starts so far."""
        return self._seconds_before + time.monotonic() - self._train_began_s

    def run_state(self) -> RunState:
        """The state of this run that a checkpoint keeps."""
        return RunState(
            train_seconds=self.train_seconds(),
            epoch_losses=self._epoch_losses,
            last={name: value for name, value in self.last.items() if math.isfinite(value)},
            held_out=self.held_out,
            rows_a_step=rows_a_step(self._session.spec.training, self._session.peers.size),
        )

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        """Start the step's clock, if this process's attempt is still the current one."""
        require_current()
        if self._micro_batches is not None:
            a_step = args.gradient_accumulation_steps
            self._micro_batches.at(state.global_step * a_step, state.max_steps * a_step)
        self._began_s = time.perf_counter()

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        """Count a micro-batch."""
        if self._micro_batches is not None:
            self._micro_batches.advance()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        """Stop the clock, after the GPU has finished too."""
        if args.device.type == "cuda":
            torch.cuda.synchronize(args.device)
        self._durations_s.append(time.perf_counter() - self._began_s)
        if self._micro_batches is not None:
            self._micro_batches.at(state.global_step * args.gradient_accumulation_steps)

    def on_prediction_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        eval_dataloader: DataLoader[Batch] | None = None,
        **_: object,
    ) -> None:
        """Count an evaluated batch. A request to stop ends an evaluation at once: the checkpoint is already saved."""
        require_current()
        if self._batches is not None:
            self._batches.at(self._batches.work.done + 1, None if eval_dataloader is None else len(eval_dataloader))
        if self._session.peers.any(self._session.stop.requested):
            raise Stopped(state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: object,
    ) -> None:
        """Write an optimiser step."""
        if logs is None or "loss" not in logs:
            return
        metrics = {name: float(value) for name, value in logs.items() if name not in NOT_METRICS}
        self._require_finite(metrics, state.global_step)
        memory_bytes = self._session.peers.maximum(float(peak_memory_bytes(args.device)))
        metrics.update(self._speed(logs), memory_bytes=memory_bytes)
        metrics.update(self._bare_loss(metrics))
        self._epoch_losses.append(metrics[self._trainer.loss_name])
        self.last = metrics
        left = state.max_steps - state.global_step
        step = Step(
            step=state.global_step,
            max_steps=state.max_steps,
            epoch=state.epoch,
            metrics=metrics,
            eta_s=left * sum(self._durations_s) / len(self._durations_s),
        )
        self._write(step)
        liveness.heard()
        self._session.show(_line(step))
        if self._trainer.recorder is not None and self._routing is not None:
            sums = self._trainer.recorder.take_sums(self._trainer.part_names, self._trainer.total)
            is_kept = control.should_save or state.global_step % (state.max_steps // state.num_train_epochs) == 0
            self._write(self._routing.of_step(sums, state.global_step, is_kept))

    def train_loss(self) -> float:
        """Mean over this epoch's steps of the loss without balance terms."""
        return sum(self._epoch_losses) / len(self._epoch_losses)

    def evaluate(self) -> dict[str, float]:
        """Evaluate, write the figures, and return them by their names without `eval_`."""
        with liveness.stage("evaluating", unit="batches") as self._batches:
            metrics = self._trainer.evaluate()
        speed = ("runtime", "per_second", "preparation_time")
        figures = {
            name.removeprefix("eval_"): float(value) for name, value in metrics.items() if not name.endswith(speed)
        }
        figures = {name: value for name, value in figures.items() if name not in {*NOT_METRICS, "loss"}}
        self.held_out = figures
        state = self._trainer.state
        self._write(Evaluation(step=state.global_step, epoch=state.epoch or 0.0, metrics=figures))
        shown = " ".join(f"{name} {value:.4g}" for name, value in sorted(figures.items()))
        self._session.show(f"held out after step {state.global_step}: {shown}")
        return figures

    def _write(self, event: Step | Evaluation | Routing) -> None:
        self._session.events.append(event)
        self._trackers.log(event)

    def _bare_loss(self, metrics: dict[str, float]) -> dict[str, float]:
        # Measured, not computed from `loss`: else neither would show a wrong weight of a balance term.
        models_own = self._trainer.resolved.models_aux_coef * metrics.get("aux_loss", 0.0)
        return {self._trainer.loss_name: self._trainer.take_bare_loss() - models_own}

    def _speed(self, logs: dict[str, float]) -> dict[str, float]:
        tokens = logs["num_tokens"] - self._tokens_before
        self._tokens_before = logs["num_tokens"]
        done = (tokens, self._trainer.take_flops(), max(self._durations_s[-1], 1e-9))
        self._done = tuple(one + more for one, more in zip(self._done, done, strict=True))
        return {"tokens": tokens, "tokens_per_s": tokens / done[-1], **self._throughput(*done)}

    def _throughput(self, tokens: float, flops: float, seconds: float) -> dict[str, float]:
        devices = self._session.peers.size
        each = flops / seconds / devices
        of_peak = {} if self._peak is None else {"mfu": each / self._peak}
        return {"tokens_per_s_per_device": tokens / seconds / devices, "tflops_per_device": each / 1e12, **of_peak}

    def throughput(self) -> dict[str, float]:
        """Throughput over all steps of this start, by the names of the step metrics; empty if there were none."""
        return self._throughput(*self._done) if self._done[-1] else {}

    def _require_finite(self, metrics: dict[str, float], step: int) -> None:
        # With fp16 the loss is scaled, and steps whose gradient overflows are skipped, so an infinite norm is normal.
        watched = ("loss",) if self._session.spec.training.dtype == "fp16" else ("loss", "grad_norm")
        wrong = [f"{name} is {metrics[name]}" for name in watched if not math.isfinite(metrics[name])]
        if wrong:
            raise TrainingError(
                f"step {step}: {' and '.join(wrong)}; the run has diverged (last finite loss "
                f"{self.last.get('loss', math.nan):.4g}). Try a lower optimizer.lr, more optimizer.num_warmup_steps, a "
                "lower options.max_grad_norm, or training.dtype 'fp32'"
            )


def peak_memory_bytes(device: torch.device) -> int:
    """Peak memory so far: of this process's tensors on a GPU, of the process itself on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB


def _line(step: Step) -> str:
    first = (
        "loss", "ce", "preference_loss", "divergence", "policy_loss", "reroute_loss", "retain_loss", "aux_loss",
        "router_z_loss", "rewards/accuracies", "rewards/margins", "reward", "kl", "entropy",
    )  # fmt: skip
    shown = [
        f"{name} {step.metrics[name]:.4g}" for name in (*first, "grad_norm", "learning_rate") if name in step.metrics
    ]
    eta = "" if step.eta_s is None else f" eta {step.eta_s:.0f} s"
    return f"step {step.step}/{step.max_steps} {' '.join(shown)}{eta}"
