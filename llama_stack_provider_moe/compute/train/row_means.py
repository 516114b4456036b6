"""The loss of a step as the mean over its rows (or pairs), in all micro-batches and processes.

TRL's preference trainers return the mean over a micro-batch, and a short last one would weigh as much as a full one.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from llama_stack_provider_moe.compute.data import batch_sharing
from llama_stack_provider_moe.compute.train.prepared import Batch, Loss
from llama_stack_provider_moe.compute.train.trainer import RecordingTrainer


class RowMeans(RecordingTrainer):
    """Mixin over a TRL trainer whose loss is a mean over a micro-batch's rows."""

    # `weigh` divides the loss by the rows of the whole step; transformers must not divide it by micro-batches too.
    loss_is_scaled_for_ga: bool | None = True

    def rows_of(self, inputs: Batch) -> int:
        """The number of rows (or pairs) in a micro-batch."""
        raise NotImplementedError

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], Tensor | None]:
        """The micro-batches of a step, and the number of rows in it over all processes."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        mine = sum(self.rows_of(batch) for batch in batches if batch_sharing.counts(batch))
        return batches, self.peers.sum(torch.tensor(mine, device=device)) if batches else None

    def compute_loss(
        self, model: nn.Module, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Tensor | None = None
    ) -> Loss:
        """The part of the step's loss that comes from this micro-batch.

        Args:
            model: the policy.
            inputs: the micro-batch.
            return_outputs: whether to return the model's output too.
            num_items_in_batch: rows of the whole step.
        """
        coefficient = self.router_aux_loss_coef
        if num_items_in_batch is not None and batch_sharing.counts(inputs):
            # `weigh` multiplies TRL's loss by this part. TRL adds the model's balance loss, which must stay a mean over
            # micro-batches.
            part = float(self._part(inputs, num_items_in_batch))
            self.router_aux_loss_coef = coefficient / (part * self.current_gradient_accumulation_steps)
        try:
            loss: Loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            return loss
        finally:
            self.router_aux_loss_coef = coefficient

    def _part(self, inputs: Batch, rows: Tensor) -> Tensor:
        return self.rows_of(inputs) * self.peers.size / rows

    def weigh(self, loss: Tensor, inputs: Batch, num_items_in_batch: Tensor | None) -> Tensor:
        """Turn TRL's loss, a mean over this micro-batch's rows, into its part of the step's loss."""
        assert num_items_in_batch is not None, "the rows of the step"
        return loss * (self._part(inputs, num_items_in_batch) if self.counts else 0.0)
