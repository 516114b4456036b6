"""Expert dropout: dropout on the inner activation of every routed expert (Switch Transformer, arXiv 2101.03961, 2.4).

An expert computes `down(act(gate) * up)`. Dropout drops or scales single elements, so dropping elements of `act(gate)`
before the product is the same as dropping elements of the product: it is enough to add dropout after the activation.
Shared experts and dense layers do not change.

Our own implementations drop by a formula that backward repeats (`kernels.drop`); for them this only keeps the share on
the module. In transformers' implementations dropout becomes part of the activation.
"""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import nn

from llama_stack_provider_moe.compute.moe.layout import ExpertLayout
from llama_stack_provider_moe.errors import LayoutError

if TYPE_CHECKING:
    from llama_stack_provider_moe.compute.moe.layout import ExpertsModule


OWN_NAME = "expert_dropout"


def share_of(experts: nn.Module) -> float:
    """The share of inner activations that our implementations drop in this forward."""
    own = dict(experts.named_children()).get(OWN_NAME)
    return own.p if isinstance(own, nn.Dropout) and own.training else 0.0


def add_expert_dropout(model: nn.Module, layout: ExpertLayout, p: float, *, ours: bool = False) -> None:
    """Drop elements of the experts' inner activations with probability `p`, in training mode only.

    Args:
        model: the model.
        layout: where its experts are.
        p: dropped share.
        ours: the experts are computed by one of `backend.ALL_OURS`; else by transformers' eager or grouped
            implementation, which share the activation.

    Raises:
        LayoutError: the experts of a layer have no activation under the name that their family uses.
    """
    for layer, experts in layout.experts(model).items():
        if ours:
            experts.expert_dropout = nn.Dropout(p).train(experts.training)
            continue
        if layout.own_gate:
            _after_own_gate(experts, p)
            continue
        # `act_fn` is a module, or a plain function in LFM2's experts (transformers 5.23).
        activation = {**vars(experts), **dict(experts.named_children())}.get("act_fn")
        if activation is None:
            raise LayoutError(
                f"expert_dropout: {layout.path(layer, layout.experts_path)} has no 'act_fn'; "
                f"it has {[name for name, _ in experts.named_children()]}"
            )
        # A new module is in training mode; a model that was just loaded is not.
        experts.act_fn = _ActivationDropout(activation, p).train(experts.training)


class _ActivationDropout(nn.Module):
    """An activation followed by dropout."""

    def __init__(self, activation: Callable[[torch.Tensor], torch.Tensor], p: float) -> None:
        super().__init__()
        self.activation = activation
        self.dropout = nn.Dropout(p)

    def forward(self, gate: torch.Tensor) -> torch.Tensor:
        dropped: torch.Tensor = self.dropout(self.activation(gate))
        return dropped


def _after_own_gate(experts: "ExpertsModule", p: float) -> None:
    experts.expert_dropout = nn.Dropout(p).train(experts.training)
    # Set on the instance, so it shadows the method of the class. A partial of the module itself: a deep copy of the
    # model is then bound to its own copy.
    experts._apply_gate = partial(_gate_dropout, experts)  # type: ignore[method-assign]


def _gate_dropout(experts: "ExpertsModule", gate_up: torch.Tensor) -> torch.Tensor:
    dropped: torch.Tensor = experts.expert_dropout(type(experts)._apply_gate(experts, gate_up))
    return dropped
