"""How a trainer writes its checkpoints and reads them back, with one or several processes."""

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from llama_stack_provider_moe.compute.distributed.full_state import (
    has_sharded_parameters,
    model_state,
    optimizer_state,
    restore_optimizer,
)
from llama_stack_provider_moe.compute.distributed.sharded_checkpoint import is_sharded, read_optimizer, write_shards
from llama_stack_provider_moe.compute.models.saved_weights import restore_weights
from llama_stack_provider_moe.compute.moe.resolve_settings import ShippedConfig
from llama_stack_provider_moe.compute.moe.sharding import ShardedExperts
from llama_stack_provider_moe.compute.moe.steering import Steering
from llama_stack_provider_moe.compute.runtime.library_signs import CountingWriter
from llama_stack_provider_moe.compute.runtime.peers import Peers
from llama_stack_provider_moe.compute.train.checkpoints import write, write_beside_shards
from llama_stack_provider_moe.ground import liveness
from llama_stack_provider_moe.spec import TrainingSpec


class CheckpointingTrainer(Trainer):
    """The part of `RecordingTrainer` that writes checkpoints and reads them."""

    spec: TrainingSpec
    peers: Peers
    experts: ShardedExperts | None
    shipped: ShippedConfig
    steering: Steering | None
    image_processor: Any = None  # the family's, if rows have images

    def create_model_card(self, *_: object, **__: object) -> None:
        """Write none: TRL's would be in every checkpoint, and describe another run."""

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the model as in the final artifacts, without pickled arguments."""
        folder, shipped = Path(output_dir or self.args.output_dir), self.shipped.restored()
        if self.spec.options.checkpoint_form == "sharded":  # the weights are with the optimiser's state
            if self.peers.leads:
                write_beside_shards(self.model, self.processing_class, folder, shipped, self.steering)
            return
        weights = self.whole_weights()
        if not self.peers.leads:
            return
        write(self.model, self.processing_class, folder, shipped, self.steering, weights, self.image_processor)

    def whole_weights(self, dtype: torch.dtype | None = None) -> dict[str, Tensor] | None:
        """All weights to save, in rank 0, if processes have parts of them; None if each has all.

        Args:
            dtype: of the returned parameters; None: the dtype that they train in.
        """
        if self.experts is not None:
            return self.experts.whole_state(self.model)
        if isinstance(self.model, PeftModel) or not has_sharded_parameters(self.model):
            return None
        return model_state(self.model, dtype)

    def _save_checkpoint(self, model: nn.Module, trial: object) -> None:
        """Call transformers', and report progress."""
        with liveness.stage("saving a checkpoint", unit="files"):
            super()._save_checkpoint(model, trial)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Write the optimiser's state, gathered or in parts beside the weights, and the scheduler's."""
        if self.spec.options.checkpoint_form == "sharded":
            write_shards(self.model, self.optimizer, Path(output_dir))
        else:
            state = optimizer_state(self.model, self.optimizer, self.experts)
            if self.peers.leads:
                with CountingWriter(Path(output_dir) / OPTIMIZER_NAME) as file:
                    torch.save(state, file)
        if self.peers.leads:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Read what `_save_optimizer_and_scheduler` wrote, with the same or another number of processes."""
        if checkpoint is None:
            return
        if is_sharded(Path(checkpoint)):
            read_optimizer(self.model, self.optimizer, Path(checkpoint))
        else:
            saved = torch.load(Path(checkpoint) / OPTIMIZER_NAME, map_location="cpu", mmap=True, weights_only=True)
            restore_optimizer(self.model, self.optimizer, saved, self.experts)
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Read a checkpoint's weights into the model."""
        self.restore(self.model if model is None else model, Path(resume_from_checkpoint))

    def restore(self, model: nn.Module, folder: Path) -> None:
        """Read a checkpoint's weights, and its routers' biases, into `model`."""
        restore_weights(model, folder, self.experts)
        if self.steering is not None:
            self.steering.restore(folder)
