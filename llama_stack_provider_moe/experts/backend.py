"""Our experts implementation, for every family: ragged products with LoRA beside the weights (`kernels`).

Registered with transformers (`ALL_EXPERTS_FUNCTIONS`) as `moe_torch`; Llama 4's blocks, whose experts transformers
does not dispatch, are patched, one by one, to the same arithmetic. `moe_torch_partial` is for tokens with a varying
number of experts (expert choice): there the index that is the number of experts stands for none.
"""

from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.activations import SiLUActivation
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, _default_apply_gate
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.llama4.modeling_llama4 import Llama4TextExperts

from llama_stack_provider_moe.errors import AdapterError, LayoutError
from llama_stack_provider_moe.experts.exchange import Shard, across, shard_of
from llama_stack_provider_moe.experts.kernels import reference
from llama_stack_provider_moe.experts.kernels.gate import Gate
from llama_stack_provider_moe.experts.kernels.groups import Sorted, sort_by_expert
from llama_stack_provider_moe.experts.kernels.layer import Projection, expert_layer
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
    shard = shard_of(experts)
    if shard is not None:
        mine = partial(_with_held, _with_all, experts, shard, kernels)
        return across(shard, mine, hidden_TD, index_TK, weights_TK, kernels)
    found = sort_by_expert(index_TK, experts.num_experts, experts.down_proj.dtype, partial=some_have_fewer)
    return _with_all(experts, hidden_TD, weights_TK, found, kernels)


def _with_all(experts: Any, hidden_TD: Tensor, weights_TK: Tensor, found: Sorted, kernels: Kernels) -> Tensor:
    """Tokens through the experts that the module's parameters are of."""
    up, down = projections(experts)
    if forgets(kernels, hidden_TD.device) and may_forget(experts) and not draws(experts, up, down):
        return expert_layer(hidden_TD, weights_TK, up, down, gate_of(experts), found, kernels).to(hidden_TD.dtype)
    inner_SI = gate_of(experts).function(_times(up, dispatch(hidden_TD, found), found, kernels))
    out_SD = _times(down, inner_SI, found, kernels)
    if not may_forget(experts):
        out_SD = experts.post_expert_norm(out_SD)
    return combine(out_SD, weights_TK, found).to(hidden_TD.dtype)


def _with_held(
    compute: Any,
    experts: Any,
    shard: Shard,
    kernels: Kernels,
    hidden_RD: Tensor,
    index_RK: Tensor,
    weights_RK: Tensor,
    rows: int,
) -> Tensor:
    """Tokens that other processes sent, of whose choices some are of experts that are here; see `exchange.Compute`."""
    found = sort_by_expert(index_RK, shard.held, experts.down_proj.dtype, partial=True).cut(rows)
    out: Tensor = compute(experts, hidden_RD, weights_RK, found, kernels)
    return out


def projections(experts: Any) -> tuple[Projection, Projection]:
    """The up (with its gate) and the down projection of an experts module, with what LoRA adds in this forward."""
    if isinstance(experts, Llama4TextExperts):  # not decorated, so it does not say how it is made
        return _projection(experts, "gate_up_proj", True), _projection(experts, "down_proj", True)
    up = "gate_up_proj" if experts.has_gate else "up_proj"
    biases = (getattr(experts, f"{name}_bias") if experts.has_bias else None for name in (up, "down_proj"))
    transposed = experts.is_transposed
    return _projection(experts, up, transposed, next(biases)), _projection(
        experts, "down_proj", transposed, next(biases)
    )


def forgets(kernels: Kernels, device: torch.device) -> bool:
    """Whether a layer keeps only what `kernels.layer` needs, and computes the rest again.

    On a GPU memory is what is short. On a CPU torch's products gather rows into memory of their own, three times over,
    and what is kept is little anyway: the layer takes 1.2 to 1.6 times as long for a third to a half of the memory.
    """
    return kernels is not reference or device.type != "cpu"


def may_forget(experts: Any) -> bool:
    """Whether `kernels.layer` can compute such experts: not with a norm after the down projection."""
    # transformers 5.17 knows no such norm.
    return isinstance(experts, Llama4TextExperts) or not getattr(experts, "has_post_expert_norm", False)


