"""The run as events: every step, every router, every evaluation. A run whose numbers are no numbers ends here."""

import math
import resource
import sys
import time
from collections import deque
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback

from llama_stack_provider_moe.errors import TrainingError
from llama_stack_provider_moe.experts.routing import LayerRouting as Recorded
from llama_stack_provider_moe.jobs.events import Evaluation, LayerRouting, Routing, Step
from llama_stack_provider_moe.spec import Recipe
from llama_stack_provider_moe.training.resume import Resume, RunState
from llama_stack_provider_moe.training.sampling import rows_a_step
from llama_stack_provider_moe.training.session import AnySession, Stopped
from llama_stack_provider_moe.training.throughput import peak_flops
from llama_stack_provider_moe.training.trackers import OpenTrackers

if TYPE_CHECKING:
    from llama_stack_provider_moe.training.trainer import RecordingTrainer

# What TRL and transformers log that is bookkeeping and no metric of a step.
NOT_METRICS = frozenset({"epoch", "num_tokens", "step", "total_flos"})
BARE_LOSS: dict[Recipe, str] = {"sft": "ce", "dpo": "preference_loss", "circuit_breaker": "breaker_loss"}
WINDOW = 50  # steps that the estimate of the remaining time looks back on


class Reporter(TrainerCallback):
    """Events of steps, routers and evaluations.

    Args:
        session: of the job.
        trainer: that trains.
        trackers: told the figures too.
        resume: what this start goes on from.
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
        self.last = dict(before.last)
        self.held_out = dict(before.held_out)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """From here on a wish to stop waits for the step's end; then the untouched model's figures."""
        self._session.stop.between_steps(self._session.peers)
        self._train_began_s = time.monotonic()
        if (
            self._fresh_start
            and self._session.spec.options.eval_before_training
            and self._trainer.eval_dataset is not None
        ):
            self.evaluate()

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """A fresh mean of the training loss; in an epoch that an earlier start began, its steps count too."""
        if not self._within_epoch:
            self._epoch_losses.clear()
        self._within_epoch = False

    def train_seconds(self) -> float:
        """Of training, over all starts so far."""
        return self._seconds_before + time.monotonic() - self._train_began_s

    def run_state(self) -> RunState:
        """What a checkpoint keeps of this run."""
        return RunState(
            train_seconds=self.train_seconds(),
            epoch_losses=self._epoch_losses,
            last={name: value for name, value in self.last.items() if math.isfinite(value)},
            held_out=self.held_out,
            rows_a_step=rows_a_step(self._session.spec.training, self._session.peers.size),
        )

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start the step's clock."""
        self._began_s = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Stop the clock, once a GPU is done too."""
        if args.device.type == "cuda":
            torch.cuda.synchronize(args.device)
        self._durations_s.append(time.perf_counter() - self._began_s)

    def on_prediction_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """An evaluation is given up at once: what it would follow is saved already."""
        if self._session.peers.any(self._session.stop.requested):
            raise Stopped(state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        """One optimiser step."""
        if logs is None or "loss" not in logs:
            return
        metrics = {name: float(value) for name, value in logs.items() if name not in NOT_METRICS}
        self._refuse_nonsense(metrics, state.global_step)
        memory_bytes = self._session.peers.most(float(peak_memory_bytes(args.device)))
        metrics.update(self._speed(logs), memory_bytes=memory_bytes)
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
        self._tell(step)
        self._session.show(_line(step))
        recorder, total = self._trainer.recorder, self._trainer.total
        if recorder is not None:
            parts = recorder.take_parts(self._trainer.part_names, total)
            sets = {name: _layers(found) for name, found in parts.items()}
            self._tell(Routing(step=state.global_step, layers=_layers(recorder.take(total)), sets=sets))

    @property
    def bare_name(self) -> str:
        """Name of the loss without balance terms, the one that held-out loss compares with."""
        return BARE_LOSS[self._session.spec.recipe]

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
        self._tell(Evaluation(step=state.global_step, epoch=state.epoch or 0.0, metrics=figures))
        shown = " ".join(f"{name} {value:.4g}" for name, value in sorted(figures.items()))
        self._session.show(f"held out after step {state.global_step}: {shown}")
        return figures

    def _tell(self, event: Step | Evaluation | Routing) -> None:
        self._session.events.append(event)
        self._trackers.tell(event)

    def _bare_loss(self, metrics: dict[str, float]) -> dict[str, float]:
        resolved = self._trainer.resolved
        balance = resolved.aux_coef * metrics.get("aux_loss", 0.0) + resolved.z_coef * metrics.get("router_z_loss", 0.0)
        return {self.bare_name: metrics["loss"] - balance}

    def _speed(self, logs: dict[str, float]) -> dict[str, float]:
        tokens = logs["num_tokens"] - self._tokens_before
        self._tokens_before = logs["num_tokens"]
        done = (tokens, self._trainer.take_flops(), max(self._durations_s[-1], 1e-9))
        self._done = tuple(one + more for one, more in zip(self._done, done, strict=True))
        return {"tokens_per_s": tokens / done[-1], **self._throughput(*done)}

    def _throughput(self, tokens: float, flops: float, seconds: float) -> dict[str, float]:
        devices = self._session.peers.size
        each = flops / seconds / devices
        of_peak = {} if self._peak is None else {"mfu": each / self._peak}
        return {"tokens_per_s_per_device": tokens / seconds / devices, "tflops_per_device": each / 1e12, **of_peak}

    def throughput(self) -> dict[str, float]:
        """Over all steps of this start, by the names of the step metrics; empty where it took none."""
        return self._throughput(*self._done) if self._done[-1] else {}

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


def _layers(found: list[Recorded]) -> list[LayerRouting]:
    return [LayerRouting.model_validate(asdict(layer)) for layer in found]


def peak_memory_bytes(device: torch.device) -> int:
    """Greatest memory so far: of this process's tensors on a GPU, of the process itself on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB


def _line(step: Step) -> str:
    first = (
        "loss", "ce", "preference_loss", "reroute_loss", "retain_loss", "aux_loss", "router_z_loss",
        "rewards/accuracies", "rewards/margins",
    )  # fmt: skip
    shown = [
        f"{name} {step.metrics[name]:.4g}" for name in (*first, "grad_norm", "learning_rate") if name in step.metrics
    ]
    eta = "" if step.eta_s is None else f" eta {step.eta_s:.0f} s"
    return f"step {step.step}/{step.max_steps} {' '.join(shown)}{eta}"
