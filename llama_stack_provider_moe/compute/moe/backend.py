"""Our experts implementation for every family: ragged products with LoRA beside the weights (`kernels`).

It is registered with transformers (`ALL_EXPERTS_FUNCTIONS`) as `moe_torch`. transformers does not dispatch the experts
of some families (`exceptions.KNOWN_LOOPS`), so those are patched one by one to the same arithmetic.
`moe_torch_partial` is for tokens with a varying number of experts (expert choice): there an index equal to the number
of experts means "no expert".
"""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn
from transformers.activations import SiLUActivation
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, _default_apply_gate
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.llama4.modeling_llama4 import Llama4TextExperts, Llama4TextMoe
from transformers.models.longcat_flash.modeling_longcat_flash import LongcatFlashExperts

from llama_stack_provider_moe.compute.moe.dropout import OWN_NAME, share_of
from llama_stack_provider_moe.compute.moe.exchange import Shard, exchange_tokens, shard_of
from llama_stack_provider_moe.compute.moe.kernels import reference
from llama_stack_provider_moe.compute.moe.kernels.drop import Dropout, draw_seed
from llama_stack_provider_moe.compute.moe.kernels.groups import Sorted, sort_by_expert
from llama_stack_provider_moe.compute.moe.kernels.layer import Projection, expert_layer, kept_layer, kept_rows
from llama_stack_provider_moe.compute.moe.kernels.linear import Kernels, Lora
from llama_stack_provider_moe.compute.moe.kernels.permute import combine, dispatch
from llama_stack_provider_moe.compute.moe.kernels.reference import Activation, Stored
from llama_stack_provider_moe.compute.moe.layout import ExpertLayout
from llama_stack_provider_moe.compute.moe.split_lora import take_lora
from llama_stack_provider_moe.errors import AdapterError, LayoutError

if TYPE_CHECKING:
    from llama_stack_provider_moe.compute.moe.layout import ExpertsModule

OURS: Literal["moe_torch"] = "moe_torch"
OURS_PARTIAL: Literal["moe_torch_partial"] = "moe_torch_partial"
TRITON: Literal["moe_triton"] = "moe_triton"
TRITON_PARTIAL: Literal["moe_triton_partial"] = "moe_triton_partial"
QUACK: Literal["moe_quack"] = "moe_quack"
QUACK_PARTIAL: Literal["moe_quack_partial"] = "moe_quack_partial"
PARTIAL = (OURS_PARTIAL, TRITON_PARTIAL, QUACK_PARTIAL)
COMPILED = (TRITON, TRITON_PARTIAL, QUACK, QUACK_PARTIAL)  # on a GPU, where their kernels may fail
ALL_OURS = (OURS, OURS_PARTIAL, *COMPILED)
_CODES = "_expert_codes"
_OnRows = Callable[["ExpertsModule", Tensor, Tensor, Sorted, Kernels], Tensor]


def keep_code(experts: nn.Module, name: str, code: Stored) -> None:
    """Store `code` as the quantised form of parameter `name` of `experts`."""
    experts.__dict__.setdefault(_CODES, {})[name] = code


def code_of(experts: nn.Module, name: str) -> Stored | None:
    """The quantised form of parameter `name`; None if it is not quantised."""
    code: Stored | None = experts.__dict__.get(_CODES, {}).get(name)
    return code


def drop_codes(experts: nn.Module) -> None:
    """Remove all quantised forms: the parameters are plain weights again."""
    experts.__dict__.pop(_CODES, None)


# A compiled model breaks its graph here: which rows belong to which expert is known only at run time.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def run_experts(
    experts: "ExpertsModule",
    hidden_TD: Tensor,
    index_TK: Tensor,
    weights_TK: Tensor,
    *,
    some_have_fewer: bool = False,
    kernels: Kernels = reference,
) -> Tensor:
    """The forward of an experts module of transformers, for any layout that its `grouped_mm` accepts.

    Args:
        experts: the module; its weights are (E, out, in), or (E, in, out) if it is transposed.
        hidden_TD: tokens.
        index_TK: experts of each token.
        weights_TK: weight of each of them.
        some_have_fewer: `index_TK` contains E where a token has fewer than K experts.
        kernels: kernels that compute the products.

    Returns:
        (T, D), in the dtype of `hidden_TD`.
    """
    shard = shard_of(experts)
    if shard is not None:
        local = partial(_on_shard, _on_rows, experts, shard, kernels)
        return exchange_tokens(shard, local, hidden_TD, index_TK, weights_TK, kernels)
    count, _, _ = experts.down_proj.shape
    found = sort_by_expert(index_TK, count, experts.down_proj.dtype, partial=some_have_fewer)
    return _on_rows(experts, hidden_TD, weights_TK, found, kernels)