def unserved(experts: Any, implementation: str, device: torch.device, *, drops: bool, rank: int) -> list[str]:
    """What the kernels of `implementation` can't do as they should here, and what is done instead.

    Args:
        experts: of one layer.
        device: of the model.
        drops: dropout on the experts or on their LoRA.
        rank: of LoRA on experts; 0: none.
    """
    kernels = kernels_of(implementation)
    told = []
    if kernels is not reference:
        gate = gate_of(experts)
        if gate.kind == "other":
            told.append(f"{type(experts).__name__}'s activation by torch: no kernel has its formula")
        if rank > kernels.WIDEST_RANK:
            told.append(
                f"LoRA of rank {rank} beside the base's pass, not in it: that has room for {kernels.WIDEST_RANK}"
            )
    if forgets(kernels, device) and not may_forget(experts):
        told.append("all activations of experts are kept: they have a norm after the down projection")
    elif forgets(kernels, device) and drops:
        told.append("all activations of experts are kept: dropout would be drawn anew")
    return told


def draws(experts: nn.Module, up: Projection, down: Projection) -> bool:
    """Whether dropout draws something in this forward, which backward would draw anew."""
    inside = experts.training and any(isinstance(each, nn.Dropout) and each.p > 0 for each in experts.modules())
    return inside or any(each.lora is not None and each.lora.dropout > 0 for each in (up, down))


def gate_of(experts: Any) -> Gate:
    """The activation of an experts module, and whether it is a formula that kernels know."""
    if isinstance(experts, Llama4TextExperts):
        return Gate(partial(_gate_first, experts), _kind(experts.act_fn))
    if not experts.has_gate:
        return Gate(experts.act_fn)
    own = type(experts)._apply_gate
    if own is GptOssExperts._apply_gate:
        return Gate(experts._apply_gate, "clamped", experts.alpha, experts.limit)
    return Gate(experts._apply_gate, _kind(experts.act_fn) if own is _default_apply_gate else "other")


def _kind(act_fn: Any) -> Literal["silu", "other"]:
    return "silu" if isinstance(act_fn, (nn.SiLU, SiLUActivation)) else "other"


def _gate_first(experts: Any, inner_SJ: Tensor) -> Tensor:
    gate_SI, up_SI = inner_SJ.chunk(2, dim=-1)
    product: Tensor = up_SI * experts.act_fn(gate_SI)
    return product


def _times(projection: Projection, rows_SI: Tensor, found: Sorted, kernels: Kernels) -> Tensor:
    return grouped_linear(rows_SI, projection.weight, found.groups, projection.bias_EO, projection.lora, kernels)


def _projection(experts: nn.Module, name: str, transposed: bool, bias: Tensor | None = None) -> Projection:
    """With the LoRA that PEFT's wrapper offers for this forward."""
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
        return Projection(weight, bias)
    a, b = (lora.left.mT, lora.right.mT) if transposed else (lora.right, lora.left)
    return Projection(weight, bias, Lora(a, b, lora.dropout if experts.training else 0.0))


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
    kernels, shard = kernels_of(implementation), shard_of(experts)
    if shard is not None:
        mine = partial(_with_held, _llama4_with_all, experts, shard, kernels)
        return across(shard, mine, hidden_TD, index_TK, weights_TK, kernels)
    chosen_by_experts = index_TK.shape[1] == experts.num_experts
    found = sort_by_expert(index_TK, experts.num_experts, experts.down_proj.dtype, partial=chosen_by_experts)
    return _llama4_with_all(experts, hidden_TD, weights_TK, found, kernels)


def _llama4_with_all(experts: Any, hidden_TD: Tensor, weights_TK: Tensor, found: Sorted, kernels: Kernels) -> Tensor:
    up, down = projections(experts)
    if forgets(kernels, hidden_TD.device) and weights_TK.shape[1] == 1 and not draws(experts, up, down):
        weighted_TD = hidden_TD * weights_TK
        ones_TK = torch.ones_like(weights_TK)
        return expert_layer(weighted_TD, ones_TK, up, down, gate_of(experts), found, kernels).to(hidden_TD.dtype)
    rows_SD = dispatch(hidden_TD, found) * found.of_rows(weights_TK).unsqueeze(-1)
    out_SD = _times(down, gate_of(experts).function(_times(up, rows_SD, found, kernels)), found, kernels)
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
    kernels: Kernels
    if implementation in (TRITON, TRITON_PARTIAL):
        from llama_stack_provider_moe.experts.kernels import grouped  # triton is not everywhere

        kernels = grouped
    else:
        kernels = reference
    some_have_fewer = implementation in (OURS_PARTIAL, TRITON_PARTIAL)
    if implementation not in ALL_EXPERTS_FUNCTIONS:
        forward = partial(run_experts, some_have_fewer=some_have_fewer, kernels=kernels)
        ALL_EXPERTS_FUNCTIONS.register(implementation, forward)
    return kernels


for _name in (OURS, OURS_PARTIAL):
    kernels_of(_name)
