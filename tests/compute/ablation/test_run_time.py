"""Directions that are taken out at run time: the logits are those of edited weights, and nothing stays behind."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from llama_stack_provider_moe.compute.ablation.apply import apply
from llama_stack_provider_moe.compute.ablation.fingerprint import sha256
from llama_stack_provider_moe.compute.ablation.run_time import removal, require_same_model
from llama_stack_provider_moe.compute.methods.ablation import direction
from llama_stack_provider_moe.compute.moe.adapters import add_lora
from llama_stack_provider_moe.compute.moe.derive import find_layout
from llama_stack_provider_moe.compute.moe.resolve_settings import apply_moe, resolve_moe
from llama_stack_provider_moe.errors import InvalidInput, ModelError
from llama_stack_provider_moe.spec import Adapter, Moe
from tests.compute.ablation.test_apply import FAMILIES, everywhere, subject
from tests.support import tiny_models
from tests.support.ablation_models import along, load, measured, plan
from tests.support.family_subject import answer


@pytest.mark.parametrize("family", FAMILIES)
def test_the_logits_are_those_of_edited_weights(family: str, tmp_path: Path) -> None:
    folder, found = subject(family)
    wanted = plan(everywhere(family), scale=0.8, sparsity=0.1, norm_preserving="off",
                  ablate_individual_experts=family in tiny_models.MOE)  # fmt: skip
    apply(str(folder), wanted, found, tmp_path / "out")
    model, edited = load(folder), load(tmp_path / "out")
    with torch.no_grad():
        before = answer(model)
        with removal(model, wanted, found).taken_out(model):
            inside = answer(model)
        assert torch.equal(answer(model), before), "the model is as before"
        assert torch.allclose(inside, answer(edited), atol=2e-5)
    assert float((inside - before).abs().max()) > 1e-2


@pytest.mark.parametrize("family", ["mixtral", "granitemoeshared", "glm4_moe"])
def test_routers_alone(family: str, tmp_path: Path) -> None:
    """The half of the direction, out of what routers read: equal to edited gates, and different from untouched ones."""
    folder, found = subject(family)
    model = load(folder)
    with torch.no_grad():
        answers = {}
        for gate_scale in (0.0, 0.5, 1.0):
            wanted = plan("1", gate_scale=gate_scale, norm_preserving="off")
            apply(str(folder), wanted, found, tmp_path / str(gate_scale))
            with removal(model, wanted, found).taken_out(model):
                answers[gate_scale] = answer(model)
            assert torch.allclose(answers[gate_scale], answer(load(tmp_path / str(gate_scale))), atol=2e-5)
    assert not torch.allclose(answers[0.0], answers[0.5], atol=1e-5)
    assert not torch.allclose(answers[0.5], answers[1.0], atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_what_an_adapter_writes_loses_the_direction_too(family: str) -> None:
    folder, found = subject(family)
    base = load(folder)
    layout = find_layout(base)
    if layout is None:
        model = get_peft_model(base, LoraConfig(r=4, target_modules=["o_proj", "down_proj"], init_lora_weights=False))
    else:
        moe = resolve_moe(Moe(), layout, full=False)
        apply_moe(base, layout, moe)
        model = add_lora(base, Adapter(rank=4, alpha=8, plan="all_experts"), layout, moe).model
    drawn = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=drawn))
    unit = direction(found.target.mean_LH[1], found.baseline.mean_LH[1], "projected")
    wanted = plan(everywhere(family), ablate_individual_experts=layout is not None)
    states = along(model.eval(), unit)
    assert float((states[1:] - states[0]).abs().max()) > 0.1
    with removal(model, wanted, found).taken_out(model):
        states = along(model, unit)
    assert float((states[1:] - states[0]).abs().max()) < 1e-4


def test_a_model_in_bf16_is_computed_in_fp32_and_rounded_once() -> None:
    folder, found = subject("mixtral")
    model = load(folder).bfloat16()
    with torch.no_grad(), removal(model, plan("0-1"), found).taken_out(model):
        inside = answer(model)
    exact = load(folder)
    with torch.no_grad(), removal(exact, plan("0-1"), found).taken_out(exact):
        assert torch.allclose(inside.float(), answer(exact), atol=0.1)


def test_the_plans_that_do_not_fit() -> None:
    folder, found = subject("mixtral")
    model = load(folder)
    wrong: dict[str, Any] = {
        "eval.ablated.ablate.layer": plan("7"),
        "eval.ablated.ablate.measurement": plan("0", 9),
    }
    for field, each in wrong.items():
        with pytest.raises(InvalidInput, match=f"{field}: . is not valid; expected a decoder block of this"):
            removal(model, each, found, "eval.ablated.")
    dense_folder, of_dense = subject("llama")
    with pytest.raises(InvalidInput, match=r"ablate_individual_experts: True .* this one is dense"):
        removal(load(dense_folder), plan("0", ablate_individual_experts=True), of_dense)
    assert not any(module._forward_hooks for module in model.modules())


def test_measurements_of_another_model(tmp_path: Path) -> None:
    folder, found = subject("llama")
    require_same_model(found.provenance, str(folder), None, "eval.ablated.measurements")
    model = load(folder)
    with torch.no_grad():
        model.lm_head.weight += 1
    model.save_pretrained(tmp_path / "other")
    with pytest.raises(InvalidInput, match=r"eval.ablated.measurements: .* measurements of this model, whose"):
        require_same_model(found.provenance, str(tmp_path / "other"), None, "eval.ablated.measurements")


def test_measurements_with_an_adapter(tmp_path: Path) -> None:
    """They fit the model with that adapter alone."""
    folder, _ = subject("llama")
    for name in ("one", "two"):
        torch.manual_seed(len(name) + ord(name[0]))
        config = LoraConfig(r=2, target_modules=["o_proj"], init_lora_weights=False)
        get_peft_model(load(folder), config).save_pretrained(tmp_path / name)
    provenance = measured(folder).provenance
    provenance = provenance.model_copy(update={"adapter": sha256(tmp_path / "one" / "adapter_model.safetensors")})
    require_same_model(provenance, str(folder), tmp_path / "one", "m")
    with pytest.raises(InvalidInput, match="without an adapter, or with the one that it has"):
        require_same_model(provenance, str(folder), tmp_path / "two", "m")
    with pytest.raises(InvalidInput, match="without an adapter, or with none"):
        require_same_model(provenance, str(folder), None, "m")


def test_a_module_that_is_never_called_is_an_error() -> None:
    folder, found = subject("llama")
    model = load(folder)
    mlp = model.model.layers[0].mlp
    weight = mlp.down_proj.weight
    mlp.forward = lambda states: torch.nn.functional.linear(
        mlp.act_fn(mlp.gate_proj(states)) * mlp.up_proj(states), weight)  # fmt: skip
    made = removal(model, plan("0-1"), found)
    with pytest.raises(ModelError, match=r"without calling model.layers.0.mlp.down_proj"), made.taken_out(model):
        answer(model)
