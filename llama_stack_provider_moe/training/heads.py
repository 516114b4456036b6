"""An output head for TRL's trainers where its own can't be used.

TRL 1.16 never makes the whole logits: it multiplies hidden states with `lm_head.weight` in tiles. That reads past an
adapter on the head (TRL refuses one), and needs a backbone apart from the head (Llama 4's is not found:
`base_model_prefix` names a part of the composite model). And a head that processes share out apart from the final norm
is in parts when TRL reads it: TRL gathers it, and each process keeps its own gradient of it, of its rows alone.
There, this head runs the model as it is and takes the same
figures from its logits, at the price of their memory: batch x length x vocabulary, in fp32.
Remove when TRL goes through the head's own forward.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel
from trl.trainer.utils import FusedCausalLMOutput


def base_of(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """The transformers model inside an adapter, or the model itself."""
    base: PreTrainedModel = model.get_base_model() if isinstance(model, PeftModel) else model
    return base


def needs_plain_head(model: PreTrainedModel | PeftModel) -> bool:
    """True where TRL's head would miss an adapter, find no backbone, or lose gradients."""
    base = base_of(model)
    return isinstance(base.get_output_embeddings(), BaseTunerLayer) or base.base_model is base or _lies_apart(base)


def _lies_apart(base: Any) -> bool:
    """Whether FSDP2 gathers the output head for its own forward alone, which TRL never runs.

    transformers 5.23 (`is_norm_and_head_pair`) has it gathered with the final norm, where that is called so; a head
    that is tied is gathered with the embedding.
    """
    head, embedding = base.get_output_embeddings(), base.get_input_embeddings()
    tied = head is not None and embedding is not None and head.weight is embedding.weight
    if tied or not isinstance(head, FSDPModule):
        return False
    return not any(
        isinstance(module, FSDPModule) and name.rpartition(".")[2] == "norm" for name, module in base.named_modules()
    )


@contextmanager
def head_without_adapter(model: PreTrainedModel | PeftModel) -> Iterator[None]:
    """For the time of a TRL trainer's constructor, which refuses an adapter on the head, show it the bare head."""
    base = base_of(model)
    head = base.get_output_embeddings()
    if not isinstance(head, BaseTunerLayer):
        yield
        return
    base.get_output_embeddings = head.get_base_layer
    try:
        yield
    finally:
        del base.get_output_embeddings


def set_plain_head(model: PreTrainedModel | PeftModel) -> None:
    """Answer `model(..., labels=labels, fused_lm_head=True)`, TRL's call, from the model's own logits."""
    base = base_of(model)
    inner = base.forward  # TRL's patch, which passes every other call through

    def forward(self: Any, *args: Any, fused_lm_head: bool = False, labels: Tensor | None = None, **kwargs: Any) -> Any:
        if not fused_lm_head or labels is None:
            given = {} if labels is None else {"labels": labels}
            return inner(*args, **given, **kwargs)
        outputs = inner(*args, **{**kwargs, "use_cache": False})
        aux_loss = outputs.aux_loss if kwargs.get("output_router_logits") else None
        return token_figures(outputs.logits[:, :-1], labels[:, 1:], aux_loss)

    base.forward = MethodType(forward, base)


def token_figures(logits_BTV: Tensor, labels_BT: Tensor, aux_loss: Tensor | None = None) -> FusedCausalLMOutput:
    """What TRL's head returns, zero where the label is -100; labels are already shifted."""
    mask_BT = labels_BT != -100
    log_softmax_BTV = logits_BTV.float().log_softmax(dim=-1)
    picked_BT = log_softmax_BTV.gather(-1, labels_BT.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    log_probs_BT = picked_BT.masked_fill(~mask_BT, 0)
    with torch.no_grad():
        entropy_BT = -(log_softmax_BTV.exp() * log_softmax_BTV).sum(dim=-1)
        mean_logits_BT = logits_BTV.float().mean(dim=-1)
        is_top1_BT = logits_BTV.argmax(dim=-1) == labels_BT
    return FusedCausalLMOutput(
        loss=-log_probs_BT.sum() / mask_BT.sum().clamp(min=1),
        log_probs=log_probs_BT,
        entropy=entropy_BT.masked_fill(~mask_BT, 0),
        mean_logits=mean_logits_BT.masked_fill(~mask_BT, 0),
        is_top1=is_top1_BT & mask_BT,
        label_mask=mask_BT,
        aux_loss=aux_loss,
    )
