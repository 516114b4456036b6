"""The layout that is derived equals the table that a person wrote for 18 families, field by field.

Up to version 0.4 `find_layout` read a hand-written table; `EXPECTED` holds what it said about the tiny models of
`tests.support.tiny_models`. The probe of a router neither runs nor changes the model, wherever that is.
"""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from llama_stack_provider_moe.compute.moe.derive import find_layout
from llama_stack_provider_moe.compute.moe.layout import ExpertLayout
from tests.support import tiny_models

COMMON: dict[str, Any] = {
    "layers_path": "model.layers",
    "moe_layers": (0, 1),
    "dense_layers": (),
    "num_experts": 4,
    "top_k": 2,
    "shared_experts": 1,
    "shared_path": None,
    "block": "mlp",
    "router_path": "mlp.gate",
    "experts_path": "mlp.experts",
    "gate_up": "gate_up_proj",
    "down": "down_proj",
    "transposed": False,
    "biased": False,
    "scoring": "softmax",
    "logits_at": 0,
    "chosen_at": 2,
    "aux_loss": True,
    "default_aux_coef": 0.001,
    "grouped_mm": True,
    "own_gate": False,
    "needs_num_experts": False,
    "peft_renames_mlp": False,
    "frozen": (),
    "bias_path": None,
    "groups": 1,
    "groups_chosen": 1,
    "model_type": "",
}

# Family -> what differs from COMMON.
EXPECTED: dict[str, dict[str, Any]] = {
    "granitemoe": {
        "shared_experts": 0,
        "block": "block_sparse_moe",
        "router_path": "block_sparse_moe.router",
        "experts_path": "block_sparse_moe.experts",
        "needs_num_experts": True,
        "model_type": "granitemoe",
    },
    "granitemoeshared": {
        "model_type": "granitemoeshared",
        "shared_path": "shared_mlp",
        "block": "block_sparse_moe",
        "router_path": "block_sparse_moe.router",
        "experts_path": "block_sparse_moe.experts",
        "needs_num_experts": True,
    },
    "granitemoehybrid": {
        "model_type": "granitemoehybrid",
        "shared_path": "shared_mlp",
        "block": "block_sparse_moe",
        "router_path": "block_sparse_moe.router",
        "experts_path": "block_sparse_moe.experts",
        "needs_num_experts": True,
    },
    "mixtral": {"model_type": "mixtral", "shared_experts": 0},
    "minimax_m2": {
        "model_type": "minimax_m2",
        "shared_experts": 0,
        "scoring": "sigmoid",
        "bias_path": "mlp.e_score_correction_bias",
    },
    "phimoe": {"model_type": "phimoe", "shared_experts": 0, "router_path": "mlp.router", "needs_num_experts": True},
    "qwen2_moe": {"model_type": "qwen2_moe", "shared_path": "mlp.shared_expert"},
    "qwen3_next": {"model_type": "qwen3_next", "shared_path": "mlp.shared_expert", "peft_renames_mlp": True},
    "qwen3_5_moe": {"model_type": "qwen3_5_moe_text", "shared_path": "mlp.shared_expert"},
    "qwen3_moe": {"model_type": "qwen3_moe", "shared_experts": 0, "peft_renames_mlp": True},
    "olmoe": {"model_type": "olmoe", "shared_experts": 0, "peft_renames_mlp": True},
    "ernie4_5_moe": {
        "model_type": "ernie4_5_moe",
        "moe_layers": (1,),
        "dense_layers": (0,),
        "shared_path": "mlp.shared_experts",
        "peft_renames_mlp": True,
        "frozen": ("mlp.gate.moe_statics.e_score_correction_bias",),
        "bias_path": "mlp.gate.moe_statics.e_score_correction_bias",
    },
    "glm4_moe": {
        "model_type": "glm4_moe",
        "moe_layers": (1,),
        "dense_layers": (0,),
        "shared_path": "mlp.shared_experts",
        "scoring": "sigmoid",
        "aux_loss": False,
        "default_aux_coef": 0.0,
        "peft_renames_mlp": True,
        "bias_path": "mlp.gate.e_score_correction_bias",
        "groups": 2,
        "groups_chosen": 2,
    },
    "deepseek_v3": {
        "model_type": "deepseek_v3",
        "moe_layers": (1,),
        "dense_layers": (0,),
        "shared_path": "mlp.shared_experts",
        "scoring": "sigmoid",
        "aux_loss": False,
        "default_aux_coef": 0.0,
        "peft_renames_mlp": True,
        "bias_path": "mlp.gate.e_score_correction_bias",
        "groups": 2,
        "groups_chosen": 2,
    },
    "lfm2_moe": {
        "model_type": "lfm2_moe",
        "moe_layers": (1, 2),
        "dense_layers": (0,),
        "shared_experts": 0,
        "block": "feed_forward",
        "router_path": "feed_forward.gate",
        "experts_path": "feed_forward.experts",
        "scoring": "sigmoid",
        "aux_loss": False,
        "default_aux_coef": 0.0,
        "bias_path": "feed_forward.expert_bias",
    },
    "cohere2_moe": {
        "model_type": "cohere2_moe",
        "moe_layers": (1,),
        "dense_layers": (0,),
        "shared_path": "mlp.shared_experts",
        "aux_loss": False,
        "default_aux_coef": 0.0,
        "peft_renames_mlp": True,
    },
    "llama4_text": {
        "model_type": "llama4_text",
        "moe_layers": (1,),
        "dense_layers": (0,),
        "top_k": 1,
        "shared_path": "feed_forward.shared_expert",
        "block": "feed_forward",
        "router_path": "feed_forward.router",
        "experts_path": "feed_forward.experts",
        "transposed": True,
        "scoring": "sigmoid",
        "logits_at": 1,
        "aux_loss": False,
        "default_aux_coef": 0.0,
        "grouped_mm": False,
    },
    "gpt_oss": {
        "model_type": "gpt_oss",
        "shared_experts": 0,
        "router_path": "mlp.router",
        "transposed": True,
        "biased": True,
        "own_gate": True,
    },
}


