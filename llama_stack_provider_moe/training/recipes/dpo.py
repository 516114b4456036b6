"""Direct preference optimisation (Rafailov et al. 2023, arXiv 2305.18290), and the losses that grew from it.

The reference is the model with its adapter off. Where all weights train it is a second, frozen copy, unless its
log-probabilities are computed ahead (`options.precompute_ref_log_probs`), which an untrained model can do itself.
Dropout of the model's own is off in both passes; an adapter's dropout, where asked for, acts on the policy alone.
"""

from dataclasses import replace
from typing import Any

from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel
from trl import DPOConfig, DPOTrainer
from trl.trainer.utils import disable_dropout_in_model

from llama_stack_provider_moe.experts.layout import text_config
from llama_stack_provider_moe.experts.rates import Rates
from llama_stack_provider_moe.experts.settings import apply_moe
from llama_stack_provider_moe.jobs.folder import Manifest
from llama_stack_provider_moe.spec import DPOSpec
from llama_stack_provider_moe.training.data import dpo_rows
from llama_stack_provider_moe.training.loader import load_model, load_sharded
from llama_stack_provider_moe.training.plan import announce
from llama_stack_provider_moe.training.session import Session
from llama_stack_provider_moe.training.sharing import Share
from llama_stack_provider_moe.training.stages import Base, adapt, arguments, fit, load_base
from llama_stack_provider_moe.training.throughput import Work, work_of
from llama_stack_provider_moe.training.trainer import HeldOut, RecordingTrainer


class DPO(RecordingTrainer, DPOTrainer):
    """TRL's trainer, on pairs that are tokenised already."""

    def __init__(self, *, model: Any, **arguments: Any) -> None:
        super().__init__(model=model, **arguments)
        # TRL 1.16 copies the adapter as a second, frozen one. A fresh adapter adds nothing yet, so switching it off
        # gives the same reference without the copy, which every checkpoint would carry along.
        if isinstance(model, PeftModel) and "ref" in model.peft_config:
            model.delete_adapter("ref")

    def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
        """TRL 1.16 renders and tokenises whatever it is given; these rows are done."""
        return dataset

    def work_of_a_step(self) -> Work:
        """The reference's pass beside the policy's, unless that was computed ahead."""
        return work_of(self.model, self.layout, references=0 if self.precompute_ref_logps else 1)

    def weigh(self, loss: Tensor, share: Share) -> Tensor:
        """TRL's loss is the mean over this process's pairs."""
        return loss * (share.mine * self.peers.size / share.of_all)

    def tally(self, held_out: HeldOut, inputs: dict[str, Any], loss: float) -> None:
        """TRL's loss is the mean over pairs; perplexity is of the chosen answers, by token."""
        chosen_BT, _ = inputs["completion_mask"][:, 1:].chunk(2)
        pairs = chosen_BT.shape[0]
        held_out.loss += loss * pairs
        held_out.weight += pairs
        # Mean over the batch's pairs of each answer's summed log-probability, as TRL has just computed it.
        held_out.nll -= self._metrics["eval"]["logps/chosen"][-1] * pairs
        held_out.tokens += chosen_BT.sum().item()


def run(session: Session[DPOSpec]) -> Manifest:
    """Load, adapt, batch, train, save."""
    spec = session.spec
    base = load_base(session)
    disable_dropout_in_model(base.model)
    rows = dpo_rows(session, base.tokenizer, base.vocabulary)
    ahead = reference_ahead(spec)
    model, report, rates = adapt(session, base)
    reference = None if spec.adapter is not None or ahead else load_reference(session, base)
    trainer = DPO(
        spec=spec,
        peers=session.peers,
        experts=base.experts,
        layout=base.layout,
        resolved=base.resolved,
        shipped=base.shipped,
        steering=base.steering,
        rates=rates,
        model=model,
        ref_model=reference,
        args=DPOConfig(
            **arguments(session, base),
            router_aux_loss_coef=base.resolved.models_aux_coef,
            beta=spec.beta,
            loss_type=[spec.loss_type],
            label_smoothing=spec.options.label_smoothing,
            precompute_ref_log_probs=ahead,
            disable_dropout=False,  # done above, before an adapter's dropout was there to be disabled
            max_length=None,  # rows are cut to length when they are tokenised
        ),
        train_dataset=rows.train,
        eval_dataset=rows.validation,
        processing_class=base.tokenizer,
    )
    kind = "a second copy" if reference is not None else "the adapter off" if spec.adapter else "the untrained model"
    decided = {"loss_type": spec.loss_type, "beta": spec.beta, "reference": kind, "reference_computed_ahead": ahead}
    steps = announce(session, base, report, rows, len(trainer.train_dataset), decided)
    return fit(session, base, trainer, steps)


def reference_ahead(spec: DPOSpec) -> bool:
    """Whether the reference's log-probabilities are computed once, before training.

    Biases that move (`aux_free`) are not the reference's; experts that choose tokens (`expert_choice`) do so in a
    training step alone, and the reference must see what the policy sees. Of a base that processes share TRL can't make
    the fingerprint by which it keeps them.
    """
    asked, balancing = spec.options.precompute_ref_log_probs, spec.moe.moe_load_balancing
    if balancing == "aux_free":
        return True
    if balancing == "expert_choice" or spec.resources.sharded:
        return False
    return spec.training.n_epochs > 1 if asked is None else asked


def load_reference(session: Session[DPOSpec], base: Base) -> PreTrainedModel:
    """A frozen copy of the untrained model that runs its experts as the policy does."""
    spec, config = session.spec, type(base.model.config).from_pretrained(session.spec.model)
    by_fsdp = spec.resources.strategy == "fsdp"
    model = load_sharded(spec, config) if by_fsdp else load_model(spec, config, base.device)
    if base.experts is not None:
        model.requires_grad_(False)
        base.experts.set_aside(model)
        base.experts.take(model, Rates())
    apply_moe(model, base.layout, replace(base.resolved, expert_dropout=0.0))
    text_config(model).output_router_logits = False  # TRL would compute an aux loss of it, and drop it
    disable_dropout_in_model(model)
    if base.steering is not None:
        base.steering.attach(model)
    return model.requires_grad_(False)
