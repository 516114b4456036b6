"""Our experts implementation, for every family: ragged products with LoRA beside the weights (`kernels`).

Registered with transformers (`ALL_EXPERTS_FUNCTIONS`) as `moe_torch`; Llama 4's blocks, whose experts transformers
does not dispatch, are patched, one by one, to the same arithmetic. `moe_torch_partial` is for tokens with a varying
number of experts (expert choice): there the index that is the number of experts stands for none.
"""

from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from llama_stack_provider_moe.errors import AdapterError, LayoutError
from llama_stack_provider_moe.experts.kernels import reference
from llama_stack_provider_moe.experts.kernels.groups import Groups, Sorted, sort_by_expert
from llama_stack_provider_moe.experts.kernels.linear import Kernels, Lora, grouped_linear
from llama_stack_provider_moe.experts.kernels.permute import combine, dispatch
from llama_stack_provider_moe.experts.kernels.reference import Stored
from llama_stack_provider_moe.experts.layout import ExpertLayout
from llama_stack_provider_moe.experts.split_lora import take_lora

OURS: Literal["moe_torch"] = "moe_torch"
OURS_PARTIAL: Literal["moe_torch_partial"] = "moe_torch_partial"
TRITON: Literal["moe_triton"] = "moe_triton"
TRITON_PARTIAL: Literal["moe_triton_partial"] = "moe_triton_partial"
ALL_OURS = (OURS, OURS_PARTIAL, TRITON, TRITON_PARTIAL)
_CODES = "_expert_codes"


def keep_code(experts: nn.Module, name: str, code: Stored) -> None:
    """From now on `code` is what parameter `name` of `experts` holds."""
    experts.__dict__.setdefault(_CODES, {})[name] = code


def code_of(experts: nn.Module, name: str) -> Stored | None:
    """What stands for parameter `name` where it is quantised, else None."""
    code: Stored | None = experts.__dict__.get(_CODES, {}).get(name)
    return code


def drop_codes(experts: nn.Module) -> None:
    """The parameters are weights again."""
    experts.__dict__.pop(_CODES, None)


# A compiled model breaks its graph here: which rows are whose is known only when it runs.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def run_experts(
    experts: Any,
    hidden_TD: Tensor,
    index_TK: Tensor,
    weights_TK: Tensor,
    *,
    some_have_fewer: bool = False,
    kernels: Kernels = reference,
) -> Tensor:
    """The forward of an experts module of transformers, of any layout that its `grouped_mm` takes.

    Args:
        experts: the module; its weights (E, out, in), or (E, in, out) where it is transposed.
        hidden_TD: tokens.
        index_TK: of each token, the experts it goes to.
        weights_TK: and how much each of them counts.
        some_have_fewer: `index_TK` holds E where a token has fewer than K experts.
        kernels: that compute the products.

    Returns:
        (T, D), in the dtype of `hidden_TD`.
    """
    found = sort_by_expert(index_TK, experts.num_experts, experts.down_proj.dtype, partial=some_have_fewer)
    up = "gate_up_proj" if experts.has_gate else "up_proj"
    inner_SI = _product(experts, up, dispatch(hidden_TD, found), found, kernels)
    inner_SI = experts._apply_gate(inner_SI) if experts.has_gate else experts.act_fn(inner_SI)
    out_SD = _product(experts, "down_proj", inner_SI, found, kernels)
    if getattr(experts, "has_post_expert_norm", False):  # transformers 5.17 knows no such norm
        out_SD = experts.post_expert_norm(out_SD)
    return combine(out_SD, weights_TK, found).to(hidden_TD.dtype)


def _product(experts: Any, name: str, rows_SI: Tensor, found: Sorted, kernels: Kernels) -> Tensor:
    bias = getattr(experts, f"{name}_bias") if experts.has_bias else None
    return _linear(experts, name, rows_SI, found.groups, kernels, experts.is_transposed, bias)


