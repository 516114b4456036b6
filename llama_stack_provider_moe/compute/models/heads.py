"""An output head for TRL's trainers, for models that TRL's own head does not support.

TRL 1.16 never computes the whole logits: it multiplies hidden states by `lm_head.weight` in tiles. This fails in four
cases:

- It ignores an adapter on the head (TRL refuses one).
- It needs a backbone separate from the head. It does not find Llama 4's: `base_model_prefix` names a part of the
  composite model.
- With FSDP2 a head that is sharded apart from the final norm is in parts when TRL reads it. TRL gathers it, and each
  process keeps only the gradient of its own rows.
- It knows by names of config keys what a model does between hidden states and logits, and not every name (Inkling's).
  Here a short pass shows whether both give the same figures. A sharded model can't run it: there the outermost module
  runs alone, on random hidden states.

In these cases the plain head runs the model unchanged and computes the same figures from its logits. That needs memory
for the logits: batch x length x vocabulary, in fp32. Remove it when TRL calls the head's forward.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel
from trl.trainer.utils import FusedCausalLMOutput, add_fused_lm_head

_PLAIN = "_has_plain_head"
_TOKENS = 8
_WIDTH = 8  # of hidden states that stand for a model's
_SAME = 0.1  # of log-probabilities; rounding in bf16 gives up to 0.03 (measured on tiny models of every family)


def base_of(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """The transformers model inside a PEFT model, or the model itself."""
    base: PreTrainedModel = model.get_base_model() if isinstance(model, PeftModel) else model
    return base


def needs_plain_head(model: PreTrainedModel | PeftModel, temperature: float = 1.0) -> bool:
    """Whether TRL's head would ignore an adapter, find no backbone, lose gradients, or give other figures.

    Args:
        model: after TRL gave it a head.
        temperature: that TRL's head divides logits by.
    """
    base = base_of(model)
    has_adapter = isinstance(base.get_output_embeddings(), BaseTunerLayer)
    return has_adapter or base.base_model is base or _is_gathered_alone(base) or _differs(base, temperature)


def _differs(base: PreTrainedModel, temperature: float) -> bool:
    """Whether TRL's head, if the model has it, gives other figures than the model's own logits for a few tokens."""
    if "fused_lm_head" not in inspect.signature(base.forward, follow_wrapped=False).parameters:
        return False
    if any(isinstance(module, FSDPModule) for module in base.modules()):
        # Its parameters are in parts, and a pass outside of training would leave the wrong ones gathered.
        return differs_after_backbone(base)
    ids_BT = _ids(base).to(base.device)
    modes = {module: module.training for module in base.modules()}
    with torch.no_grad(), torch.random.fork_rng(devices=[base.device] if base.device.type == "cuda" else []):
        try:
            base.eval()
            by_trl_BT = base(input_ids=ids_BT, labels=ids_BT, fused_lm_head=True, use_cache=False).log_probs
            logits_BTV = base(input_ids=ids_BT, use_cache=False).logits
        finally:
            for module, training in modes.items():
                module.training = training
    return _unlike(by_trl_BT, logits_BTV / temperature, ids_BT)


def _ids(base: PreTrainedModel) -> Tensor:
    vocabulary = int(base.get_input_embeddings().weight.shape[0])
    return torch.tensor([[(7919 * (index + 1)) % vocabulary for index in range(_TOKENS)]])


def _unlike(log_probs_BT: Tensor, logits_BTV: Tensor, ids_BT: Tensor) -> bool:
    own_BT = token_figures(logits_BTV[:, :-1], ids_BT[:, 1:]).log_probs
    return bool((log_probs_BT - own_BT).abs().max() > _SAME)


def differs_after_backbone(base: PreTrainedModel) -> bool:
    """Whether TRL's head would give other figures for the same hidden states; no weight of the model is read.

    The outermost module, which turns hidden states into logits, is copied without its parts: the backbone of the copy
    gives random hidden states of a few numbers, and its head multiplies them by random weights.
    """
    head = base.get_output_embeddings()
    names = {id(child): name for name, child in base.named_children()}
    if id(head) not in names or base.base_model_prefix not in names.values():
        return True  # the logits come from within a part, where this can't look
    random = torch.Generator().manual_seed(0)
    states_BTD = torch.randn(1, _TOKENS, _WIDTH, generator=random)
    with torch.device("cpu"):
        small = nn.Linear(_WIDTH, int(head.weight.shape[0]), bias=head.bias is not None)
    with torch.no_grad():
        for parameter in small.parameters():  # logits spread by some 10: less would hide a soft cap
            parameter.copy_(torch.randn(parameter.shape, generator=random) * 10 / _WIDTH**0.5)
    copied = _outermost(base, {base.base_model_prefix: _GivenStates(states_BTD), names[id(head)]: small})
    vars(copied)["get_output_embeddings"] = lambda: small  # transformers looks for it below the backbone too
    add_fused_lm_head(copied)
    ids_BT = _ids(base)
    with torch.no_grad():
        by_trl_BT = copied(input_ids=ids_BT, labels=ids_BT, fused_lm_head=True, use_cache=False).log_probs
        logits_BTV = copied(input_ids=ids_BT, use_cache=False).logits
    return _unlike(by_trl_BT, logits_BTV, ids_BT)


class _GivenStates(nn.Module):
    """A backbone whose hidden states are given, and whose every other output is None."""

    class Outputs:
        """What a model's forward reads of its backbone's outputs."""

        def __init__(self, states_BTD: Tensor) -> None:
            self.last_hidden_state = states_BTD

        def __getattr__(self, name: str) -> None:
            return None

        def __getitem__(self, index: int) -> Tensor | None:
            return self.last_hidden_state if index == 0 else None

    def __init__(self, states_BTD: Tensor) -> None:
        super().__init__()
        self.states_BTD = states_BTD

    def forward(self, *_: object, **__: object) -> "_GivenStates.Outputs":
        """The given states, whatever the input."""
        return self.Outputs(self.states_BTD)


def _outermost(base: PreTrainedModel, parts: dict[str, nn.Module]) -> PreTrainedModel:
    """A copy of the outermost module with other parts, without hooks, and of the class that FSDP2 has replaced."""
    kind = next(each for each in type(base).__mro__ if not issubclass(each, FSDPModule))
    copied: PreTrainedModel = kind.__new__(kind)
    nn.Module.__init__(copied)
    fresh = vars(copied).keys() | {"forward"}
    vars(copied).update({name: value for name, value in vars(base).items() if name not in fresh})
    for name, child in base.named_children():
        copied.add_module(name, parts.get(name, child))
    return copied.eval()


def _is_gathered_alone(base: PreTrainedModel) -> bool:
    """Whether FSDP2 gathers the output head only for the head's own forward, which TRL never runs.

    transformers 5.23 (`is_norm_and_head_pair`) gathers it together with the final norm if that module is named so; a
    tied head is gathered with the embedding.
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
    """While a TRL trainer is constructed, hide an adapter on the head, which TRL would refuse."""
    base = base_of(model)
    head = base.get_output_embeddings()
    if not isinstance(head, BaseTunerLayer):
        yield
        return
    vars(base)["get_output_embeddings"] = head.get_base_layer
    try:
        yield
    finally:
        del vars(base)["get_output_embeddings"]


def set_plain_head(model: PreTrainedModel | PeftModel, temperature: float = 1.0) -> None:
    """Make `model(..., labels=labels, fused_lm_head=True)`, TRL's call, use the model's logits over a temperature."""
    base = base_of(model)
    if _PLAIN in base.__dict__:
        return
    inner = base.forward  # patched by TRL, which forwards every other call

    def forward(self: Any, *args: Any, fused_lm_head: bool = False, labels: Tensor | None = None, **kwargs: Any) -> Any:
        if not fused_lm_head or labels is None:
            given = {} if labels is None else {"labels": labels}
            return inner(*args, **given, **kwargs)
        outputs = inner(*args, **{**kwargs, "use_cache": False})
        aux_loss = outputs.aux_loss if kwargs.get("output_router_logits") else None
        logits = outputs.logits[:, :-1]
        return token_figures(logits if temperature == 1 else logits / temperature, labels[:, 1:], aux_loss)

    base.forward = MethodType(forward, base)
    base.__dict__[_PLAIN] = True


def token_figures(logits_BTV: Tensor, labels_BT: Tensor, aux_loss: Tensor | None = None) -> FusedCausalLMOutput:
    """The figures that TRL's head returns, zero where the label is -100; labels are already shifted."""
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
