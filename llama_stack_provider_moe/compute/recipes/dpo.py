"""Direct preference optimisation (Rafailov et al. 2023, arXiv 2305.18290), and the losses derived from it.

The reference is the model with its adapter off, even if that adapter starts from another one. If all weights train, the
reference is a second, frozen copy, unless its log-probabilities are computed ahead (`options.precompute_ref_log_probs`)
by the model before it trains. The model's own dropout is off in both passes; an adapter's dropout acts only on the
policy.
"""

import hashlib
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedModel
from trl import DPOConfig, DPOTrainer
from trl.trainer import dpo_trainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

from llama_stack_provider_moe.compute.data import domains
from llama_stack_provider_moe.compute.data.datasets import dpo_rows
from llama_stack_provider_moe.compute.data.image_collator import ImageCollator
from llama_stack_provider_moe.compute.methods.preference import as_robust
from llama_stack_provider_moe.compute.methods.reference_ahead import reference_ahead
from llama_stack_provider_moe.compute.models.backend import backend_of
from llama_stack_provider_moe.compute.models.determinism import require_determinism, without_dropout
from llama_stack_provider_moe.compute.models.heads import needs_plain_head, set_plain_head
from llama_stack_provider_moe.compute.planning.throughput import StepFlops, count_flops
from llama_stack_provider_moe.compute.runtime.context import Session
from llama_stack_provider_moe.compute.train.fit import arguments, fit
from llama_stack_provider_moe.compute.train.held_out import HeldOut
from llama_stack_provider_moe.compute.train.prepared import Batch, Prepared, prepare
from llama_stack_provider_moe.compute.train.reference import load_reference, own_reference
from llama_stack_provider_moe.compute.train.row_means import RowMeans
from llama_stack_provider_moe.compute.train.step_figures import StepFigures
from llama_stack_provider_moe.ground import liveness
from llama_stack_provider_moe.jobdir.folder import Manifest
from llama_stack_provider_moe.spec import DPOSpec


@dataclass
class PairCollator(DataCollatorForPreference):
    """TRL's, which compares all of an answer; here tool results inside an answer are not compared."""

    def torch_call(self, examples: list[dict[str, list[int]]]) -> Batch:
        """The batch of TRL's collator, whose `completion_mask` is 0 on the tokens that nobody is to learn."""
        batch: Batch = super().torch_call(examples)
        answers = [(each, which) for which in ("chosen", "rejected") for each in examples]
        for mask_T, (each, which) in zip(batch["completion_mask"], answers, strict=True):
            begin, said = len(each["prompt_ids"]), each[f"{which}_said"]
            mask_T[begin : begin + len(said)] = torch.tensor(said)
        return batch


