"""The `moe` block: how it resolves for a model, what it refuses, and that each setting acts on the numbers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from llama_stack_provider_moe.compute.moe.derive import find_layout
from llama_stack_provider_moe.compute.moe.dropout import add_expert_dropout
from llama_stack_provider_moe.compute.moe.layout import ExpertLayout, text_config
from llama_stack_provider_moe.compute.moe.resolve_settings import ResolvedMoe, ShippedConfig, apply_moe, resolve_moe
from llama_stack_provider_moe.errors import ModelError
from llama_stack_provider_moe.spec import Moe
from tests.support import tiny_models

IDS = torch.randint(3, 300, (2, 12), generator=torch.Generator().manual_seed(5))
NO_AUX = ("glm4_moe", "deepseek_v3", "lfm2_moe", "cohere2_moe", "llama4_text")
AUX = tuple(family for family in tiny_models.MOE if family not in NO_AUX)
GROUPED = tiny_models.GROUPED


def applied(
    family: str, full: bool = False, **moe: Any
) -> tuple[PreTrainedModel, ExpertLayout, ResolvedMoe, ShippedConfig]:
    # Phi MoE gives its routers a gradient of the token loss only where this noise lets two experts come near.
    changes = {"router_jitter_noise": 0.4} if family == "phimoe" else {}
    model = tiny_models.model(family, **changes)
    layout = find_layout(model)
    assert layout is not None
    resolved = resolve_moe(Moe(**moe), layout, full)
    return model, layout, resolved, apply_moe(model, layout, resolved)


def router_weights(model: PreTrainedModel, layout: ExpertLayout) -> list[Tensor]:
    return [router.get_parameter("weight") for router in layout.routers(model).values()]


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("family", tiny_models.MOE)
def test_defaults_on_a_moe(family: str, full: bool) -> None:
    resolved = applied(family, full)[2]
    assert resolved.is_moe
    assert resolved.output_router_logits
    assert resolved.aux_coef == (0.001 if family in AUX else 0.0)
    assert resolved.load_balancing == "switch"
    assert (resolved.z_coef, resolved.expert_dropout) == (0.0, 0.0)
    assert resolved.experts_implementation == "moe_torch"
    assert resolved.train_router is full
    assert any("no aux loss" in note for note in resolved.notes) is (family in NO_AUX)
    assert all(note in resolved.text() for note in resolved.notes)


def test_explicit_settings_are_kept() -> None:
    asked = Moe(
        output_router_logits=True,
        router_aux_loss_coef=0.02,
        router_z_loss_coef=0.003,
        expert_dropout=0.1,
        router_jitter=0.2,
        enable_moe_optimizations=False,
        train_router=True,
    )
    resolved = resolve_moe(asked, find_layout(tiny_models.model("mixtral")), full=False)
    assert resolved == ResolvedMoe(True, True, 0.02, False, "switch", 0.0, 0.003, 0.1, 0.2, "eager", True)
    assert resolved.text().startswith(
        "aux loss switch x 0.02 (the model's own); z-loss x 0.003; expert dropout 0.1; router jitter 0.2; "
        "experts eager; routers train"
    )
    assert (
        resolve_moe(Moe(train_router=False), find_layout(tiny_models.model("mixtral")), full=True).train_router is False
    )


def test_losses_with_frozen_routers_add_a_note() -> None:
    layout, frozen = find_layout(tiny_models.model("mixtral")), "routers are frozen (moe.train_router)"
    for moe, told in (
        (Moe(), True),  # the model's own aux loss
        (Moe(router_aux_loss_coef=0.0), False),
        (Moe(router_aux_loss_coef=0.0, router_z_loss_coef=0.1), True),
        (Moe(train_router=True, router_z_loss_coef=0.1), False),
    ):
        assert any(note.startswith(frozen) for note in resolve_moe(moe, layout, full=False).notes) is told, moe
    assert not resolve_moe(Moe(), layout, full=True).notes


def test_no_router_logits_no_aux_loss() -> None:
    layout = find_layout(tiny_models.model("mixtral"))
    assert resolve_moe(Moe(output_router_logits=False), layout, full=False).aux_coef == 0
    with pytest.raises(ModelError, match=r"router_aux_loss_coef: 0\.01 is not valid .* output_router_logits false"):
        resolve_moe(Moe(output_router_logits=False, router_aux_loss_coef=0.01), layout, full=False)


@pytest.mark.parametrize("family", NO_AUX)
def test_this_package_computes_an_aux_loss_if_the_family_has_none(family: str) -> None:
    layout = find_layout(tiny_models.model(family))
    resolved = resolve_moe(Moe(router_aux_loss_coef=0.01), layout, full=False)
    assert (resolved.own_aux, resolved.aux_coef, resolved.models_aux_coef) == (True, 0.01, 0.0)
    assert "aux loss switch x 0.01 (computed here)" in resolved.text()
    assert not any("no aux loss" in note for note in resolved.notes)
    assert resolve_moe(Moe(router_aux_loss_coef=0), layout, full=False).own_aux is False


@pytest.mark.parametrize("family", tiny_models.MOE)
def test_gshard_replaces_the_models_own_loss(family: str) -> None:
    model, _, resolved, _ = applied(family, moe_load_balancing="gshard", router_aux_loss_coef=0.02)
    assert (resolved.own_aux, resolved.aux_coef, resolved.models_aux_coef) == (True, 0.02, 0.0)
    if family in AUX:
        assert text_config(model).router_aux_loss_coef == model.router_aux_loss_coef == 0


@pytest.mark.parametrize("family", tiny_models.MOE)
def test_aux_free_needs_a_bias_that_the_model_keeps(family: str) -> None:
    layout = find_layout(tiny_models.model(family))
    assert layout is not None
    if family in ("minimax_m2", "ernie4_5_moe", "glm4_moe", "deepseek_v3", "lfm2_moe"):
        resolved = resolve_moe(Moe(moe_load_balancing="aux_free"), layout, full=False)
        assert (resolved.bias_rate, resolved.aux_coef) == (0.001, 0)
        assert "biases move by 0.001 a step" in resolved.text()
    else:
        with pytest.raises(ModelError, match=rf"moe_load_balancing: 'aux_free' .*{layout.family} have no bias to move"):
            resolve_moe(Moe(moe_load_balancing="aux_free"), layout, full=False)


def test_lfm2_without_its_bias_has_none() -> None:
    layout = find_layout(tiny_models.model("lfm2_moe", use_expert_bias=False))
    assert layout is not None
    assert layout.bias_path is None


@pytest.mark.parametrize(
    ("family", "moe", "implementation"),
    [
        ("mixtral", {}, "moe_torch"),
        ("mixtral", {"experts_backend": "torch"}, "moe_torch"),
        ("mixtral", {"experts_backend": "peft"}, "grouped_mm"),
        ("mixtral", {"experts_backend": "triton"}, "moe_triton"),
        ("llama4_text", {"experts_backend": "triton", "moe_load_balancing": "expert_choice"}, "moe_triton_partial"),
        ("mixtral", {"enable_moe_optimizations": False}, "eager"),
        ("mixtral", {"moe_load_balancing": "expert_choice"}, "moe_torch_partial"),
        ("llama4_text", {}, "moe_torch"),
        ("llama4_text", {"experts_backend": "peft"}, "eager"),
    ],
)
def test_who_computes_the_experts(family: str, moe: dict[str, Any], implementation: str) -> None:
    resolved = applied(family, **moe)[2]
    assert resolved.experts_implementation == implementation
    assert any("no grouped" in note for note in resolved.notes) is (
        implementation == "eager" and "experts_backend" in moe
    )


def test_a_moe_is_not_trained_as_if_it_were_dense() -> None:
    with pytest.raises(ModelError, match=r"moe\.auto_detect_moe: False is not valid .*Mixtral \(mixtral\): 4 experts"):
        resolve_moe(Moe(auto_detect_moe=False), find_layout(tiny_models.model("mixtral")), full=False)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("output_router_logits", True),
        ("router_aux_loss_coef", 0.01),
        ("router_z_loss_coef", 0.01),
        ("router_jitter", 0.01),
        ("expert_dropout", 0.1),
        ("moe_load_balancing", "gshard"),
        ("train_router", True),
    ],
)
def test_moe_settings_on_a_dense_model_are_refused(field: str, value: Any) -> None:
    with pytest.raises(ModelError, match=rf"moe\.{field}: {value!r} is not valid .* the model is dense"):
        resolve_moe(Moe(**{field: value}), None, full=True)


@pytest.mark.parametrize("moe", [Moe(), Moe(auto_detect_moe=False), Moe(train_router=False, router_aux_loss_coef=0)])
def test_a_dense_model_does_not_change(moe: Moe) -> None:
    model = tiny_models.model("llama")
    before = model.config.to_dict()
    resolved = resolve_moe(moe, find_layout(model), full=True)
    assert resolved == ResolvedMoe(False, False, 0.0, False, "switch", 0.0, 0.0, 0.0, 0.0, None, False)
    shipped = apply_moe(model, None, resolved)
    assert model.config.to_dict() == before
    with shipped.restored():
        assert model.config.to_dict() == before


@pytest.mark.parametrize("family", tiny_models.MOE)
def test_the_config_in_training_and_as_shipped(family: str, tmp_path: Path) -> None:
    """What training needs is in memory; what is saved is byte by byte what the model came with."""
    model = tiny_models.model(family)
    model.save_pretrained(tmp_path / "base")
    layout = find_layout(model)
    resolved = resolve_moe(Moe(**({"router_aux_loss_coef": 0.5} if family in AUX else {})), layout, full=True)
    shipped = apply_moe(model, layout, resolved)
    config = text_config(model)
    assert config.output_router_logits is True
    if family in AUX:
        assert config.router_aux_loss_coef == model.router_aux_loss_coef == 0.5
        assert config.num_experts == 4  # TRL reads it, of every family that has an aux loss
    with shipped.restored():
        model.save_pretrained(tmp_path / "saved")
    assert config.output_router_logits is True
    saved, original = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("saved", "base"))
    assert saved == original
    if family.startswith("granite") or family == "phimoe":
        assert "num_experts" not in saved


@pytest.mark.parametrize("family", GROUPED)
def test_implementations_are_switched_and_equal(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits and gradients agree; spies on the functions tell which one ran."""
    calls: list[str] = []
    for name in ("grouped_mm", "moe_torch"):
        plain = ALL_EXPERTS_FUNCTIONS[name]
        monkeypatch.setitem(
            ALL_EXPERTS_FUNCTIONS,
            name,
            lambda *args, name=name, plain=plain, **kwargs: calls.append(name) or plain(*args, **kwargs),
        )
    found = []
    for moe, ran in (
        ({}, "moe_torch"),
        ({"experts_backend": "peft"}, "grouped_mm"),
        ({"enable_moe_optimizations": False}, ""),
    ):
        calls.clear()
        model, layout, _, _ = applied(family, **moe)
        outputs = model(IDS, labels=IDS)
        assert calls == ([ran] * len(layout.moe_layers) if ran else [])
        outputs.loss.backward()
        gradients = [parameter.grad for parameter in layout.experts(model)[1].parameters()]
        found.append((outputs.logits.detach(), torch.cat([one.flatten() for one in gradients])))
    eager_logits, eager_gradients = found.pop()
    assert eager_gradients.abs().max() > 1e-3
    for logits, gradients in found:
        assert (logits - eager_logits).abs().max() <= 1e-5
        assert (gradients - eager_gradients).abs().max() <= 1e-6


