"""Where the experts are: the result of `find_layout` matches memory and disk for every family."""

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from llama_stack_provider_moe.compute.moe.adapters import add_lora
from llama_stack_provider_moe.compute.moe.derive import find_layout
from llama_stack_provider_moe.compute.moe.layout import ExpertLayout
from llama_stack_provider_moe.compute.moe.on_disk import names_on_disk
from llama_stack_provider_moe.compute.moe.resolve_settings import resolve_moe
from llama_stack_provider_moe.errors import LayoutError
from llama_stack_provider_moe.spec import Adapter, Moe
from tests.support import tiny_models

EXPERTS, HIDDEN, INNER = 4, 32, 24


class Truth(NamedTuple):
    """What the tiny model of a family is, from its config by hand."""

    moe_layers: tuple[int, ...]
    dense_layers: tuple[int, ...]
    top_k: int
    shared: int
    aux_loss: bool


BOTH = ((0, 1), ())
SECOND = ((1,), (0,))
TRUTH = {
    "granitemoe": Truth(*BOTH, 2, 0, True),
    "granitemoeshared": Truth(*BOTH, 2, 1, True),
    "granitemoehybrid": Truth(*BOTH, 2, 1, True),
    "mixtral": Truth(*BOTH, 2, 0, True),
    "minimax_m2": Truth(*BOTH, 2, 0, True),
    "phimoe": Truth(*BOTH, 2, 0, True),
    "qwen2_moe": Truth(*BOTH, 2, 1, True),
    "qwen3_next": Truth(*BOTH, 2, 1, True),
    "qwen3_5_moe": Truth(*BOTH, 2, 1, True),
    "qwen3_moe": Truth(*BOTH, 2, 0, True),
    "olmoe": Truth(*BOTH, 2, 0, True),
    "ernie4_5_moe": Truth(*SECOND, 2, 1, True),
    "glm4_moe": Truth(*SECOND, 2, 1, False),
    "deepseek_v3": Truth(*SECOND, 2, 1, False),
    "lfm2_moe": Truth((1, 2), (0,), 2, 0, False),
    "cohere2_moe": Truth(*SECOND, 2, 1, False),
    "llama4_text": Truth(*SECOND, 1, 1, False),
    "gpt_oss": Truth(*BOTH, 2, 0, True),
}


def layout_of(model: PreTrainedModel) -> ExpertLayout:
    layout = find_layout(model)
    assert layout is not None
    return layout


def test_every_moe_family_has_its_truth() -> None:
    assert tuple(TRUTH) == tiny_models.MOE


@pytest.mark.parametrize("family", tiny_models.MOE)
def test_layout_describes_the_model(family: str) -> None:
    model, truth = tiny_models.model(family), TRUTH[family]
    layout = layout_of(model)
    assert layout.model_type == model.config.model_type
    assert (layout.moe_layers, layout.dense_layers) == (truth.moe_layers, truth.dense_layers)
    assert (layout.num_experts, layout.top_k, layout.shared_experts) == (EXPERTS, truth.top_k, truth.shared)
    assert layout.aux_loss is truth.aux_loss
    # Every stack of matrices in the model is the layout's, and the other way round. (A convolution's is none.)
    stacks = {
        name: tuple(parameter.shape)
        for name, parameter in model.named_parameters()
        if parameter.dim() == 3 and "conv" not in name
    }
    gate_up, down = (EXPERTS, 2 * INNER, HIDDEN), (EXPERTS, HIDDEN, INNER)
    if layout.transposed:
        gate_up, down = (EXPERTS, HIDDEN, 2 * INNER), (EXPERTS, INNER, HIDDEN)
    assert stacks == {
        layout.path(layer, f"{layout.experts_path}.{name}"): shape
        for layer in truth.moe_layers
        for name, shape in ((layout.gate_up, gate_up), (layout.down, down))
    }
    assert layout.biased is any(name.endswith("down_proj_bias") for name, _ in model.named_parameters())
    routers, experts = layout.routers(model), layout.experts(model)
    assert tuple(routers) == tuple(experts) == truth.moe_layers
    for layer in truth.moe_layers:
        assert tuple(routers[layer].get_parameter("weight").shape) == (EXPERTS, HIDDEN)
        assert experts[layer] is model.get_submodule(layout.path(layer, layout.experts_path))
    for layer in truth.moe_layers if truth.shared else ():
        shared = model.get_submodule(layout.path(layer, str(layout.shared_path)))
        assert any(isinstance(module, nn.Linear) for module in shared.modules())
    assert bool(layout.shared_path) is any("shared" in name for name, _ in model.named_modules())
    assert f"top-{truth.top_k}" in layout.text()


