"""Kahneman-Tversky optimisation (Ethayarajh et al. 2024, arXiv 2402.01306): answers with a thumb up or down.

The reference is the model with its adapter off, or a second, frozen copy if all weights train. The KL term is over the
rows of a micro-batch, each prompt with the answer to the prompt before. The model's own dropout is off in all passes.
"""

from collections.abc import Mapping
from contextlib import nullcontext
from itertools import batched

from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel
from trl import KTOConfig, KTOTrainer

from llama_stack_provider_moe.compute.data.batch_sharing import SharedRuns
from llama_stack_provider_moe.compute.data.sampling import EpochSampler, rows_an_epoch
from llama_stack_provider_moe.compute.data.thumb_rows import ThumbCollator, kto_rows, thumbs
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
from llama_stack_provider_moe.jobdir.folder import Manifest
from llama_stack_provider_moe.spec import KTOSpec


class KTO(RowMeans, StepFigures, KTOTrainer):
    """TRL's trainer, on rows that are already tokenised. The loss of a step is the mean over all its rows."""

    loss_name = "preference_loss"
    spec: KTOSpec

    def __init__(self, prepared: Prepared[KTOSpec], args: KTOConfig, ref_model: PreTrainedModel | None) -> None:
        pad = prepared.base.tokenizer.pad_token_id
        collator = ThumbCollator(pad_token_id=pad, max_length=prepared.session.spec.options.max_length)
        super().__init__(prepared, args, ref_model=ref_model, data_collator=collator)
        own_reference(self.model)
        self.work = self.step_flops()  # again: the first count included TRL's copy of the adapter
        if ref_model is not None and needs_plain_head(ref_model):
            set_plain_head(ref_model)

    def _prepare_dataset(self, dataset: Dataset, *_: object) -> Dataset:
        """Return the rows as they are: TRL 1.16 would render and tokenise them again."""
        return dataset

    @property
    def sequences(self) -> int:
        """Training rows of a full epoch, one fewer where the last micro-batch would have one row, and so no KL term."""
        return self.spec.with_kl(len(self.train_dataset))

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> EpochSampler:
        training, data = self.spec.training, self.spec.data
        most = rows_an_epoch(training, self.sequences)
        return EpochSampler(len(self.train_dataset), most, data.shuffle, self.spec.options.seed)

    def get_eval_dataloader(self, eval_dataset: Dataset | None = None) -> DataLoader[Batch]:
        """A loader of micro-batches of at least two rows: a last one of one row joins the one before."""
        rows = self.eval_dataset if eval_dataset is None else eval_dataset
        runs = [*batched(range(len(rows)), self.args.per_device_eval_batch_size)]
        if len(runs) > 1 and len(runs[-1]) == 1:
            runs[-2:] = [runs[-2] + runs[-1]]
        return self._share(rows, SharedRuns(runs, self.peers))

    def _compute_kl_logps(self, model: nn.Module, batch: Batch) -> Tensor:
        """TRL's; these passes are over other sequences than those whose routing is recorded."""
        with nullcontext() if self.recorder is None else self.recorder.paused():
            found: Tensor = super()._compute_kl_logps(model, batch)
            return found

    def step_flops(self) -> StepFlops:
        """The policy's pass, and without gradients the reference's and those of both over mismatched answers."""
        return count_flops(self.model, self.layout, references=3)

    def rows_of(self, inputs: Batch) -> int:
        """The number of rows."""
        return len(inputs["label"])

    def figure_weights(self, inputs: Batch) -> dict[str, float]:
        """The number of rows of a class, of rows, or of tokens; the margin is of the step's means (`derived`)."""
        tokens_B, up_B = inputs["completion_mask"][:, 1:].sum(dim=1), inputs["label"].bool()
        found = {"kl": float(len(up_B)), "entropy": float(tokens_B.sum()), "aux_loss": 1.0, "rewards/margins": 0.0}
        for name, of_B in (("chosen", up_B), ("rejected", ~up_B)):
            found |= {f"rewards/{name}": float(of_B.sum()), f"logps/{name}": float(of_B.sum())}
            found[f"logits/{name}"] = float(tokens_B[of_B].sum())
        return found

    def derived(self, figures: Mapping[str, float]) -> dict[str, float]:
        """The margin between the mean rewards of both classes."""
        both = [figures.get(f"rewards/{name}") for name in ("chosen", "rejected")]
        return {} if both[0] is None or both[1] is None else {"rewards/margins": both[0] - both[1]}

    def tally(self, held_out: HeldOut, inputs: Batch, loss: float) -> None:
        """Add a micro-batch: TRL's loss is the mean over rows; perplexity is per token of answers with a thumb up."""
        up_B = inputs["label"].bool()
        held_out.loss += loss * len(up_B)
        held_out.weight += len(up_B)
        if up_B.any():
            held_out.nll -= self._metrics["eval"]["logps/chosen"][-1] * int(up_B.sum())
            held_out.tokens += int(inputs["completion_mask"][up_B, 1:].sum())


def run(session: Session[KTOSpec]) -> Manifest:
    """Load the model, tokenise the rows, add the adapter, train, and save."""
    spec = session.spec
    base = backend_of(spec).load(session)
    without_dropout(base.model)
    rows = kto_rows(session, base.tokenizer, base.vocabulary)
    prepared = prepare(session, base, rows)
    held = require_determinism(session, prepared.model)
    reference = load_reference(session, base) if spec.adapter is None else None
    trainer = KTO(
        prepared,
        KTOConfig(
            **arguments(prepared),
            router_aux_loss_coef=base.resolved.models_aux_coef,
            beta=spec.beta,
            desirable_weight=spec.desirable_weight,
            undesirable_weight=spec.undesirable_weight,
            train_sampling_strategy="sequential",  # TRL asks for it; `_get_train_sampler` decides
            disable_dropout=False,  # done above, because this would disable the adapter's dropout too
            max_length=None,  # rows were cut to length when they were tokenised
            remove_unused_columns=False,  # TRL does not know the columns that ThumbCollator reads
        ),
        reference,
    )
    up, down = thumbs(rows.train)
    kind = "a second copy" if reference is not None else "the adapter off"
    ratio = spec.desirable_weight * up / (spec.undesirable_weight * down)
    if not 1 <= round(ratio, 2) <= 1.33:
        session.say(f"desirable_weight x {up} thumbs up / (undesirable_weight x {down} thumbs down) is {ratio:.3g}; "
                    "arXiv 2402.01306, eq. 8, advises 1 to 4/3", "warning")  # fmt: skip
    decisions = {"beta": spec.beta, "desirable_weight": spec.desirable_weight, "thumbs_up": up,
                 "undesirable_weight": spec.undesirable_weight, "thumbs_down": down, "reference": kind,
                 "held_in_evaluation_mode": held}  # fmt: skip
    shown = (f"thumbs    {up:,} up x {spec.desirable_weight:g}, {down:,} down x {spec.undesirable_weight:g}; "
             f"reference: {kind}")  # fmt: skip
    return fit(prepared, trainer, decisions, shown)
