"""What TRL's trainers lack, once for all recipes: put before one of them in a class's bases.

Router recording and balance terms in `compute_loss`, the epoch's rows, named optimisers, and held-out figures that can
be compared: over tokens (or pairs), without the balance terms, and without moving the random state.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor
from transformers import Trainer, set_seed
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from llama_stack_provider_moe.errors import TrainingError
from llama_stack_provider_moe.experts.balance import balance_loss
from llama_stack_provider_moe.experts.layout import ExpertLayout, text_config
from llama_stack_provider_moe.experts.rates import Rates
from llama_stack_provider_moe.experts.routing import RoutingRecorder, Total, own
from llama_stack_provider_moe.experts.settings import ResolvedMoe, ShippedConfig
from llama_stack_provider_moe.experts.sharding import ShardedExperts
from llama_stack_provider_moe.experts.steering import Steering
from llama_stack_provider_moe.spec import TrainingSpec
from llama_stack_provider_moe.training import sharing, throughput
from llama_stack_provider_moe.training.checkpoints import write, write_beside_shards
from llama_stack_provider_moe.training.distributed_state import (
    is_shared_out,
    model_state,
    optimizer_state,
    restore_optimizer,
)
from llama_stack_provider_moe.training.expert_parallel import clip
from llama_stack_provider_moe.training.heads import head_without_adapter, needs_plain_head, set_plain_head
from llama_stack_provider_moe.training.peers import ALONE, Peers
from llama_stack_provider_moe.training.resume import restore_weights
from llama_stack_provider_moe.training.sampling import EpochSampler, rows_an_epoch
from llama_stack_provider_moe.training.sharded_checkpoint import is_sharded, read_optimizer, write_shards

OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "sgd": torch.optim.SGD,
}
LARGEST_EXPONENT = 700.0  # exp of more is no double any more; a perplexity of 1e304 tells enough


@dataclass
class HeldOut:
    """Sums over one evaluation."""

    loss: float = 0.0
    weight: float = 0.0
    nll: float = 0.0
    tokens: float = 0.0

    def over(self, peers: Peers) -> "HeldOut":
        """The sums over all processes, each of which evaluated its share."""
        return HeldOut(*peers.sums([self.loss, self.weight, self.nll, self.tokens]))

    def figures(self) -> dict[str, float]:
        """`validation_loss`: mean a token (SFT) or a pair (DPO); `perplexity` from the NLL of the right answers."""
        return {
            "validation_loss": self.loss / self.weight,
            "perplexity": math.exp(min(self.nll / self.tokens, LARGEST_EXPONENT)),
        }


class RecordingTrainer(Trainer):
    """Mixin over a TRL trainer; arguments beyond its own are keyword-only and come first."""

    router_aux_loss_coef: float  # set by TRL: what it multiplies the aux loss by

    def __init__(
        self,
        *,
        spec: TrainingSpec,
        peers: Peers = ALONE,
        experts: ShardedExperts | None = None,
        layout: ExpertLayout | None,
        resolved: ResolvedMoe,
        shipped: ShippedConfig,
        steering: Steering | None,
        rates: Rates,
        model: Any,
        **arguments: Any,
    ) -> None:
        self.spec = spec
        self.peers = peers
        self.experts = experts
        self.total: Total = own if peers.size == 1 else peers.sum
        self.layout = layout
        self.resolved = resolved
        self.shipped = shipped
        self.steering = steering
        self.rates = rates
        self.recorder: RoutingRecorder | None = None
        self.held_out = self.new_held_out()
        self.balance_terms: dict[str, list[float]] = {}  # of the step at hand, by the name they are logged under
        wants_models_aux_loss = layout is not None and (
            resolved.output_router_logits and layout.aux_loss and not resolved.own_aux
        )
        if layout is not None:
            # Models return router logits wherever their config says so, and some that make no aux loss of them (GLM-4
            # MoE, DeepSeek V3) fail then. Before TRL's own, which may compute a reference's log-probabilities.
            text_config(model).output_router_logits = wants_models_aux_loss
        with head_without_adapter(model):
            super().__init__(model=model, **arguments)
        if needs_plain_head(model):
            set_plain_head(model)
        if layout is not None and steering is not None:  # else its routers are run by somebody else (`loader`)
            self.recorder = RoutingRecorder(self.model, layout)
            # TRL computes the aux loss only where its coefficient is not 0; with 0 it is logged all the same.
            self.aux_loss_enabled = wants_models_aux_loss
        chosen = OPTIMIZERS[spec.optimizer.optimizer_type]
        fused = self.args.device.type == "cuda" and not spec.resources.cpu_offload  # where the optimiser steps
        self.optimizer_cls_and_kwargs = (chosen, {"lr": spec.optimizer.lr, "fused": fused})
        self.work = self.work_of_a_step()
        self.flops = 0.0  # of this process, since they were last taken
        joined = (self.args.process_index, self.args.world_size)
        assert joined == (peers.rank, peers.size), f"transformers takes this for process {joined}, it is {peers}"

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """No card: TRL's would stand beside every checkpoint and name a run that is not ours."""

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """What a checkpoint holds of the model: as the final artifacts do, without pickled arguments."""
        folder, shipped = Path(output_dir or self.args.output_dir), self.shipped.restored()
        if self.spec.options.checkpoint_form == "sharded":  # weights go with the optimiser's state
            if self.peers.leads:
                write_beside_shards(self.model, self.processing_class, folder, shipped, self.steering)
            return
        weights = self.whole_weights()
        if not self.peers.leads:
            return
        write(self.model, self.processing_class, folder, shipped, self.steering, weights)

    def whole_weights(self, dtype: torch.dtype | None = None) -> dict[str, Tensor] | None:
        """All weights that are saved, in rank 0, where processes have parts of them; None where each has all.

        Args:
            dtype: to have the parameters in; None: that in which they train.
        """
        if self.experts is not None:
            return self.experts.whole_state(self.model)
        if isinstance(self.model, PeftModel) or not is_shared_out(self.model):
            return None
        return model_state(self.model, dtype)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Transformers', with the optimiser's state made whole, or in parts with the weights."""
        if self.spec.options.checkpoint_form == "sharded":
            write_shards(self.model, self.optimizer, Path(output_dir))
        else:
            state = optimizer_state(self.model, self.optimizer, self.experts)
            if self.peers.leads:
                torch.save(state, Path(output_dir) / OPTIMIZER_NAME)
        if self.peers.leads:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """What the above wrote, in this or in another number of processes."""
        if checkpoint is None:
            return
        if is_sharded(Path(checkpoint)):
            read_optimizer(self.model, self.optimizer, Path(checkpoint))
        else:
            saved = torch.load(Path(checkpoint) / OPTIMIZER_NAME, map_location="cpu", mmap=True, weights_only=True)
            restore_optimizer(self.model, self.optimizer, saved, self.experts)
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True))

    def _defer_fsdp_gradient_reduction(self) -> AbstractContextManager[None]:
        """Nothing is put off: until a step's last micro-batch each process would hold the gradients of all weights."""
        return nullcontext()

    def _prepare_for_training(self, *arguments: Any, **keywords: Any) -> Any:
        """Where experts alone train there is nothing to average, and DDP refuses to do nothing."""
        if self.experts is None or not self.experts.alone(self.model):
            return super()._prepare_for_training(*arguments, **keywords)
        accelerator: Any = self.accelerator
        accelerator.prepare_model = partial(accelerator.prepare_model, evaluation_mode=True)  # unwrapped, that is
        try:
            return super()._prepare_for_training(*arguments, **keywords)
        finally:
            del accelerator.prepare_model

    def _clip_grad_norm(self, model: Any) -> Any:
        """Over all processes' experts."""
        if self.experts is None:
            return super()._clip_grad_norm(model)
        return clip(self.model, self.experts, self.args.max_grad_norm)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        if self.experts is None or grad_norm is not None:
            return super()._get_grad_norm(model, grad_norm)
        return clip(self.model, self.experts, math.inf)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """The weights of a checkpoint, each in its place; see `resume`."""
        self.restore(self.model if model is None else model, Path(resume_from_checkpoint))

    def restore(self, model: Any, folder: Path) -> None:
        """Put a checkpoint's weights, and its routers' biases, into `model`."""
        restore_weights(model, folder, self.experts)
        if self.steering is not None:
            self.steering.restore(folder)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The class that was asked for, and nothing that derives from it; with the job's own learning rates."""
        made_before = self.optimizer is not None
        optimizer: torch.optim.Optimizer = super().create_optimizer(model)
        if made_before:
            return optimizer
        wanted = OPTIMIZERS[self.spec.optimizer.optimizer_type]
        assert type(optimizer) is wanted, f"{type(optimizer).__name__} was made, {wanted.__name__} was asked for"
        self.rates.apply(optimizer)
        optimizer.register_step_post_hook(self._after_step)
        return optimizer

    def _after_step(self, *_: Any) -> None:
        if self.steering is not None and self.recorder is not None:
            self.steering.after_step(self.recorder.take_counts(self.total))

    def draw_apart(self, step: int) -> None:
        """Random numbers of each process's own from here on: no two are to drop the same activations.

        Where the run goes on from a checkpoint that has this process's random state, that replaces these.
        """
        set_seed((self.spec.options.seed + 1_000_003 * self.peers.rank + 7919 * step) % 2**32)

    def get_train_dataloader(self) -> Any:
        """Transformers', or this process's share."""
        if self.peers.size == 1:
            return super().get_train_dataloader()
        return self._share(self.train_dataset, self._get_train_sampler(), self.args.per_device_train_batch_size)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """Transformers', or this process's share."""
        if self.peers.size == 1:
            return super().get_eval_dataloader(eval_dataset)
        rows = self.eval_dataset if eval_dataset is None else eval_dataset
        return self._share(rows, range(len(rows)), self.args.per_device_eval_batch_size)

    def _share(self, rows: Any, order: Any, batch_size: int) -> Any:
        if isinstance(rows, Dataset):
            rows = self._remove_unused_columns(rows, description="shared")
        return sharing.loader(rows, order, batch_size, self.data_collator, self.args, self.peers)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list[Any], Any]:
        """A step's micro-batches; each that is shared also tells how many rows all processes have of it."""
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self.flops += sum(self.work.of(throughput.lengths_of(batch)) for batch in batches if sharing.counts(batch))
        if self.peers.size > 1 and batches:
            rows = self.peers.sum(torch.stack([batch[sharing.SHARE] for batch in batches]))
            for batch, of_all in zip(batches, rows, strict=True):
                batch[sharing.OF_ALL] = of_all
        return batches, items

    def _get_train_sampler(self, train_dataset: Any = None) -> EpochSampler:
        rows = len(self.train_dataset if train_dataset is None else train_dataset)
        spec = self.spec
        most = rows_an_epoch(spec.training, rows, self.peers.size)
        return EpochSampler(rows, most, spec.data.shuffle, spec.options.seed)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """TRL's loss; in training also each router's decisions and the balance terms that are ours.

        Those are means over a micro-batch, so that a step's is the mean over its micro-batches. Where the token loss
        comes divided by the whole step's tokens (`num_items_in_batch`), the trainer divides no more.

        Where processes share the batch each has its part of the loss, times their number, for gradients are averaged.
        """
        share = sharing.taken(inputs)
        with sharing.gathering(self.accelerator, share, self.peers):
            if self.recorder is None or self.steering is None or not self.model.training:
                loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
                return loss if share is None or not self.model.training else self.weigh(loss, share)
            mask = sharing.weights(inputs, share)
            self.steering.act(mask)
            with self.recorder.recording(mask, self.parts(inputs) if share is None or share.mine else {}):
                loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if share is not None:
            loss = self.weigh(loss, share)
        scale = self.peers.size / (1 if num_items_in_batch is None else self.current_gradient_accumulation_steps)
        if self.resolved.z_coef:
            z_loss = self.recorder.z_loss(self.total)
            loss = loss + scale * self._weighed("router_z_loss", self.resolved.z_coef, z_loss)
        if self.resolved.own_aux:
            aux_loss = balance_loss(self.recorder, self.resolved.load_balancing, self.total)
            loss = loss + scale * self._weighed("aux_loss", self.resolved.aux_coef, aux_loss)
        return loss

    def work_of_a_step(self) -> throughput.Work:
        """Operations of a training step, a token."""
        return throughput.work_of(self.model, self.layout)

    def take_flops(self) -> float:
        """Operations of all processes since the last time."""
        (flops,), self.flops = self.peers.sums([self.flops]), 0.0
        return flops

    def weigh(self, loss: Tensor, share: "sharing.Share") -> Tensor:
        """This process's loss as its part of all processes', times their number; TRL's SFT gives it so by itself."""
        return loss

    part_names: Sequence[str] = ()  # of `parts`, all that there may be

    def parts(self, inputs: dict[str, Any]) -> dict[str, Tensor]:
        """Tokens of a micro-batch whose routing is also told apart, (batch, sequence) by name."""
        return {}

    def new_held_out(self) -> HeldOut:
        """The sums of one evaluation, at zero."""
        return HeldOut()

    def _weighed(self, name: str, coefficient: float, term: Tensor) -> Tensor:
        self.balance_terms.setdefault(name, []).append(term.item())
        return coefficient * term

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the step's means of our balance terms."""
        means = self.peers.sums([sum(values) / len(values) for values in self.balance_terms.values()])
        logs |= dict(zip(self.balance_terms, means, strict=True))
        self.balance_terms.clear()
        super().log(logs, start_time)

    def evaluate(self, *arguments: Any, **keywords: Any) -> dict[str, float]:
        """TRL's figures, with `eval_validation_loss` and `eval_perplexity`, which see the model alone."""
        self.held_out = self.new_held_out()
        self.rest()
        devices = [self.args.device] if self.args.device.type == "cuda" else []
        # Making an iterator of a loader draws from the global generator: without the fork an evaluated run would
        # differ from the same run without evaluations, and from one resumed at the checkpoint before it.
        with torch.random.fork_rng(devices=devices), self._without_balance_terms():
            metrics: dict[str, float] = super().evaluate(*arguments, **keywords)
        for name, value in self.held_out.over(self.peers).figures().items():
            if not math.isfinite(value):
                raise TrainingError(
                    f"step {self.state.global_step}: held-out {name} is {value}; the model has diverged"
                )
            metrics[f"eval_{name}"] = value
        return metrics

    def rest(self) -> None:
        """Passes from here on are no training step's."""
        if self.steering is not None:
            self.steering.rest()

    def prediction_step(self, model: Any, inputs: dict[str, Any], *arguments: Any, **keywords: Any) -> Any:
        """TRL's, tallied."""
        counts = sharing.counts(inputs)
        outcome = super().prediction_step(model, inputs, *arguments, **keywords)
        if counts:
            self.tally(self.held_out, inputs, outcome[0].item())
        return outcome

    def tally(self, held_out: HeldOut, inputs: dict[str, Any], loss: float) -> None:
        """Add one micro-batch, whose mean loss is `loss`; each recipe's trainer knows what it is a mean over."""
        raise NotImplementedError

    @contextmanager
    def _without_balance_terms(self) -> Iterator[None]:
        coefficient, self.router_aux_loss_coef = self.router_aux_loss_coef, 0.0
        try:
            yield
        finally:
            self.router_aux_loss_coef = coefficient