@pytest.mark.parametrize("family", tiny_models.MOE)
def test_layout_is_the_same_through_adapters(family: str) -> None:
    model = tiny_models.model(family)
    layout = layout_of(model)
    routers, experts = layout.routers(model), layout.experts(model)
    resolved = resolve_moe(Moe(train_router=True), layout, full=False)
    peft_model = add_lora(model, Adapter(rank=2), layout, resolved).model
    assert find_layout(peft_model) == layout
    assert all(layout.routers(peft_model)[layer] is router for layer, router in routers.items())
    assert all(layout.experts(peft_model)[layer] is module for layer, module in experts.items())


@pytest.mark.parametrize("family", tiny_models.MOE)
def test_disk_names_are_those_of_the_saved_model(family: str, tmp_path: Path) -> None:
    """Every tensor of a saved MoE block is named, no other is, and joined in their order they make the fused one."""
    model = tiny_models.model(family)
    layout = layout_of(model)
    model.save_pretrained(tmp_path)
    disk = load_file(tmp_path / "model.safetensors")
    blocks = tuple(layout.path(layer, f"{layout.block}.") for layer in layout.moe_layers)
    outside = {name for name in model.state_dict() if not name.startswith(blocks) or ".shared" in name}
    on_disk = names_on_disk(model, layout)
    named = {
        layout.path(layer, template.format(expert=expert))
        for layer in layout.moe_layers for templates in on_disk.values()
        for template in templates for expert in range(EXPERTS)
    }  # fmt: skip
    assert named == set(disk) - outside
    memory = model.state_dict()
    for layer in layout.moe_layers:
        for fused, templates in on_disk.items():
            expected = memory[layout.path(layer, fused)]
            if "{expert}" in templates[0]:
                found = torch.stack([joined(disk, layout, layer, templates, expert) for expert in range(EXPERTS)])
            else:
                found = joined(disk, layout, layer, templates, 0)
            assert torch.equal(found, expected), fused


def joined(
    disk: dict[str, torch.Tensor], layout: ExpertLayout, layer: int, templates: tuple[str, ...], expert: int
) -> torch.Tensor:
    return torch.cat([disk[layout.path(layer, template.format(expert=expert))] for template in templates])


