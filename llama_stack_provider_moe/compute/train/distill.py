"""The teacher of a job that distils: another model, or the trained model with its adapter off.

The teacher runs first, without gradients and in evaluation mode, so that an adapter is never switched between a pass
and its backward. The model's output head then returns, for each learnt token, the distilled term in the place of its
log-probability (`methods.distillation`); TRL's trainer sums those up as ever, over micro-batches and processes.

Shapes: B rows, T tokens of a row, N learnt tokens of a micro-batch, V vocabulary.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import MethodType
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from llama_stack_provider_moe.compute.methods.distillation import distilled_log_prob, kl_from_teacher
from llama_stack_provider_moe.compute.models.heads import base_of, token_figures
from llama_stack_provider_moe.compute.models.loader import DTYPES, load_weights, model_config, tokenizer_of
from llama_stack_provider_moe.compute.models.prepare import Base
from llama_stack_provider_moe.compute.moe.layout import text_config
from llama_stack_provider_moe.compute.runtime.context import Session
from llama_stack_provider_moe.compute.train.prepared import Batch
from llama_stack_provider_moe.errors import ModelError
from llama_stack_provider_moe.spec import DType, SFTSpec
from llama_stack_provider_moe.spec.distill import Distill

# Text in which tokenizers with equal vocabularies but other rules would differ.
_SAMPLE = "The 3 experts' gates:\n\tx_1 += 2.50; Größe, 模型 <b>ok</b>  end."


class Distillation:
    """Runs the teacher, and puts its term into what the model's head returns.

    Args:
        asked: the job's block.
        teacher: a frozen model; None: the trained model with its adapter off.
    """

    def __init__(self, asked: Distill, teacher: PreTrainedModel | None) -> None:
        self.asked = asked
        self.teacher = teacher
        self.ce = 0.0  # of the newest micro-batch: means over its learnt tokens, in nats
        self.kl = 0.0
        self._teacher_NV: Tensor | None = None

    @property
    def kind(self) -> str:
        """What the teacher is, for a person."""
        if self.teacher is None:
            return "the model with its adapter off"
        return "a frozen copy of the model" if self.asked.model is None else self.asked.model

    def ask(
        self, model: PreTrainedModel | PeftModel, inputs: Batch, autocast: AbstractContextManager[None]
    ) -> None:  # fmt: skip
        """Run the teacher on a micro-batch, and keep its logits at the tokens that are learnt.

        Args:
            model: the trained model.
            inputs: the micro-batch.
            autocast: under which models run.
        """
        learnt_BT = inputs["labels"][:, 1:] != -100
        with torch.no_grad(), autocast, self._as_teacher(model) as teacher:
            logits_BTV = teacher(
                input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False
            ).logits
        self._teacher_NV = logits_BTV[:, :-1][learnt_BT.to(logits_BTV.device)]

    @contextmanager
    def _as_teacher(self, model: PreTrainedModel | PeftModel) -> Iterator[PreTrainedModel | PeftModel]:
        if self.teacher is not None:
            yield self.teacher
            return
        assert isinstance(model, PeftModel), "without an adapter the teacher is a copy"
        training = model.training
        try:
            with model.disable_adapter():
                yield model.eval()
        finally:
            model.train(training)

    def set_head(self, model: PreTrainedModel | PeftModel, note: Callable[[], None]) -> None:
        """Make TRL's call of the model, with labels and `fused_lm_head`, return distilled terms.

        Args:
            model: the trained model, as TRL has patched it.
            note: called after each such pass, when `ce` and `kl` are those of its tokens.
        """
        base = base_of(model)
        inner = base.forward

        def forward(
            _: Any, *args: Any, fused_lm_head: bool = False, labels: Tensor | None = None, **kwargs: Any
        ) -> Any:  # fmt: skip
            if not fused_lm_head or labels is None:
                return inner(*args, **({} if labels is None else {"labels": labels}), **kwargs)
            outputs = inner(*args, **{**kwargs, "use_cache": False})
            aux_loss = outputs.aux_loss if kwargs.get("output_router_logits") else None
            figures = token_figures(outputs.logits[:, :-1], labels[:, 1:], aux_loss)
            figures.log_probs = self._distilled(outputs.logits[:, :-1], figures.log_probs, figures.label_mask)
            note()
            return figures

        base.forward = MethodType(forward, base)

    def _distilled(self, logits_BTV: Tensor, log_probs_BT: Tensor, learnt_BT: Tensor) -> Tensor:
        teacher_NV, self._teacher_NV = self._teacher_NV, None
        assert teacher_NV is not None, "the teacher has seen this micro-batch"
        kl_N = kl_from_teacher(logits_BTV[learnt_BT], teacher_NV.to(logits_BTV.device), self.asked.temperature)
        tokens = max(1, len(kl_N))
        self.ce, self.kl = -float(log_probs_BT.detach().sum()) / tokens, float(kl_N.detach().sum()) / tokens
        kl_BT = torch.zeros_like(log_probs_BT).masked_scatter(learnt_BT, kl_N.to(log_probs_BT.dtype))
        return distilled_log_prob(log_probs_BT, kl_BT, self.asked.weight, self.asked.temperature)


def distillation_of(session: Session[SFTSpec], base: Base) -> Distillation | None:
    """Load the teacher that a job names, if it names one; call this before the adapter is put on the model.

    Args:
        session: the job's.
        base: its loaded model.

    Raises:
        ModelError: the teacher can't be loaded, or has another tokenizer or vocabulary.
    """
    spec = session.spec
    if spec.distill is None:
        return None
    asked, teacher = spec.distill, None
    if asked.model is not None:
        teacher = load_teacher(asked.model, "distill.model", spec.training.dtype, base)
    elif spec.adapter is None:
        teacher = _frozen(spec.model, model_config(spec.model), spec.training.dtype, base)
    made = Distillation(asked, teacher)
    held = 0 if teacher is None else sum(each.nbytes for each in teacher.parameters())
    session.say(f"distilling from {made.kind} ({held:,} bytes more): weight {asked.weight:g}, temperature "
                f"{asked.temperature:g}")  # fmt: skip
    return made


def load_teacher(name: str, field: str, dtype: DType, base: Base) -> PreTrainedModel:
    """Load another model, frozen and in evaluation mode, whose probabilities are of the same tokens.

    Args:
        name: a folder or hub id.
        field: of the job that names it, for errors.
        dtype: of its weights.
        base: the job's loaded model.

    Raises:
        ModelError: it can't be loaded, or has another tokenizer or vocabulary.
    """
    config = model_config(name)
    _check_vocabulary(name, field, int(config.get_text_config().vocab_size), base)
    _check_tokenizer(name, field, tokenizer_of(name, None, template_needed=False), base.tokenizer)
    return _frozen(name, config, dtype, base)


def _frozen(name: str, config: PreTrainedConfig, dtype: DType, base: Base) -> PreTrainedModel:
    teacher = load_weights(name, config, DTYPES[dtype], base.device).eval().requires_grad_(False)
    text_config(teacher).output_router_logits = False
    return teacher


def _check_vocabulary(name: str, field: str, theirs: int, base: Base) -> None:
    if theirs != base.vocabulary:
        raise ModelError(f"{field}: {name!r} has a vocabulary of {theirs:,}, and the model one of "
                         f"{base.vocabulary:,}; expected the same")  # fmt: skip


def _check_tokenizer(name: str, field: str, theirs: PreTrainedTokenizerBase, ours: PreTrainedTokenizerBase) -> None:
    same = theirs.get_vocab() == ours.get_vocab()
    if not same or theirs(_SAMPLE)["input_ids"] != ours(_SAMPLE)["input_ids"]:
        raise ModelError(f"{field}: {name!r} has another tokenizer than the model, so its probabilities are of "
                         "other tokens; expected the same")  # fmt: skip