def _on_rows(
    experts: "ExpertsModule", hidden_TD: Tensor, weights_TK: Tensor, found: Sorted, kernels: Kernels
) -> Tensor:
    """Run sorted tokens through the experts that the module's parameters hold."""
    up, down = projections(experts)
    layer = (hidden_TD, weights_TK, up, down, activation_of(experts), found, kernels)
    dropout = dropout_of(experts, up, down)
    if can_recompute(experts) and not is_random(experts):
        keep_rows = not recomputes(kernels, hidden_TD.device)
        return expert_layer(*layer, dropout, keep_rows=keep_rows).to(hidden_TD.dtype)
    norm = None if can_recompute(experts) else experts.post_expert_norm
    return kept_layer(*layer, norm, dropout).to(hidden_TD.dtype)


def _on_shard(
    compute: _OnRows,
    experts: "ExpertsModule",
    shard: Shard,
    kernels: Kernels,
    hidden_RD: Tensor,
    index_RK: Tensor,
    weights_RK: Tensor,
    rows: int,
) -> Tensor:
    """Run tokens that other processes sent; some of their choices are experts held here (see `exchange.Compute`)."""
    found = sort_by_expert(index_RK, shard.experts_each, experts.down_proj.dtype, partial=True).cut(rows)
    return compute(experts, hidden_RD, weights_RK, found, kernels)


def projections(experts: "ExpertsModule") -> tuple[Projection, Projection]:
    """The up projection (with its gate) and the down projection of an experts module, with LoRA of this forward."""
    if not is_dispatched(experts):  # it lacks the attributes that are read below
        transposed = isinstance(experts, Llama4TextExperts)
        both = _projection(experts, "gate_up_proj", transposed), _projection(experts, "down_proj", transposed)
        return _same_experts(*both) if isinstance(experts, LongcatFlashExperts) else both
    up = "gate_up_proj" if experts.has_gate else "up_proj"
    biases = (getattr(experts, f"{name}_bias") if experts.has_bias else None for name in (up, "down_proj"))
    transposed = experts.is_transposed
    return _projection(experts, up, transposed, next(biases)), _projection(
        experts, "down_proj", transposed, next(biases)
    )


def _same_experts(up: Projection, down: Projection) -> tuple[Projection, Projection]:
    """LongCat's up projection has rows, never used, for the choices that compute nothing; without them."""
    count = down.weight.shape[0]
    weight = up.weight[:count] if isinstance(up.weight, Tensor) else up.weight
    lora = None if up.lora is None else up.lora._replace(a_ERI=up.lora.a_ERI[:count], b_EOR=up.lora.b_EOR[:count])
    return up._replace(weight=weight, lora=lora), down


def is_dispatched(experts: nn.Module) -> bool:
    """Whether transformers lets other code compute these experts (`use_experts_implementation`)."""
    return hasattr(experts, "is_concatenated")


def recomputes(kernels: Kernels, device: torch.device) -> bool:
    """Whether a layer gathers its rows again in backward instead of keeping them (`keep_rows` of `expert_layer`).

    On a GPU memory is the bottleneck, and the kernels gather rows while they multiply. On a CPU each product would
    first copy them, and the kept rows are small.
    """
    return kernels is not reference or device.type != "cpu"


def can_recompute(experts: "ExpertsModule") -> bool:
    """Whether `kernels.layer` can compute these experts: not if they have a norm after the down projection."""
    # transformers 5.17 has no such norm.
    return not getattr(experts, "has_post_expert_norm", False)