@pytest.mark.parametrize(
    ("family", "changes", "moe_layers"),
    [
        ("qwen2_moe", {"num_hidden_layers": 4, "decoder_sparse_step": 2}, (1, 3)),
        ("qwen3_moe", {"num_hidden_layers": 3, "mlp_only_layers": [1]}, (0, 2)),
        ("qwen3_next", {"num_hidden_layers": 3, "layer_types": ["full_attention"] * 3, "mlp_only_layers": [2]}, (0, 1)),
        ("ernie4_5_moe", {"num_hidden_layers": 5, "moe_layer_start_index": 1, "moe_layer_end_index": 3}, (1, 2, 3)),
        ("ernie4_5_moe", {"num_hidden_layers": 5, "moe_layer_interval": 2}, (1, 3)),
        ("glm4_moe", {"num_hidden_layers": 3, "first_k_dense_replace": 2}, (2,)),
        ("deepseek_v3", {"num_hidden_layers": 3, "first_k_dense_replace": 0}, (0, 1, 2)),
        ("lfm2_moe", {"num_dense_layers": 2}, (2,)),
        ("cohere2_moe", {"num_hidden_layers": 3, "mlp_layer_types": ["sparse", "dense", "sparse"]}, (0, 2)),
        ("llama4_text", {"num_hidden_layers": 3, "interleave_moe_layer_step": 1}, (0, 1, 2)),
        ("llama4_text", {"num_hidden_layers": 3, "moe_layers": [0, 2]}, (0, 2)),
    ],
)
def test_which_layers_have_experts(family: str, changes: dict[str, Any], moe_layers: tuple[int, ...]) -> None:
    model = tiny_models.model(family, **changes)
    layout = layout_of(model)
    assert layout.moe_layers == moe_layers
    assert set(layout.dense_layers) == set(range(model.config.num_hidden_layers)) - set(moe_layers)


@pytest.mark.parametrize(
    ("family", "changes", "shared"),
    [
        ("granitemoehybrid", {"shared_intermediate_size": 16}, 1),
        ("granitemoeshared", {"shared_intermediate_size": 0}, 0),
        ("ernie4_5_moe", {"moe_num_shared_experts": 2}, 2),
        ("ernie4_5_moe", {"moe_num_shared_experts": 0}, 0),
        ("deepseek_v3", {"n_shared_experts": 3}, 3),
        ("cohere2_moe", {"num_shared_experts": 0}, 0),
    ],
)
def test_how_many_shared_experts(family: str, changes: dict[str, Any], shared: int) -> None:
    layout = layout_of(tiny_models.model(family, **changes))
    assert (layout.shared_experts, layout.shared_path is None) == (shared, shared == 0)


# model_type -> what its tiny config needs beyond `tiny_models`' common values.
DENSE_ZOO: dict[str, dict[str, Any]] = {
    "mistral": {"intermediate_size": 48},
    "gemma2": {"intermediate_size": 48, "head_dim": 8},
    "phi3": {"intermediate_size": 48},
    "granite": {"intermediate_size": 48},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4},
    "lfm2": {"intermediate_size": 48, "layer_types": ["conv", "full_attention"]},
    "mamba": {"state_size": 4},
    "glm4": {"intermediate_size": 48, "head_dim": 8},
}


def other(model_type: str, changes: dict[str, Any]) -> PreTrainedModel:
    """A tiny model of a family that is not among `tiny_models`."""
    config = AutoConfig.for_model(model_type, **{**tiny_models._SHAPE, **changes})
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model


@pytest.mark.parametrize("model_type", DENSE_ZOO)
def test_dense_models_have_no_layout(model_type: str) -> None:
    assert find_layout(other(model_type, DENSE_ZOO[model_type])) is None


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {}),
        ("qwen3", {}),
        ("granitemoehybrid", {"num_local_experts": 0}),  # as Granite 4 dense models are published
        ("qwen3_moe", {"mlp_only_layers": [0, 1]}),
        ("deepseek_v3", {"first_k_dense_replace": 2}),
    ],
)
def test_models_without_experts_have_no_layout(family: str, changes: dict[str, Any]) -> None:
    assert find_layout(tiny_models.model(family, **changes)) is None