class DPO(RowMeans, StepFigures, DPOTrainer):
    """TRL's trainer, on pairs that are already tokenised. The loss of a step is the mean over all its pairs."""

    loss_name = "preference_loss"
    spec: DPOSpec

    def __init__(self, prepared: Prepared[DPOSpec], args: DPOConfig, ref_model: PreTrainedModel | None = None) -> None:
        self._reference_batches: liveness.Counter | None = None
        with hashing_counted():
            collator: PairCollator | ImageCollator = PairCollator(pad_token_id=prepared.base.tokenizer.pad_token_id)
            if (images := prepared.base.images) is not None:
                collator = ImageCollator(collator, images, repeats=2)
            super().__init__(prepared, args, ref_model=ref_model, data_collator=collator)
        smoothing = self.spec.options.label_smoothing
        if self.spec.loss_type == "sigmoid" and smoothing > 0:  # TRL's "sigmoid" ignores it
            self.loss_types, self.label_smoothing = ["robust"], as_robust(smoothing)
        own_reference(self.model)
        self.work = self.step_flops()  # again: the first count included TRL's copy of the adapter
        if ref_model is not None and needs_plain_head(ref_model):  # TRL gave it its own head, as it did the policy
            set_plain_head(ref_model)

    def _prepare_dataset(self, dataset: Dataset, *_: object) -> Dataset:
        """Return the rows as they are: TRL 1.16 would render and tokenise them again."""
        return dataset

    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        """Compute them as TRL does, and report progress."""
        title = f"computing the reference's log-probabilities ({name})"
        batches = math.ceil(len(dataset) / (batch_size * self.peers.size))
        with liveness.stage(title, batches, "batches") as self._reference_batches:
            found: Dataset = super()._precompute_ref_logps(dataset, name, batch_size)
            return found

    def compute_ref_log_probs(self, model: nn.Module, inputs: Batch) -> tuple[Tensor, Tensor]:
        """Compute them for one batch as TRL does.

        TRL's constructor may call this, before `__init__` has set the reference.
        """
        own_reference(self.model)
        inputs = {name: value for name, value in inputs.items() if name != domains.COLUMN}
        found: tuple[Tensor, Tensor] = super().compute_ref_log_probs(model, inputs)
        if self._reference_batches is not None:
            self._reference_batches.advance()
        return found

    def step_flops(self) -> StepFlops:
        """The policy's pass, and the reference's unless it was computed ahead."""
        return count_flops(self.model, self.layout, references=0 if self.precompute_ref_logps else 1)

    def rows_of(self, inputs: Batch) -> int:
        """The number of pairs."""
        return pairs_of(inputs)

    def figure_weights(self, inputs: Batch) -> dict[str, float]:
        """The number of pairs, or of tokens in both answers or one; the model's aux loss counts once a micro-batch."""
        chosen, rejected = inputs["completion_mask"][:, 1:].sum(dim=1).view(2, -1).sum(dim=1).tolist()
        pairs = ("chosen", "rejected", "accuracies", "margins")
        return {
            **{f"rewards/{name}": pairs_of(inputs) for name in pairs},
            **{f"logps/{name}": pairs_of(inputs) for name in pairs[:2]},
            "entropy": chosen + rejected,
            "mean_token_accuracy": chosen,
            "logits/chosen": chosen,
            "logits/rejected": rejected,
            "aux_loss": 1.0,
        }

    def tally(self, held_out: HeldOut, inputs: Batch, loss: float) -> None:
        """Add a micro-batch: TRL's loss is the mean over pairs, and perplexity is per token of the chosen answers."""
        chosen_BT, _ = inputs["completion_mask"][:, 1:].chunk(2)
        pairs = pairs_of(inputs)
        held_out.loss += loss * pairs
        held_out.weight += pairs
        # TRL has just computed it: each answer's summed log-probability, averaged over the micro-batch's pairs.
        held_out.nll -= self._metrics["eval"]["logps/chosen"][-1] * pairs
        held_out.tokens += chosen_BT.sum().item()


def pairs_of(inputs: Batch) -> int:
    """The number of pairs in a micro-batch. Its rows are the chosen answers, then the rejected ones."""
    return int(inputs["completion_mask"].shape[0]) // 2


def run(session: Session[DPOSpec]) -> Manifest:
    """Load the model, tokenise the rows, add the adapter, train, and save."""
    spec = session.spec
    base = backend_of(spec).load(session)
    without_dropout(base.model)
    prepared = prepare(session, base, dpo_rows(session, base.tokenizer, base.vocabulary, base.images))
    held = require_determinism(session, prepared.model)
    ahead = reference_ahead(spec)
    reference = None if spec.adapter is not None or ahead else load_reference(session, base)
    trainer = DPO(
        prepared,
        DPOConfig(
            **arguments(prepared),
            router_aux_loss_coef=base.resolved.models_aux_coef,
            beta=spec.beta,
            loss_type=[spec.loss_type],
            label_smoothing=spec.options.label_smoothing,
            precompute_ref_log_probs=ahead,
            disable_dropout=False,  # done above, because this would disable the adapter's dropout too
            max_length=None,  # rows were cut to length when they were tokenised
            remove_unused_columns=False,  # TRL does not know the columns that PairCollator reads
        ),
        ref_model=reference,
    )
    kind = "a second copy" if reference is not None else "the adapter off" if spec.adapter else "the untrained model"
    decisions = {"loss_type": spec.loss_type, "beta": spec.beta, "reference": kind, "reference_computed_ahead": ahead,
                 "held_in_evaluation_mode": held}  # fmt: skip
    return fit(prepared, trainer, decisions)


@contextmanager
def hashing_counted() -> Iterator[None]:
    """Report progress while TRL (1.16) hashes the model, to name the log-probabilities that it computes ahead."""
    before = dpo_trainer.hash_module
    dpo_trainer.hash_module = _hash_of_weights
    try:
        yield
    finally:
        dpo_trainer.hash_module = before


def _hash_of_weights(module: nn.Module) -> str:
    """The same hash as `trl.trainer.utils.hash_module`."""
    digest = hashlib.sha256()
    weights = sorted(module.state_dict().items())
    for _, tensor in liveness.counted("hashing weights", weights, len(weights), "tensors"):
        here = tensor.cpu()
        digest.update(str(here.dtype).encode())
        if here.dtype in (torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2):
            here = here.to(torch.float32)
        digest.update(here.numpy().tobytes())
    return digest.hexdigest()
