"""Expert dropout: dropout on the inner activation of every routed expert (Switch Transformer, arXiv 2101.03961, 2.4).

An expert computes `down(act(gate) * up)`. Dropout keeps or drops (and scales) single elements, so dropping
`act(gate)` before the product is the same as dropping the product: it is enough to let the activation end in one.
Shared experts and dense layers are left alone.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from llama_stack_provider_moe.errors import LayoutError
from llama_stack_provider_moe.experts.layout import ExpertLayout


def add_expert_dropout(model: nn.Module, layout: ExpertLayout, p: float) -> None:
    """Drop elements of the experts' inner activations with probability `p`, in training mode only.

    Works for the eager and the grouped implementation, which share the activation.

    Raises:
        LayoutError: the experts of a layer have no activation where their family keeps it.
    """
    for layer, experts in layout.experts(model).items():
        if layout.own_gate:
            _after_own_gate(experts, p)
            continue
        # A module, or a plain function in LFM2's experts (transformers 5.23).
        activation = {**vars(experts), **dict(experts.named_children())}.get("act_fn")
        if activation is None:
            raise LayoutError(
                f"expert_dropout: {layout.path(layer, layout.experts_path)} has no 'act_fn'; "
                f"it has {[name for name, _ in experts.named_children()]}"
            )
        # A new module is in training mode, and a model just loaded is not.
        experts.act_fn = _ThenDrop(activation, p).train(experts.training)


class _ThenDrop(nn.Module):
    """An activation that ends in dropout."""

    def __init__(self, activation: Callable[[torch.Tensor], torch.Tensor], p: float) -> None:
        super().__init__()
        self.activation = activation
        self.dropout = nn.Dropout(p)

    def forward(self, gate: torch.Tensor) -> torch.Tensor:
        dropped: torch.Tensor = self.dropout(self.activation(gate))
        return dropped


def _after_own_gate(experts: Any, p: float) -> None:
    experts.expert_dropout = nn.Dropout(p).train(experts.training)
    # On the instance, before the method of the class; a partial of the module itself, so that a deep copy of the
    # model is bound to its own copy.
    experts._apply_gate = partial(_gate_then_drop, experts)


def _gate_then_drop(experts: Any, gate_up: torch.Tensor) -> torch.Tensor:
    dropped: torch.Tensor = experts.expert_dropout(type(experts)._apply_gate(experts, gate_up))
    return dropped