def dropout_of(experts: nn.Module, up: Projection, down: Projection) -> Dropout | None:
    """The dropout of this forward, with a new seed; None: nothing is dropped."""
    inner = share_of(experts)
    shares = (inner, *(0.0 if each.lora is None else each.lora.dropout for each in (up, down)))
    return Dropout(draw_seed(), inner) if any(shares) else None


def is_random(experts: nn.Module) -> bool:
    """Whether the activation draws dropout of the model's own: recomputing it in backward would draw another mask."""
    own = (each for name, each in experts.named_modules() if name != OWN_NAME)
    return experts.training and any(isinstance(each, nn.Dropout) and each.p > 0 for each in own)


def activation_of(experts: "ExpertsModule") -> Activation:
    """The activation of an experts module, and whether the kernels know its formula."""
    if not hasattr(experts, "_apply_gate"):
        return Activation(partial(_gate_first, experts), _kind(experts.act_fn))
    if not is_dispatched(experts):
        return Activation(experts._apply_gate)
    if not experts.has_gate:
        return Activation(experts.act_fn)
    method = type(experts)._apply_gate
    if method is GptOssExperts._apply_gate:
        return Activation(experts._apply_gate, "clamped", experts.alpha, experts.limit)
    return Activation(experts._apply_gate, _kind(experts.act_fn) if method is _default_apply_gate else "other")


def _kind(act_fn: object) -> Literal["silu", "other"]:
    return "silu" if isinstance(act_fn, (nn.SiLU, SiLUActivation)) else "other"


def _gate_first(experts: "ExpertsModule", inner_SJ: Tensor) -> Tensor:
    gate_SI, up_SI = inner_SJ.chunk(2, dim=-1)
    return up_SI * experts.act_fn(gate_SI)


def _projection(experts: nn.Module, name: str, transposed: bool, bias: Tensor | None = None) -> Projection:
    """One projection, with the LoRA that PEFT's wrapper offers for this forward."""
    lora = take_lora(experts, name)
    code = code_of(experts, name)
    if code is not None:  # always (E, O, I), even if the parameter is transposed
        if nn.utils.parametrize.is_parametrized(experts, name):
            raise AdapterError(f"adapter: LoRA was folded into {name} of quantised experts, where it has no effect")
        weight: Tensor | Stored = code
    else:
        parameter: Tensor = getattr(experts, name)
        weight = parameter.mT if transposed else parameter
    if lora is None:
        return Projection(weight, bias)
    a, b = (lora.left.mT, lora.right.mT) if transposed else (lora.right, lora.left)
    return Projection(weight, bias, Lora(a, b, lora.dropout if experts.training else 0.0))