@pytest.mark.parametrize(
    ("family", "optimised"), [*((family, True) for family in tiny_models.MOE), ("mixtral", False), ("gpt_oss", False)]
)
def test_expert_dropout_acts_in_training_only_and_keeps_the_mean(family: str, optimised: bool) -> None:
    """In evaluation nothing changes; in training outputs vary, and their mean is the output without dropout."""
    plain = applied(family, enable_moe_optimizations=optimised)[0]
    model, layout, _, _ = applied(family, enable_moe_optimizations=optimised, expert_dropout=0.3)
    assert model.state_dict().keys() == plain.state_dict().keys()
    layer = layout.moe_layers[-1]
    experts = layout.experts(model)[layer]
    seen: list[Any] = []
    handle = experts.register_forward_pre_hook(lambda _, inputs: seen.append(inputs))
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, plain(IDS).logits)
        handle.remove()
        without = experts(*seen[0])
        torch.manual_seed(0)
        model.train()
        runs = torch.stack([experts(*seen[0]) for _ in range(200)])
        assert torch.equal(layout.experts(plain)[layer](*seen[0]), without)
    assert (runs[0] - runs[1]).abs().max() > 1e-3
    # A mean of 200 is off by its standard error: measured 0.9 to 1.31 of it. Without the scale 1 / (1 - p), 6.
    error = (runs.mean(dim=0) - without).square().mean().sqrt()
    expected = (runs.var(dim=0) / 200).mean().sqrt()
    assert 0.5 < (error / expected).item() < 1.6