def _linear(
    experts: nn.Module,
    name: str,
    rows_SI: Tensor,
    groups: Groups,
    kernels: Kernels,
    transposed: bool,
    bias: Tensor | None = None,
) -> Tensor:
    lora = take_lora(experts, name)
    code = code_of(experts, name)
    if code is not None:  # in the order (E, O, I) whatever the parameter's own
        if nn.utils.parametrize.is_parametrized(experts, name):
            raise AdapterError(
                f"adapter: LoRA was folded into {name} of experts, which are quantised: it has no effect"
            )
        weight: Tensor | Stored = code
    else:
        own: Tensor = getattr(experts, name)
        weight = own.mT if transposed else own
    if lora is None:
        return grouped_linear(rows_SI, weight, groups, bias, kernels=kernels)
    a, b = (lora.left.mT, lora.right.mT) if transposed else (lora.right, lora.left)
    dropout = lora.dropout if experts.training else 0.0
    return grouped_linear(rows_SI, weight, groups, bias, Lora(a, b, dropout), kernels)


def route_llama4(model: nn.Module, layout: ExpertLayout, implementation: str) -> None:
    """Have Llama 4's blocks send each token to its own experts alone.

    transformers 5.23 runs every expert over every token, most of them over zeros, and knows no other way for it.

    Raises:
        LayoutError: the blocks are not made as they were there.
    """
    for layer, experts in layout.experts(model).items():
        block = layout.submodule(model, layer, layout.block)
        missing = {"router", "shared_expert", "experts"} - {name for name, _ in block.named_children()}
        if missing:
            raise LayoutError(f"{layout.path(layer, layout.block)} has no {', '.join(sorted(missing))}")
        # On the instances, before the methods of their classes; partials of the modules themselves, so that a deep
        # copy of the model is bound to its own copies; kernels by name, for a module can't be copied.
        experts.forward = partial(_llama4_experts, implementation, experts)
        block.forward = partial(_llama4_block, block, layout.top_k)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _llama4_experts(
    implementation: str, experts: Any, hidden_TD: Tensor, index_TK: Tensor, weights_TK: Tensor
) -> Tensor:
    """The router's score weighs what goes in, not what comes out."""
    kernels = kernels_of(implementation)
    chosen_by_experts = index_TK.shape[1] == experts.num_experts
    found = sort_by_expert(index_TK, experts.num_experts, experts.down_proj.dtype, partial=chosen_by_experts)
    rows_SD = dispatch(hidden_TD, found) * weights_TK.reshape(-1)[found.order_S].unsqueeze(-1)
    gate_SI, up_SI = _linear(experts, "gate_up_proj", rows_SD, found.groups, kernels, True).chunk(2, dim=-1)
    out_SD = _linear(experts, "down_proj", up_SI * experts.act_fn(gate_SI), found.groups, kernels, True)
    return combine(out_SD, torch.ones_like(weights_TK), found).to(hidden_TD.dtype)


def _llama4_block(block: Any, top_k: int, hidden: Tensor) -> tuple[Tensor, Tensor]:
    hidden_TD = hidden.reshape(-1, hidden.shape[-1])
    # A third part comes from a hook that chose otherwise (`steering`).
    scores_TE, logits_TE, *chosen = block.router(hidden_TD)
    index_TK = chosen[0] if chosen else logits_TE.topk(top_k, dim=1).indices
    weights_TK = scores_TE if chosen else scores_TE.gather(1, index_TK)
    out = block.shared_expert(hidden_TD) + block.experts(hidden_TD, index_TK, weights_TK)
    return out, logits_TE


def kernels_of(implementation: str) -> Kernels:
    """The products of one of `ALL_OURS`, which transformers knows from here on."""
    if implementation in (TRITON, TRITON_PARTIAL):
        from llama_stack_provider_moe.experts.kernels import grouped  # triton is not everywhere

        kernels: Kernels = grouped
    else:
        kernels = reference
    some_have_fewer = implementation in (OURS_PARTIAL, TRITON_PARTIAL)
    if implementation not in ALL_EXPERTS_FUNCTIONS:
        forward = partial(run_experts, some_have_fewer=some_have_fewer, kernels=kernels)
        ALL_EXPERTS_FUNCTIONS.register(implementation, forward)
    return kernels


for _name in (OURS, OURS_PARTIAL):
    kernels_of(_name)