def replace_loops(model: nn.Module, layout: ExpertLayout, implementation: str) -> None:
    """Compute experts that transformers does not dispatch with our kernels, instead of their own loop.

    In Llama 4 transformers 5.23 runs every expert over every token, most of them over zeros, so its blocks change too:
    they send each token only to the experts chosen for it.

    Raises:
        LayoutError: the blocks differ from those of transformers 5.23.
    """
    for layer, experts in layout.experts(model).items():
        if not isinstance(experts, Llama4TextExperts):
            experts.forward = partial(_loop_experts, implementation, experts)
            continue
        block = layout.submodule(model, layer, layout.block)
        missing = {"router", "shared_expert", "experts"} - {name for name, _ in block.named_children()}
        if missing:
            raise LayoutError(f"{layout.path(layer, layout.block)} has no {', '.join(sorted(missing))}")
        # Set on the instances, so they shadow the methods of the classes. Partials of the modules themselves: a deep
        # copy of the model is then bound to its own copies. Kernels by name, because a Python module can't be copied.
        experts.forward = partial(_llama4_experts, implementation, experts)
        block.forward = partial(_llama4_block, block, layout.top_k)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _loop_experts(
    implementation: str, experts: "ExpertsModule", hidden_TD: Tensor, index_TK: Tensor, weights_TK: Tensor
) -> Tensor:
    """Experts with the usual arguments; in LongCat, choices from E on return the token itself."""
    kernels = kernels_of(implementation)
    if not isinstance(experts, LongcatFlashExperts):
        some_have_fewer = implementation in PARTIAL
        out_TD: Tensor = run_experts(
            experts, hidden_TD, index_TK, weights_TK, some_have_fewer=some_have_fewer, kernels=kernels
        )
        return out_TD
    count, _, _ = experts.down_proj.shape
    found = sort_by_expert(index_TK.clamp(max=count), count, experts.down_proj.dtype, partial=True)
    itself_T = weights_TK.masked_fill(index_TK < count, 0).sum(dim=1, keepdim=True)
    routed_TD = _on_rows(experts, hidden_TD, weights_TK, found, kernels)
    return routed_TD + (hidden_TD * itself_T).to(hidden_TD.dtype)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _llama4_experts(
    implementation: str, experts: "ExpertsModule", hidden_TD: Tensor, index_TK: Tensor, weights_TK: Tensor
) -> Tensor:
    """Llama 4 multiplies the input of an expert by the router's score, not its output."""
    kernels, shard = kernels_of(implementation), shard_of(experts)
    if shard is not None:
        local = partial(_on_shard, _llama4_on_rows, experts, shard, kernels)
        return exchange_tokens(shard, local, hidden_TD, index_TK, weights_TK, kernels)
    chosen_by_experts = index_TK.shape[1] == experts.num_experts
    found = sort_by_expert(index_TK, experts.num_experts, experts.down_proj.dtype, partial=chosen_by_experts)
    return _llama4_on_rows(experts, hidden_TD, weights_TK, found, kernels)


def _llama4_on_rows(
    experts: "ExpertsModule", hidden_TD: Tensor, weights_TK: Tensor, found: Sorted, kernels: Kernels
) -> Tensor:
    up, down = projections(experts)
    activation, dropout, ones_TK = activation_of(experts), dropout_of(experts, up, down), torch.ones_like(weights_TK)
    if weights_TK.shape[1] == 1 and not is_random(experts):
        weighted_TD, keep_rows = hidden_TD * weights_TK, not recomputes(kernels, hidden_TD.device)
        layer = (weighted_TD, ones_TK, up, down, activation, found, kernels, dropout)
        out_TD = expert_layer(*layer, keep_rows=keep_rows)
        return out_TD.to(hidden_TD.dtype)
    rows_SD = dispatch(hidden_TD, found) * found.of_rows(weights_TK).unsqueeze(-1)
    out_SD = kept_rows(rows_SD, up, down, activation, found, kernels, dropout)
    return combine(out_SD, ones_TK, found).to(hidden_TD.dtype)


def _llama4_block(block: Llama4TextMoe, top_k: int, hidden: Tensor) -> tuple[Tensor, Tensor]:
    hidden_TD = hidden.reshape(-1, hidden.shape[-1])
    # The third output is present if a hook changed the choice (`steering`).
    scores_TE, logits_TE, *chosen = block.router(hidden_TD)
    index_TK = chosen[0] if chosen else logits_TE.topk(top_k, dim=1).indices
    weights_TK = scores_TE if chosen else scores_TE.gather(1, index_TK)
    out = block.shared_expert(hidden_TD) + block.experts(hidden_TD, index_TK, weights_TK)
    return out, logits_TE


def kernels_of(implementation: str) -> Kernels:
    """The kernels of one of `ALL_OURS`; also registers the implementation with transformers."""
    kernels: Kernels
    if implementation in (TRITON, TRITON_PARTIAL):
        from llama_stack_provider_moe.compute.moe.kernels import grouped  # Triton is not installed everywhere

        kernels = grouped
    elif implementation in (QUACK, QUACK_PARTIAL):
        from llama_stack_provider_moe.compute.moe.kernels import quack

        kernels = quack
    else:
        kernels = reference
    some_have_fewer = implementation in PARTIAL
    if implementation not in ALL_EXPERTS_FUNCTIONS:
        forward = partial(run_experts, some_have_fewer=some_have_fewer, kernels=kernels)
        ALL_EXPERTS_FUNCTIONS.register(implementation, forward)
    return kernels


for _name in (OURS, OURS_PARTIAL):
    kernels_of(_name)
