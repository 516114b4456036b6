"""The one table of Mixture-of-Experts architectures: one row a family, as transformers 5.23 builds them.

Memory and disk differ: transformers 5 fuses the experts of a layer into 3-D parameters and renames modules while it
loads, and undoes both while it saves (`transformers/conversion_mapping.py`). E experts, H hidden, I inner size.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

Scoring = Literal["softmax", "sigmoid"]
LayerRule = Callable[[Any, int], bool]
CountRule = Callable[[Any], int]


def _every(config: Any, layer: int) -> bool:
    return True


def _sparse_step(config: Any, layer: int) -> bool:
    return layer not in config.mlp_only_layers and (layer + 1) % config.decoder_sparse_step == 0


def _interval(config: Any, layer: int) -> bool:
    inside: bool = config.moe_layer_start_index <= layer <= config.moe_layer_end_index
    return inside and (layer + 1) % config.moe_layer_interval == 0


def _listed(config: Any, layer: int) -> bool:
    return layer in config.moe_layers


def _marked_sparse(config: Any, layer: int) -> bool:
    return bool(config.mlp_layer_types[layer] == "sparse")


def _from(key: str) -> LayerRule:
    return lambda config, layer: layer >= getattr(config, key)


def _number(key: str) -> CountRule:
    return lambda config: getattr(config, key) or 0


def _one_where(key: str) -> CountRule:
    return lambda config: int(bool(getattr(config, key)))


def _one(config: Any) -> int:
    return 1


def _softmax(config: Any) -> Scoring:
    return "softmax"


def _sigmoid(config: Any) -> Scoring:
    return "sigmoid"


def _selection_fn(config: Any) -> Scoring:
    selected: Scoring = config.expert_selection_fn
    return selected


# Parameter in memory (path below its layer) -> its names on disk, in the order in which they are joined.
Disk = Mapping[str, tuple[str, ...]]


def _split(block: str, on_disk: str, router: str, gate: str, up: str, down: str) -> Disk:
    each = on_disk + ".experts.{expert}."
    return {
        f"{block}.{router}.weight": (f"{on_disk}.gate.weight",),
        f"{block}.experts.gate_up_proj": (f"{each}{gate}.weight", f"{each}{up}.weight"),
        f"{block}.experts.down_proj": (f"{each}{down}.weight",),
    }


def _as_in_memory(*names: str) -> Disk:
    return {name: (name,) for name in names}


_NAMED = _split("mlp", "mlp", "gate", "gate_proj", "up_proj", "down_proj")
_NAMED_AND_BIAS: Disk = {**_NAMED, **_as_in_memory("mlp.gate.e_score_correction_bias")}
_GRANITE: Disk = {
    "block_sparse_moe.router.weight": ("block_sparse_moe.router.layer.weight",),
    "block_sparse_moe.experts.gate_up_proj": ("block_sparse_moe.input_linear.weight",),
    "block_sparse_moe.experts.down_proj": ("block_sparse_moe.output_linear.weight",),
}


@dataclass(frozen=True, kw_only=True)
class Family:
    """What holds for every model of a family. Paths are below a decoder layer."""

    name: str
    model_types: tuple[str, ...]
    num_experts: str  # config attribute: experts of a layer
    top_k: str = "num_experts_per_tok"  # config attribute: experts a token goes to
    has_experts: LayerRule = _every  # (config, layer) -> is it a MoE layer
    block: str = "mlp"
    router: str = "gate"
    shared: str | None = None  # path of the experts that see every token
    shared_count: CountRule = _one  # config -> how many of them there are
    transposed: bool = False  # gate_up (E, H, 2I) and down (E, I, H); else (E, 2I, H) and (E, H, I)
    biased: bool = False  # experts and router have biases
    scoring: Callable[[Any], Scoring] = _softmax  # what the router makes of its logits
    # Where a router's forward leaves its logits and the chosen experts; where it leaves none: the top-k of the logits.
    logits_at: int = 0
    chosen_at: int = 2
    # Every family returns its router logits on request; not every one makes a balance loss of them.
    aux_loss: bool = True
    grouped_mm: bool = True  # are its experts decorated with `use_experts_implementation`
    own_gate: bool = False  # experts have an `_apply_gate` of their own and no `act_fn`
    # TRL 1.16 reads `config.num_experts`, which these families have under another name only (see `settings`).
    needs_num_experts: bool = False
    # peft 0.21 takes `target_modules` ending in gate_proj, up_proj or down_proj for the experts of these families
    # (`peft/utils/transformers_weight_conversion.py`), so their shared and dense layers are named as parameters.
    peft_renames_mlp: bool = False
    frozen: tuple[str, ...] = ()  # parameters no optimiser may touch
    # Added to the scores in the choice of experts, not to their weights (DeepSeek-V3, arXiv 2412.19437, eq. 16).
    bias: str | None = None
    # Config attributes: groups of experts, and of how many of them a token's experts come (arXiv 2412.19437, 2.1.2).
    groups: tuple[str, str] | None = None
    disk: Disk


FAMILIES: tuple[Family, ...] = (
    Family(
        name="Granite MoE",
        model_types=("granitemoe",),
        num_experts="num_local_experts",
        block="block_sparse_moe",
        router="router",
        needs_num_experts=True,
        disk=_GRANITE,
    ),
    Family(
        name="Granite MoE with shared experts",
        model_types=("granitemoeshared", "granitemoehybrid"),
        num_experts="num_local_experts",
        block="block_sparse_moe",
        router="router",
        shared="shared_mlp",
        shared_count=_one_where("shared_intermediate_size"),
        needs_num_experts=True,
        disk=_GRANITE,
    ),
    Family(
        name="Mixtral",
        model_types=("mixtral",),
        num_experts="num_local_experts",
        disk=_split("mlp", "block_sparse_moe", "gate", "w1", "w3", "w2"),
    ),
    Family(
        name="MiniMax M2",
        bias="mlp.e_score_correction_bias",
        model_types=("minimax_m2",),
        num_experts="num_local_experts",
        scoring=_sigmoid,
        disk={
            **_split("mlp", "block_sparse_moe", "gate", "w1", "w3", "w2"),
            "mlp.e_score_correction_bias": ("block_sparse_moe.e_score_correction_bias",),
        },
    ),
    Family(
        name="Phi MoE",
        model_types=("phimoe",),
        num_experts="num_local_experts",
        router="router",
        needs_num_experts=True,
        disk=_split("mlp", "block_sparse_moe", "router", "w1", "w3", "w2"),
    ),
    Family(
        name="Qwen2 MoE",
        model_types=("qwen2_moe",),
        num_experts="num_experts",
        has_experts=_sparse_step,
        shared="mlp.shared_expert",
        disk=_NAMED,
    ),
    Family(
        name="Qwen3-Next",
        model_types=("qwen3_next",),
        num_experts="num_experts",
        has_experts=_sparse_step,
        shared="mlp.shared_expert",
        peft_renames_mlp=True,
        disk=_NAMED,
    ),
    Family(
        name="Qwen3.5 MoE",
        model_types=("qwen3_5_moe_text",),
        num_experts="num_experts",
        shared="mlp.shared_expert",
        disk=_NAMED,
    ),
    Family(
        name="Qwen3 MoE",
        model_types=("qwen3_moe",),
        num_experts="num_experts",
        has_experts=_sparse_step,
        peft_renames_mlp=True,
        disk=_NAMED,
    ),
    Family(name="OLMoE", model_types=("olmoe",), num_experts="num_experts", peft_renames_mlp=True, disk=_NAMED),
    Family(
        name="ERNIE 4.5 MoE",
        model_types=("ernie4_5_moe",),
        num_experts="moe_num_experts",
        top_k="moe_k",
        has_experts=_interval,
        shared="mlp.shared_experts",
        shared_count=_number("moe_num_shared_experts"),
        peft_renames_mlp=True,
        # The bias steers the choice of experts only, and is moved by the balance of their load, not by a gradient.
        frozen=("mlp.gate.moe_statics.e_score_correction_bias",),
        bias="mlp.gate.moe_statics.e_score_correction_bias",
        disk={
            **_NAMED,
            "mlp.gate.moe_statics.e_score_correction_bias": ("mlp.moe_statics.e_score_correction_bias",),
        },
    ),
    Family(
        name="GLM-4 MoE",
        bias="mlp.gate.e_score_correction_bias",
        groups=("n_group", "topk_group"),
        model_types=("glm4_moe",),
        num_experts="n_routed_experts",
        has_experts=_from("first_k_dense_replace"),
        shared="mlp.shared_experts",
        shared_count=_number("n_shared_experts"),
        scoring=_sigmoid,
        aux_loss=False,
        peft_renames_mlp=True,
        disk=_NAMED_AND_BIAS,
    ),
    Family(
        name="DeepSeek V3",
        bias="mlp.gate.e_score_correction_bias",
        groups=("n_group", "topk_group"),
        model_types=("deepseek_v3",),
        num_experts="n_routed_experts",
        has_experts=_from("first_k_dense_replace"),
        shared="mlp.shared_experts",
        shared_count=_number("n_shared_experts"),
        scoring=_sigmoid,
        aux_loss=False,
        peft_renames_mlp=True,
        disk=_NAMED_AND_BIAS,
    ),
    Family(
        name="LFM2 MoE",
        bias="feed_forward.expert_bias",
        model_types=("lfm2_moe",),
        num_experts="num_experts",
        has_experts=_from("num_dense_layers"),
        block="feed_forward",
        scoring=_sigmoid,
        aux_loss=False,
        disk={
            **_split("feed_forward", "feed_forward", "gate", "w1", "w3", "w2"),
            **_as_in_memory("feed_forward.expert_bias"),
        },
    ),
    Family(
        name="Cohere2 MoE",
        model_types=("cohere2_moe",),
        num_experts="num_experts",
        has_experts=_marked_sparse,
        shared="mlp.shared_experts",
        shared_count=_number("num_shared_experts"),
        scoring=_selection_fn,
        aux_loss=False,
        peft_renames_mlp=True,
        disk=_NAMED,
    ),
    Family(
        name="Llama 4",
        model_types=("llama4_text",),
        num_experts="num_local_experts",
        has_experts=_listed,
        block="feed_forward",
        router="router",
        shared="feed_forward.shared_expert",
        transposed=True,
        scoring=_sigmoid,
        logits_at=1,
        aux_loss=False,
        grouped_mm=False,
        disk=_as_in_memory(
            "feed_forward.router.weight", "feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj"
        ),
    ),
    Family(
        name="gpt-oss",
        model_types=("gpt_oss",),
        num_experts="num_local_experts",
        router="router",
        transposed=True,
        biased=True,
        own_gate=True,
        disk=_as_in_memory(
            "mlp.router.weight",
            "mlp.router.bias",
            "mlp.experts.gate_up_proj",
            "mlp.experts.gate_up_proj_bias",
            "mlp.experts.down_proj",
            "mlp.experts.down_proj_bias",
        ),
    ),
)

BY_MODEL_TYPE: dict[str, Family] = {model_type: family for family in FAMILIES for model_type in family.model_types}
