"""A mixin that adds to TRL's trainers what all recipes need. It comes before one of them in a class's bases.

It records routers and adds balance terms in `compute_loss`, chooses the epoch's rows and the optimiser, and makes
held-out figures comparable: over tokens (or pairs), without balance terms, and with the random state left as it was.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler
from transformers import TrainingArguments, set_seed

from llama_stack_provider_moe.compute.data import batch_sharing, domains
from llama_stack_provider_moe.compute.data.batch_sharing import SharedBatches, SharedRuns
from llama_stack_provider_moe.compute.data.domains import DomainCollator, DomainSampler, runs_by_domain
from llama_stack_provider_moe.compute.data.encoding import COLUMN_OF_IMAGES
from llama_stack_provider_moe.compute.data.groups import GroupSampler
from llama_stack_provider_moe.compute.data.image_collator import ImageCollator
from llama_stack_provider_moe.compute.data.sampling import EpochSampler, rows_an_epoch
from llama_stack_provider_moe.compute.distributed.expert_parallel import clip
from llama_stack_provider_moe.compute.models.heads import head_without_adapter, needs_plain_head, set_plain_head
from llama_stack_provider_moe.compute.moe.balance import balance_loss
from llama_stack_provider_moe.compute.moe.layout import text_config
from llama_stack_provider_moe.compute.moe.routing import RoutingRecorder, Total, local_sum
from llama_stack_provider_moe.compute.planning import throughput
from llama_stack_provider_moe.compute.train import optimizers
from llama_stack_provider_moe.compute.train.by_domain import DomainLosses, held_out_by, masks
from llama_stack_provider_moe.compute.train.evaluating import EvaluatingTrainer
from llama_stack_provider_moe.compute.train.prepared import AnyPrepared, Batch, Loss
from llama_stack_provider_moe.compute.train.routing_events import steps_between_tables
from llama_stack_provider_moe.jobdir.events import StoppedBy
from llama_stack_provider_moe.spec import TrainingSpec

PARTS = ("text", "image")  # of the tokens of rows with images, for the routing


class RecordingTrainer(EvaluatingTrainer):
    """Mixin over a TRL trainer.

    Args:
        prepared: model, rows and what was decided about them.
        args: the recipe's training arguments.
        extra: further arguments of the TRL trainer below it.
    """

    loss_name: str  # each recipe's: the name in the log of its loss without balance terms

    data_collator: Any  # transformers'
    _signature_columns: list[str] | None  # transformers': the columns of rows that stay

    def __init__(self, prepared: AnyPrepared, args: TrainingArguments, **extra: object) -> None:
        base, model = prepared.base, prepared.model
        self.spec: TrainingSpec = prepared.session.spec
        self.peers = prepared.session.peers
        self.total: Total = local_sum if self.peers.size == 1 else self.peers.sum
        self.experts = base.experts
        self.layout = base.layout
        self.resolved = base.resolved
        self.shipped = base.shipped
        self.steering = base.steering
        self.rates = prepared.rates
        self.recorder: RoutingRecorder | None = None
        self.domains = prepared.rows.domains
        self.held_out = self.new_held_out()
        self.held_out_by = held_out_by(self.domains)
        self.domain_losses: DomainLosses | None = None
        # Of the current step, by the name in the log; each micro-batch's times its weight in the step.
        self.balance_terms: dict[str, float] = {}
        self.bare_loss: Tensor | float = 0.0  # of the current step and this process, before our balance terms
        wants_models_aux_loss = base.layout is not None and (
            base.resolved.output_router_logits and base.layout.aux_loss and not base.resolved.own_aux
        )
        if base.layout is not None and hasattr(config := text_config(model), "output_router_logits"):
            # Models return router logits if their config says so, and some that compute no aux loss (GLM-4 MoE,
            # DeepSeek V3) fail then. Set before TRL's constructor, which may compute a reference's log-probabilities.
            config.output_router_logits = wants_models_aux_loss
        with head_without_adapter(model):
            super().__init__(
                model=model,
                args=args,
                train_dataset=prepared.rows.train,
                eval_dataset=prepared.rows.validation,
                processing_class=base.tokenizer,
                **extra,
            )
        if needs_plain_head(model, self.head_temperature):
            set_plain_head(model, self.head_temperature)
        self.image_token: int | None = None
        if base.images is not None:
            if not isinstance(self.data_collator, ImageCollator):
                self.data_collator = ImageCollator(self.data_collator, base.images)
            self.image_token = base.model.config.image_token_id
            self.image_processor = base.images.processor
            self.part_names = PARTS
        if self.domains is not None:
            self.data_collator = DomainCollator(self.data_collator)
            self.part_names = self.domains.names
            if self.logs_domain_losses:
                self.domain_losses = DomainLosses(self.model, self.domains)
        # Every recipe divides by the items of a whole step. The classes of some composite models say that their own
        # loss does not, and the trainer would divide by the number of micro-batches too.
        self.model_accepts_loss_kwargs = True
        self.steps_between_tables: int | None = None  # of every expert's share in the events; None: no routing there
        if base.layout is not None and base.steering is not None:
            self.recorder = RoutingRecorder(self.model, base.layout)
            self.steps_between_tables = steps_between_tables(self.spec.moe, base.layout, len(self.part_names))
            self.aux_loss_enabled = wants_models_aux_loss  # TRL's is true only for a coefficient above 0
        chosen = self.spec.optimizer
        fused = self.args.device.type == "cuda" and not self.spec.resources.cpu_offload  # it steps on the GPU
        keywords = optimizers.arguments_of(chosen, self.model, self.spec.options.seed, fused)
        self.optimizer_cls_and_kwargs = (optimizers.class_of(chosen), keywords)
        self.work = self.step_flops()
        self.flops = 0.0  # of this process, since the last `take_flops`
        joined = (self.args.process_index, self.args.world_size)
        expected = (self.peers.rank, self.peers.size)
        assert joined == expected, f"transformers sees process {joined}, but this is {self.peers}"

    def _defer_fsdp_gradient_reduction(self) -> AbstractContextManager[None]:
        """Reduce gradients at once; else each process holds those of all weights until the last micro-batch."""
        return nullcontext()

    def _prepare_for_training(self, *arguments: object, **keywords: object) -> object:
        """Call transformers', without DDP if only experts train: it refuses a model with nothing to average."""
        if self.experts is None or not self.experts.alone(self.model):
            return super()._prepare_for_training(*arguments, **keywords)
        accelerator: Any = self.accelerator
        accelerator.prepare_model = partial(accelerator.prepare_model, evaluation_mode=True)  # does not wrap it
        try:
            return super()._prepare_for_training(*arguments, **keywords)
        finally:
            del accelerator.prepare_model

    def _clip_grad_norm(self, model: nn.Module) -> Tensor | None:
        """Clip by the norm over all processes' experts."""
        if self.experts is None:
            norm: Tensor | None = super()._clip_grad_norm(model)
            return norm
        return clip(self.model, self.experts, self.args.max_grad_norm)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Tensor | None = None) -> Tensor | float | None:
        if self.experts is None or grad_norm is not None:
            norm: Tensor | float | None = super()._get_grad_norm(model, grad_norm)
            return norm
        return clip(self.model, self.experts, math.inf)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Make the optimiser: exactly the class that the job names, with the job's learning rates."""
        made_before = self.optimizer is not None
        optimizer: torch.optim.Optimizer = super().create_optimizer(model)
        if made_before:
            return optimizer
        wanted = optimizers.class_of(self.spec.optimizer)
        assert type(optimizer) is wanted, f"{type(optimizer).__name__}, expected {wanted.__name__}"
        self.rates.apply(optimizer)
        optimizer.register_step_post_hook(self._after_step)
        if isinstance(optimizer, optimizers.BoundedAdamW):
            self._check_state = optimizer.register_step_post_hook(self._has_foreseen_state)
        return optimizer

    def _has_foreseen_state(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        """Check after the first step that the optimiser keeps what the job's log says."""
        self._check_state.remove()
        told, kept = optimizers.foreseen(self.spec.optimizer, self.model), optimizers.found(optimizer)
        assert kept == told, f"the optimiser keeps {kept}, expected {told}"

    def _after_step(self, *_: object) -> None:
        if self.steering is not None and self.recorder is not None:
            self.steering.after_step(self.recorder.take_counts(self.total))

    def write_checkpoint(self) -> None:
        """Write the state of the last step into the staging folder, as the trainer does at a save."""
        self._save_checkpoint(self.model, None)

    def seed_process(self, step: int) -> None:
        """Seed each process differently, so that no two drop the same activations.

        If the run resumes from a checkpoint with this process's random state, that state replaces the seed.
        """
        set_seed((self.spec.options.seed + 1_000_003 * self.peers.rank + 7919 * step) % 2**32)

    def get_train_dataloader(self) -> DataLoader[Batch]:
        """Transformers' loader, or one of this process's share."""
        if self.peers.size == 1:
            loader: DataLoader[Batch] = super().get_train_dataloader()
            return loader
        batches = SharedBatches(self._get_train_sampler(), self.args.per_device_train_batch_size, self.peers)
        return self._share(self.train_dataset, batches)

    def get_eval_dataloader(self, eval_dataset: Dataset | None = None) -> DataLoader[Batch]:
        """Transformers' loader, or one of this process's share."""
        rows = self.eval_dataset if eval_dataset is None else eval_dataset
        length = self.args.per_device_eval_batch_size
        if self.domains is not None:  # one domain in each batch, so that its loss is that domain's
            runs = runs_by_domain(self.domains.held_out, length * self.peers.size)
            return self._share(rows, SharedRuns(runs, self.peers))
        if self.peers.size == 1:
            loader: DataLoader[Batch] = super().get_eval_dataloader(eval_dataset)
            return loader
        return self._share(rows, SharedBatches(range(len(rows)), length, self.peers))

    def _share(self, rows: Dataset, batches: Sampler[list[object]]) -> DataLoader[Batch]:
        if isinstance(rows, Dataset):
            rows = self._remove_unused_columns(rows, description="shared")
        loader: DataLoader[Batch] = batch_sharing.loader(rows, batches, self.data_collator, self.args)
        return loader

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if COLUMN_OF_IMAGES not in (self._signature_columns or []):
            self._signature_columns = [*(self._signature_columns or []), COLUMN_OF_IMAGES]
        if self.domains is not None and domains.COLUMN not in (self._signature_columns or []):
            self._signature_columns = [*(self._signature_columns or []), domains.COLUMN]

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], Tensor | None]:
        """A step's micro-batches; with a z-loss, each has its share of the step's tokens."""
        batches: list[Batch]
        items: Tensor | None
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self.flops += sum(
            self.operations(throughput.lengths_of(batch)) for batch in batches if batch_sharing.counts(batch)
        )
        if self.resolved.z_coef and batches:
            tokens = self.peers.sums([batch_sharing.tokens(batch) for batch in batches])
            for batch, mine in zip(batches, tokens, strict=True):
                batch[batch_sharing.TOKEN_SHARE] = torch.tensor(mine / sum(tokens), dtype=torch.float64)
        return batches, items

    @property
    def sequences(self) -> int:
        """Training sequences in a full epoch: fewer than rows if rows are packed, more if domains repeat."""
        return len(self.train_dataset) if self.domains is None else sum(self.domains.epoch)

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> EpochSampler | DomainSampler | GroupSampler:
        rows = len(self.train_dataset if train_dataset is None else train_dataset)
        spec = self.spec
        if self.domains is not None:
            most = rows_an_epoch(spec.training, sum(self.domains.epoch), self.peers.size)
            return DomainSampler(self.domains, most, spec.data.shuffle, spec.options.seed)
        most = rows_an_epoch(spec.training, rows, self.peers.size)
        return EpochSampler(rows, most, spec.data.shuffle, spec.options.seed)

    def compute_loss(
        self, model: nn.Module, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Tensor | None = None
    ) -> Loss:
        """Compute TRL's loss; in training also record the routers and add our balance terms.

        The token (or pair) loss is this micro-batch's part of the step's mean, so the trainer must not divide it. The
        balance loss is not a mean over tokens: a step's is the mean over its micro-batches, as in transformers. The
        z-loss is a mean over the step's tokens.

        If processes share the batch, each has its part of the loss, times their number, because gradients are averaged.

        Args:
            model: the trained model, or what wraps it.
            inputs: the micro-batch.
            return_outputs: whether to return the model's output too; only in evaluations.
            num_items_in_batch: tokens or pairs of the whole step; see each recipe's `get_batch_samples`.
        """
        share, token_share = batch_sharing.pop_share(inputs), inputs.pop(batch_sharing.TOKEN_SHARE, None)
        self._domain_B = inputs.pop(domains.COLUMN, None)
        self.counts = share is None or share > 0
        mask = self.token_mask(inputs, share)
        with batch_sharing.local_metrics(self.accelerator, share):
            if self.recorder is None or self.steering is None:
                loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
                return self._measured(self.weigh(loss, inputs, num_items_in_batch)) if self.model.training else loss
            if not self.model.training:
                with self.recorder.recording(mask, first_alone=True):
                    evaluated: Loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
                    return evaluated
            self.steering.act(mask)
            with self.recorder.recording(mask, self.parts(inputs) if self.counts else {}):
                loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        assert num_items_in_batch is not None, "else the trainer divides by the number of micro-batches"
        loss = self._measured(self.weigh(loss, inputs, num_items_in_batch))
        if self.resolved.z_coef:
            z_loss = self.recorder.z_loss(self.total)
            assert token_share is not None, "see `get_batch_samples`"
            loss = loss + self._weighted("router_z_loss", self.resolved.z_coef, z_loss, token_share.item())
        # With a coefficient of 0 the model's balance loss is only logged. It is over one process's tokens; with several
        # processes we log ours.
        if self.resolved.own_aux or (self.logs_balance and self.aux_loss_enabled and self.peers.size > 1):
            aux_loss = balance_loss(self.recorder, self.resolved.load_balancing, self.total)
            part = 1 / self.current_gradient_accumulation_steps
            loss = loss + self._weighted("aux_loss", self.resolved.aux_coef, aux_loss, part)
        return loss

    head_temperature: float = 1.0  # that a recipe's log-probabilities divide logits by
    ended_by: StoppedBy | None = None  # why a recipe ends the run after this step

    def token_mask(self, inputs: Batch, share: int | None) -> Tensor | None:
        """A mask (batch, sequence) of the tokens whose routing counts; see `batch_sharing.weights`."""
        return batch_sharing.weights(inputs, share)

    def step_flops(self) -> throughput.StepFlops:
        """Operations of a training step, see `StepFlops`."""
        return throughput.count_flops(self.model, self.layout)

    def operations(self, lengths: Sequence[int]) -> float:
        """Operations of learning from rows of these lengths, in tokens."""
        return self.work.of(lengths)

    def take_flops(self) -> float:
        """Operations of all processes since the last call."""
        (flops,), self.flops = self.peers.sums([self.flops]), 0.0
        return flops

    def _measured(self, loss: Tensor) -> Tensor:
        """Add a micro-batch's part of the loss to the step's, and return it unchanged."""
        if self.domain_losses is not None:
            if self.counts and self._domain_B is not None:
                self.domain_losses.add(self._domain_B)
            self.domain_losses.forget()
        self.bare_loss = self.bare_loss + loss.detach().float()
        return loss

    def take_bare_loss(self) -> float:
        """The loss of the last step over all processes, without our balance terms.

        If the model computes a balance loss, TRL has added it already.
        """
        (total,), self.bare_loss = self.peers.sums([float(self.bare_loss)]), 0.0
        return total / self.peers.size

    def weigh(self, loss: Tensor, inputs: Batch, num_items_in_batch: Tensor | None) -> Tensor:
        """Turn a micro-batch's loss into its part of the step's over all processes, times their number.

        With SFT, TRL's loss is that already.
        """
        return loss

    part_names: Sequence[str] = ()  # all possible names in `parts`
    logs_domain_losses = False  # whether the loss is a mean over tokens, which a step can report by domain
    _domain_B: Tensor | None = None  # of the current micro-batch

    def parts(self, inputs: Batch) -> dict[str, Tensor]:
        """Masks (batch, sequence) of tokens whose routing is also recorded separately, by name."""
        if self.image_token is not None and self.domains is None:
            of_images_BT = (inputs["input_ids"] == self.image_token) * inputs["attention_mask"]
            masks_BT = (inputs["attention_mask"] - of_images_BT, of_images_BT)
            return {name: mask for name, mask in zip(PARTS, masks_BT, strict=True) if mask.any()}
        if self.domains is None or self._domain_B is None:
            return {}
        return masks(self.domains.names, self._domain_B, inputs["attention_mask"])

    def _weighted(self, name: str, coefficient: float, term: Tensor, part: float) -> Tensor:
        self.balance_terms[name] = self.balance_terms.get(name, 0.0) + part * term.item()
        return self.peers.size * part * coefficient * term

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the step's balance terms, and its losses by domain, to the log."""
        if self.domain_losses is not None and "loss" in logs:
            logs |= self.domain_losses.take(self.peers)
        logs |= dict(zip(self.balance_terms, self.peers.sums(list(self.balance_terms.values())), strict=True))
        self.balance_terms.clear()
        super().log(logs, start_time)
