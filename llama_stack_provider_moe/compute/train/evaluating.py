"""The part of `RecordingTrainer` that evaluates held-out rows.

Its figures are over tokens (or pairs), without balance terms, and an evaluation leaves the random state as it was.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext

import torch
from torch import nn

from llama_stack_provider_moe.compute.data import batch_sharing, domains
from llama_stack_provider_moe.compute.data.domains import Domains
from llama_stack_provider_moe.compute.moe.layout import ExpertLayout
from llama_stack_provider_moe.compute.moe.resolve_settings import ResolvedMoe
from llama_stack_provider_moe.compute.moe.routing import RoutingRecorder, Total
from llama_stack_provider_moe.compute.train.by_domain import figures_of, held_out_by
from llama_stack_provider_moe.compute.train.checkpointing import CheckpointingTrainer
from llama_stack_provider_moe.compute.train.held_out import HeldOut
from llama_stack_provider_moe.compute.train.prepared import Batch, Outcome
from llama_stack_provider_moe.errors import TrainingError


class EvaluatingTrainer(CheckpointingTrainer):
    """Mixin over a TRL trainer; `RecordingTrainer` sets its attributes."""

    domains: Domains | None
    held_out: HeldOut
    held_out_by: Mapping[str, HeldOut]
    recorder: RoutingRecorder | None
    layout: ExpertLayout | None
    resolved: ResolvedMoe
    total: Total

    router_aux_loss_coef: float  # set by TRL: the coefficient of the aux loss
    aux_loss_enabled: bool  # set by TRL: whether it asks the model for that loss

    def rest(self) -> None:
        """End the training steps: passes from here on do not belong to one."""
        if self.steering is not None:
            self.steering.rest()

    def new_held_out(self) -> HeldOut:
        """The sums of a new evaluation."""
        return HeldOut()

    def evaluate(self, *arguments: object, **keywords: object) -> dict[str, float]:
        """TRL's figures, and `eval_validation_loss` and `eval_perplexity`, which have no balance terms."""
        self.held_out, self.held_out_by = self.new_held_out(), held_out_by(self.domains)
        self.rest()
        devices = [self.args.device] if self.args.device.type == "cuda" else []
        # Iterating over a loader draws from the global generator. Without the fork, a run with evaluations would differ
        # from one without, and from one resumed at the checkpoint before.
        isolated = nullcontext() if self.recorder is None else self.recorder.isolated()
        with torch.random.fork_rng(devices=devices), self._without_balance_terms(), isolated:
            metrics: dict[str, float] = super().evaluate(*arguments, **keywords)
            metrics |= self._held_out_balance()
        for name, value in figures_of(self.held_out, self.held_out_by, self.peers).items():
            if not math.isfinite(value):
                raise TrainingError(
                    f"step {self.state.global_step}: held-out {name} is {value}; the model has diverged"
                )
            metrics[f"eval_{name}"] = value
        return metrics

    logs_balance = True  # whether TRL's `compute_loss` asks the model for its balance loss, also in evaluations

    def _held_out_balance(self) -> dict[str, float]:
        """The Switch balance loss of all held-out tokens as one batch; a mean over smaller batches would differ."""
        if self.recorder is None or not self.logs_balance or self.resolved.load_balancing == "gshard":
            return {}
        if not (self.aux_loss_enabled or self.resolved.own_aux):
            return {}
        return {"eval_aux_loss": self.recorder.switch_loss(self.total)}

    def prediction_step(self, model: nn.Module, inputs: Batch, *arguments: object, **keywords: object) -> Outcome:
        """Call TRL's, and add the micro-batch to the held-out sums."""
        counts = batch_sharing.counts(inputs)
        outcome: Outcome = super().prediction_step(model, inputs, *arguments, **keywords)
        if counts:
            assert outcome[0] is not None, "held-out rows have labels"
            sums = [self.held_out]
            if self.domains is not None:
                sums.append(self.held_out_by[self.domains.names[int(inputs[domains.COLUMN][0])]])
            for each in sums:
                self.tally(each, inputs, outcome[0].item())
        return outcome

    def tally(self, held_out: HeldOut, inputs: Batch, loss: float) -> None:
        """Add a micro-batch with mean loss `loss` to the sums; each recipe knows what it is a mean over."""
        raise NotImplementedError

    @contextmanager
    def _without_balance_terms(self) -> Iterator[None]:
        coefficient, self.router_aux_loss_coef = self.router_aux_loss_coef, 0.0
        try:
            yield
        finally:
            self.router_aux_loss_coef = coefficient
