"""What every recipe hands to its trainer: the model, ready to train, its rows, and what was decided about both."""

from collections.abc import Mapping
from dataclasses import dataclass

from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from llama_stack_provider_moe.compute.data.datasets import Rows
from llama_stack_provider_moe.compute.data.positions import tell_long_rows
from llama_stack_provider_moe.compute.models.generation_ends import stop_at
from llama_stack_provider_moe.compute.models.prepare import Base, adapt
from llama_stack_provider_moe.compute.moe.adapters import AdapterReport
from llama_stack_provider_moe.compute.moe.rates import Rates
from llama_stack_provider_moe.compute.runtime.context import Session
from llama_stack_provider_moe.spec import TrainingSpec

Batch = dict[str, Tensor]  # a micro-batch, by the names of the model's inputs
Outcome = tuple[Tensor | None, ...]  # what `prediction_step` returns: loss, logits, labels
Loss = Tensor | tuple[Tensor, ModelOutput]  # what a trainer's `compute_loss` returns


@dataclass(frozen=True)
class Prepared[S: TrainingSpec]:
    """A loaded model with its adapter, and its tokenised rows.

    Attributes:
        base: the loaded model, and what was decided when it was loaded.
        rows: for training and for evaluation.
        model: `base.model` with its adapter; the same where all weights train.
        report: which weights train.
        rates: the learning rates of the job's parameter groups.
        long_rows: how rows compare with the positions that the model was trained on; for `resolved.json`.
    """

    session: Session[S]
    base: Base
    rows: Rows
    model: PreTrainedModel | PeftModel
    report: AdapterReport
    rates: Rates
    long_rows: Mapping[str, object]


AnyPrepared = Prepared[TrainingSpec]


def prepare[S: TrainingSpec](session: Session[S], base: Base, rows: Rows, answer: int = 0) -> Prepared[S]:
    """Warn of rows that are too long for the model, let it stop where its rows end, and put the adapter on it.

    Args:
        session: the job's.
        base: its loaded model.
        rows: its tokenised rows.
        answer: largest number of tokens that the model writes after each.
    """
    long_rows = tell_long_rows(session, base.model, rows, answer)
    if stops := stop_at(base.model, base.tokenizer, rows.ends):
        session.say(stops)
    model, report, rates = adapt(session, base)
    return Prepared(session, base, rows, model, report, rates, long_rows)