@pytest.mark.parametrize("family", ["mixtral", "lfm2_moe", "gpt_oss"])
def test_dropout_that_is_added_to_a_model_in_training_acts_at_once(family: str) -> None:
    model = tiny_models.model(family).train()
    layout = find_layout(model)
    assert layout is not None
    add_expert_dropout(model, layout, 0.3)
    with torch.no_grad():
        assert (model(IDS).logits - model(IDS).logits).abs().max() > 1e-3


@pytest.mark.parametrize("family", AUX)
def test_the_aux_coefficient_changes_the_routers_gradient(family: str) -> None:
    """gradient(c) = gradient(0) + c * gradient of the aux loss: of the model's own loss, with that coefficient."""

    def gradient(coefficient: float, of_aux: bool = False) -> Tensor:
        model, layout, _, _ = applied(family, router_aux_loss_coef=coefficient, train_router=True)
        torch.manual_seed(0)  # Phi MoE draws its experts in training
        outputs = model.train()(IDS, labels=IDS)
        (outputs.aux_loss if of_aux else outputs.loss).backward()
        return torch.stack([weight.grad for weight in router_weights(model, layout) if weight.grad is not None])

    none, some, aux = gradient(0.0), gradient(0.5), gradient(0.0, of_aux=True)
    assert none.abs().max() > 1e-5
    assert aux.abs().max() > 1e-3
    torch.testing.assert_close(some, none + 0.5 * aux, rtol=1e-4, atol=1e-6)
    assert (some - none).abs().max() > 1e-3
