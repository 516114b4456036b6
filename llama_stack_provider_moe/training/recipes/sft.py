"""Supervised fine-tuning: cross entropy of the answers' tokens (or of all), plus the routers' balance terms."""

from typing import Any

from trl import SFTConfig, SFTTrainer

from llama_stack_provider_moe.errors import ModelError
from llama_stack_provider_moe.jobs.folder import Manifest
from llama_stack_provider_moe.spec import SFTSpec
from llama_stack_provider_moe.training.data import sft_rows
from llama_stack_provider_moe.training.plan import announce
from llama_stack_provider_moe.training.session import Session
from llama_stack_provider_moe.training.stages import Base, adapt, arguments, fit, load_base
from llama_stack_provider_moe.training.trainer import HeldOut, RecordingTrainer


class SFT(RecordingTrainer, SFTTrainer):
    """TRL's trainer, on rows that are tokenised and labelled already."""

    def tally(self, held_out: HeldOut, inputs: dict[str, Any], loss: float) -> None:
        """TRL's loss of a batch is the mean over the tokens that have a label."""
        tokens = (inputs["labels"][:, 1:] != -100).sum().item()
        held_out.loss += loss * tokens
        held_out.weight += tokens
        held_out.nll += loss * tokens
        held_out.tokens += tokens


def run(session: Session[SFTSpec]) -> Manifest:
    """Load, adapt, batch, train, save."""
    spec = session.spec
    base = load_base(session)
    if spec.data.packed:
        refuse_leaks(base)
    rows = sft_rows(session, base.tokenizer, base.vocabulary)
    model, report, rates = adapt(session, base)
    trainer = SFT(
        spec=spec,
        peers=session.peers,
        experts=base.experts,
        layout=base.layout,
        resolved=base.resolved,
        shipped=base.shipped,
        steering=base.steering,
        rates=rates,
        model=model,
        args=SFTConfig(
            **arguments(session, base),
            router_aux_loss_coef=base.resolved.models_aux_coef,
            packing=spec.data.packed,
            eval_packing=False,
            # Rows are cut to length when they are tokenised; TRL asks for it again where it packs.
            max_length=spec.options.max_length if spec.data.packed else None,
        ),
        train_dataset=rows.train,
        eval_dataset=rows.validation,
        processing_class=base.tokenizer,
    )
    steps = announce(session, base, report, rows, len(trainer.train_dataset), {})
    return fit(session, base, trainer, steps)


def refuse_leaks(base: Base) -> None:
    """Packed rows are kept apart by attention masks; state that runs along the sequence knows no mask."""
    kinds = set(getattr(base.model.config, "layer_types", None) or ())
    leaking = sorted(kind for kind in kinds if not kind.endswith("attention") or kind == "linear_attention")
    if leaking or base.model._is_stateful:
        what = f"{', '.join(leaking)} layers" if leaking else "recurrent layers"
        raise ModelError(
            f"data.packed: true is not valid for this model: its {what} would carry one packed row into the next"
        )