REFUSED_ZOO: dict[str, tuple[dict[str, Any], str]] = {
    # model_type -> config, what the error says
    "jetmoe": ({"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 24, "kv_channels": 8},
               "its attention has experts too"),
    "dbrx": ({"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64, "ffn_config": {"ffn_hidden_size": 24},
              "attn_config": {"rope_theta": 1e4}}, "two axes, not three"),
}  # fmt: skip


@pytest.mark.parametrize("model_type", REFUSED_ZOO)
def test_a_moe_that_this_version_can_not_train_is_refused_with_the_reason(model_type: str) -> None:
    changes, reason = REFUSED_ZOO[model_type]
    with pytest.raises(LayoutError, match=f"{model_type}.*{reason}"):
        find_layout(other(model_type, changes))


@pytest.mark.parametrize("model_type", REFUSED_ZOO)
def test_a_moe_that_is_not_understood_is_an_error_that_shows_the_evidence(model_type: str) -> None:
    model = other(model_type, REFUSED_ZOO[model_type][0])
    model.config.model_type = "renamed"
    with pytest.raises(LayoutError, match=r"'renamed' looks like .* modules \[.*(mlp|experts)"):
        find_layout(model)


@pytest.mark.parametrize("family", tiny_models.MOE)
def test_the_name_of_a_family_does_not_matter(family: str) -> None:
    """Not the model type but the modules say where experts are. (PEFT and `exceptions` go by names.)"""
    model = tiny_models.model(family)
    before = layout_of(model)
    model.config.model_type = "renamed"
    assert replace(layout_of(model), model_type=before.model_type, peft_renames_mlp=before.peft_renames_mlp) == before


def test_a_stack_of_matrices_alone_gives_a_moe_away() -> None:
    model = tiny_models.model("llama")
    model.model.layers[1].mlp.bank = nn.Parameter(torch.zeros(4, 3, 2))
    with pytest.raises(LayoutError, match=r"modules \['model\.layers\.\*\.mlp\.bank'\]"):
        find_layout(model)


@pytest.mark.parametrize(
    ("family", "key", "value", "expected"),
    [
        ("mixtral", "num_local_experts", 8, r"shape \(4, 48, 32\), the config describes \(8, 48, 32\)"),
        ("qwen3_moe", "num_experts", 2, r"shape \(4, 48, 32\), the config describes \(2, 48, 32\)"),
        (
            "mixtral",
            "num_experts_per_tok",
            3,
            r"routers choose 2 experts for a token, the config says num_experts_per_tok 3",
        ),
        ("deepseek_v3", "first_k_dense_replace", 0, "experts in layers 0-1, the modules have them in layers 1"),
        ("llama4_text", "moe_layers", [0, 1], "experts in layers 0-1, the modules have them in layers 1"),
        ("qwen2_moe", "mlp_only_layers", [0], "experts in layers 1, the modules have them in layers 0-1"),
        ("granitemoehybrid", "num_local_experts", 0, "experts in layers none, the modules have them in layers 0-1"),
        ("ernie4_5_moe", "moe_num_shared_experts", 0, r"mlp\.shared_experts is in the model, and not in what"),
        ("mixtral", "num_hidden_layers", 3, "experts in layers 0-2, the modules have them in layers 0-1"),
    ],
)
def test_a_config_that_contradicts_the_modules_is_an_error(family: str, key: str, value: Any, expected: str) -> None:
    model = tiny_models.model(family)
    setattr(model.config, key, value)
    with pytest.raises(LayoutError, match=expected):
        find_layout(model)


@pytest.mark.parametrize("family", tiny_models.MOE)
def test_modules_that_contradict_the_config_are_an_error(family: str) -> None:
    """A fused weight with its axes swapped, one that is gone, and experts that are gone altogether."""
    model = tiny_models.model(family)
    layout = layout_of(model)
    layer = layout.moe_layers[-1]
    experts = layout.experts(model)[layer]
    down = experts.down_proj
    experts.down_proj = nn.Parameter(torch.empty(EXPERTS, *reversed(down.shape[1:])))
    with pytest.raises(LayoutError, match=rf"layers\.{layer}\..*experts\.down_proj has shape \(4, "):
        find_layout(model)
    del experts.down_proj
    with pytest.raises(LayoutError, match=r"down_proj has shape None|the modules have them in layers none"):
        find_layout(model)
    block = model.get_submodule(layout.path(layer, layout.block))
    del block.experts
    with pytest.raises(LayoutError, match="the modules have them in layers"):
        find_layout(model)