def layout_of(model: nn.Module) -> ExpertLayout:
    layout = find_layout(model)
    assert layout is not None
    return layout


def test_the_table_is_of_all_families() -> None:
    assert tuple(EXPECTED) == tiny_models.MOE


@pytest.mark.parametrize("family", EXPECTED)
def test_the_derived_layout_equals_the_table(family: str) -> None:
    found = layout_of(tiny_models.model(family)).as_json()
    expected = {**COMMON, **EXPECTED[family]}
    assert {key: found[key] for key in expected} == expected


@pytest.mark.parametrize("family", EXPECTED)
def test_a_model_without_weights_has_the_same_layout(family: str) -> None:
    """So do a bf16 model and one whose router is random; building one on no device does not disturb the probe."""
    model = tiny_models.model(family)
    layout = layout_of(model)
    with torch.device("meta"):
        assert layout_of(type(model)(copy.deepcopy(model.config))) == layout
    assert layout_of(tiny_models.model(family, seed=1).to(torch.bfloat16)) == layout


@pytest.mark.parametrize("family", EXPECTED)
def test_finding_a_layout_changes_nothing(family: str) -> None:
    """Weights, buffers, modes, hooks and random numbers are the same afterwards, and no hook of the model ran."""
    model = tiny_models.model(family).train()
    layout = layout_of(model)
    before = {name: tensor.clone() for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
    ran: list[nn.Module] = []
    router = layout.routers(model)[layout.moe_layers[0]]
    handle = router.register_forward_hook(lambda module, *_: ran.append(module))
    random = torch.get_rng_state()
    assert layout_of(model) == layout
    assert torch.equal(random, torch.get_rng_state())
    assert not ran
    assert list(router._forward_hooks) == [handle.id]
    assert all(module.training for module in model.modules())
    after = dict([*model.named_parameters(), *model.named_buffers()])
    assert set(after) == set(before)
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


@pytest.mark.parametrize(
    ("family", "changes", "weighing"),
    [
        ("mixtral", {}, "chosen"), ("gpt_oss", {}, "chosen"), ("olmoe", {}, "all"),
        ("qwen3_moe", {"norm_topk_prob": False}, "all"), ("qwen3_moe", {"norm_topk_prob": True}, "chosen"),
        ("qwen3_moe", {"norm_topk_prob": False, "num_experts_per_tok": 1}, "all"),
        ("glm4_moe", {"norm_topk_prob": True}, "chosen"), ("glm4_moe", {"norm_topk_prob": False}, "own"),
        ("llama4_text", {}, "own"),
    ],
)  # fmt: skip
def test_what_the_weights_depend_on(family: str, changes: dict[str, Any], weighing: str) -> None:
    assert layout_of(tiny_models.model(family, **changes)).weighing == weighing


def test_groups_of_experts_count_only_where_the_router_uses_them() -> None:
    changes = {"n_routed_experts": 8, "num_experts_per_tok": 3, "n_group": 4, "topk_group": 2}
    grouped = tiny_models.model("deepseek_v3", **changes)
    layout = layout_of(grouped)
    assert (layout.groups, layout.groups_chosen) == (4, 2)
    for module in grouped.modules():
        if hasattr(module, "topk_group"):
            module.topk_group = 4  # every group may be used, whatever the config says
    assert layout_of(grouped) == replace(layout, groups=1, groups_chosen=1)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "deepseek_v3"])
def test_one_expert_whose_weight_is_always_one_still_shows_its_scoring(family: str) -> None:
    """With one expert and normalised weights, no weight says anything about the logits."""
    usual = layout_of(tiny_models.model(family))
    changes = {"norm_topk_prob": True} if family != "mixtral" else {}
    alone = layout_of(tiny_models.model(family, num_experts_per_tok=1, **changes))
    assert alone == replace(usual, top_k=1, weighing="chosen")
