"""Supervised fine-tuning: cross entropy over the answers' tokens (or all tokens), plus the routers' balance terms."""

from dataclasses import asdict

from trl import SFTConfig, SFTTrainer

from llama_stack_provider_moe.compute.data.datasets import sft_rows
from llama_stack_provider_moe.compute.models.backend import backend_of
from llama_stack_provider_moe.compute.runtime.context import Session
from llama_stack_provider_moe.compute.train.fit import arguments, fit
from llama_stack_provider_moe.compute.train.held_out import HeldOut
from llama_stack_provider_moe.compute.train.packing_probe import require_independent_rows
from llama_stack_provider_moe.compute.train.prepared import Batch, prepare
from llama_stack_provider_moe.compute.train.step_figures import StepFigures
from llama_stack_provider_moe.compute.train.trainer import RecordingTrainer
from llama_stack_provider_moe.jobdir.folder import Manifest
from llama_stack_provider_moe.spec import SFTSpec


class SFT(RecordingTrainer, StepFigures, SFTTrainer):
    """TRL's trainer, on rows that are already tokenised and labelled."""

    loss_name = "ce"
    logs_domain_losses = True

    def figure_weights(self, inputs: Batch) -> dict[str, float]:
        """The number of labelled tokens; the model's aux loss counts once for each micro-batch."""
        tokens = float(labelled(inputs))
        return {"entropy": tokens, "mean_token_accuracy": tokens, "aux_loss": 1.0}

    def tally(self, held_out: HeldOut, inputs: Batch, loss: float) -> None:
        """Add a micro-batch. TRL's loss is the mean over its labelled tokens."""
        tokens = labelled(inputs)
        held_out.loss += loss * tokens
        held_out.weight += tokens
        held_out.nll += loss * tokens
        held_out.tokens += tokens


def labelled(inputs: Batch) -> int:
    """The number of tokens of a batch that are predicted and have a label."""
    return int((inputs["labels"][:, 1:] != -100).sum())


def run(session: Session[SFTSpec]) -> Manifest:
    """Load the model, tokenise the rows, add the adapter, train, and save."""
    spec = session.spec
    base = backend_of(spec).load(session)
    prepared = prepare(session, base, sft_rows(session, base.tokenizer, base.vocabulary))
    gap = require_independent_rows(session, prepared.model) if spec.data.packed else None
    trainer = SFT(
        prepared,
        SFTConfig(
            **arguments(prepared),
            router_aux_loss_coef=base.resolved.models_aux_coef,
            packing=spec.data.packed,
            eval_packing=False,
            # Rows were cut to length when they were tokenised; for packing, TRL needs the length again.
            max_length=spec.options.max_length if spec.data.packed else None,
        ),
    )
    return fit(prepared, trainer, {"packed_rows_differ_by": None if gap is None else asdict(gap)})
