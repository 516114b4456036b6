"""Whole runs of each adapter plan, each balance strategy and a quantised base, SFT and DPO."""

import json
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from llama_stack_provider_moe.compute.moe.derive import find_layout
from llama_stack_provider_moe.compute.moe.steering import ROUTER_BIAS
from llama_stack_provider_moe.compute.worker.main import COMPLETED, FAILED
from tests.support import tiny_models
from tests.support.training_support import Run, Workshop, sft_rows, workshop

__all__ = ["workshop"]

RULES = [{"experts": {"0": 4, "2": 2}}]
PLANS: dict[str, dict[str, Any]] = {
    "trunk": {"plan": "trunk", "rank": 4},
    "all_experts": {"plan": "all_experts", "rank": 4},
    "per_expert": {"plan": "per_expert", "rank": 4, "rules": RULES},
    "router": {"rank": 4, "lora_attn_modules": [], "apply_lora_to_mlp": False},
}
STRATEGIES: dict[str, dict[str, Any]] = {
    "switch": {"router_aux_loss_coef": 0.01},
    "gshard": {"moe_load_balancing": "gshard", "router_aux_loss_coef": 0.01},
    "expert_choice": {"moe_load_balancing": "expert_choice"},
    "aux_free": {"moe_load_balancing": "aux_free", "router_bias_rate": 0.05},
}


def finished(run: Run) -> Run:
    assert run.exit_code == COMPLETED, run.reason
    before, *_, after = run.held_out("validation_loss")
    assert after < before
    return run


@pytest.mark.parametrize("recipe", ["sft", "dpo"])
@pytest.mark.parametrize("plan", PLANS)
def test_plans(workshop: Workshop, plan: str, recipe: str) -> None:
    run = finished(workshop.run(recipe, "mixtral", adapter=PLANS[plan], moe={"train_router": True}))
    groups = set(run.resolved["adapter"]["by_group"])
    wanted = {"attention", "router"} | (set() if plan == "trunk" else {"experts"})
    assert groups == (wanted if plan != "router" else {"router"})
    saved = run.adapter()
    experts = {name: tensor for name, tensor in saved.items() if ".experts." in name}
    assert bool(experts) is ("experts" in groups)
    for name, tensor in experts.items() if plan == "per_expert" else ():
        by_expert = tensor.view(4, 4, -1) if "lora_A" in name else tensor.view(-1, 4, 4).permute(2, 1, 0)
        used = (by_expert != 0).any(dim=-1).sum(dim=-1)
        assert used.tolist() == [4, 0, 2, 0], name


@pytest.mark.parametrize("family", ["granitemoe", "gpt_oss", "deepseek_v3"])
def test_all_weights_of_the_routers_alone(workshop: Workshop, family: str) -> None:
    """Every weight of every router moves, gpt-oss's bias too, and no other, bit by bit; transformers loads it."""
    moe = {"train_router_only": True, "router_aux_loss_coef": 0}
    training = {"dtype": "fp32", "n_epochs": 2}
    run = finished(workshop.run("sft", family, adapter=None, moe=moe, training=training, optimizer={"lr": 3e-2}))
    assert set(run.resolved["adapter"]["by_group"]) == {"router"}
    assert run.resolved["adapter"]["notes"] == ["routers train alone; every other weight is frozen"]
    assert run.resolved["moe"]["routers_alone"] is True
    before, after = (AutoModelForCausalLM.from_pretrained(each) for each in (workshop.model(family), run.folder.model))
    layout = find_layout(before)
    assert layout is not None
    routers = tuple(layout.path(layer, f"{layout.router_path}.") for layer in layout.moe_layers)
    moved = {name for name, tensor in before.named_parameters() if not torch.equal(tensor, after.get_parameter(name))}
    assert moved == {name for name, _ in before.named_parameters() if name.startswith(routers)}
    assert len(moved) >= len(layout.moe_layers) * (2 if family == "gpt_oss" else 1)
    assert run.resolved["adapter"]["trainable_parameters"] == sum(before.get_parameter(each).numel() for each in moved)


@pytest.mark.parametrize("recipe", ["sft", "dpo"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_strategies(workshop: Workshop, strategy: str, recipe: str) -> None:
    run = finished(workshop.run(recipe, "deepseek_v3", moe={**STRATEGIES[strategy], "train_router": True}))
    moe = run.resolved["moe"]
    assert moe["load_balancing"] == strategy
    losses = [step.metrics.get("aux_loss") for step in run.events("step")]
    assert all((loss is not None and loss > 0.5) is (strategy in ("switch", "gshard")) for loss in losses)
    if strategy == "expert_choice":
        for event in run.events("routing"):
            # Each of a step's micro-batches rounds the tokens of an expert up.
            assert all(max(layer.share) - min(layer.share) < 1e-3 for layer in event.layers)
        if recipe == "dpo":
            assert run.resolved["reference_computed_ahead"] is False
            assert run.steps("preference_loss")[0] == pytest.approx(0.6931, abs=1e-3), "policy is reference at first"
    biases = list(run.folder.root.rglob(ROUTER_BIAS))
    assert bool(biases) is (strategy == "aux_free")
    if strategy == "aux_free":
        (bias,) = load_file(run.folder.adapter / ROUTER_BIAS).values()
        steps = len(run.events("step"))
        assert 0 < bias.abs().max() <= 0.05 * steps + 1e-6
        assert (
            torch.equal((bias / 0.05).round(), bias / 0.05) or (bias / 0.05 - (bias / 0.05).round()).abs().max() < 1e-4
        )
        if recipe == "dpo":
            assert run.resolved["reference_computed_ahead"] is True


def test_gshard_replaces_the_models_own_loss(workshop: Workshop) -> None:
    """The loss is cross entropy plus our balance loss, weighted once; with coefficient 0 there is no trace of it."""
    run = finished(workshop.run("sft", "mixtral", moe={**STRATEGIES["gshard"], "train_router": True}))
    for step in run.events("step"):
        assert step.metrics["loss"] == pytest.approx(step.metrics["ce"] + 0.01 * step.metrics["aux_loss"], rel=1e-5)
        assert 0.9 < step.metrics["aux_loss"] < 1.5, "GShard's is 1 at balance, the model's own 2"
    off = finished(workshop.run("sft", "mixtral", moe={"router_aux_loss_coef": 0, "train_router": True}))
    assert off.steps("ce")[0] == pytest.approx(run.steps("ce")[0], rel=1e-5)


@pytest.mark.parametrize("accumulated", [1, 4])
def test_our_loss_is_the_same_however_a_step_is_cut(workshop: Workshop, accumulated: int) -> None:
    """Gradient accumulation: a step's balance term is the mean over its micro-batches."""
    run = finished(
        workshop.run(
            "sft", "deepseek_v3", moe={"router_aux_loss_coef": 0.5, "train_router": True},
            training={"batch_size": 8 // accumulated, "gradient_accumulation_steps": accumulated},
        )
    )  # fmt: skip
    step = run.events("step")[0]
    assert step.metrics["loss"] == pytest.approx(step.metrics["ce"] + 0.5 * step.metrics["aux_loss"], rel=1e-4)
    assert step.metrics["aux_loss"] == pytest.approx(2.0, abs=0.3)


def merged_logits(run: Run) -> Tensor:
    with torch.no_grad():
        found: Tensor = AutoModelForCausalLM.from_pretrained(run.folder.merged)(torch.arange(5, 25).unsqueeze(0)).logits
    return found


@pytest.mark.parametrize("recipe", ["sft", "dpo"])
@pytest.mark.parametrize(("bits", "nested"), [(4, False), (4, True), (8, False)])
def test_a_quantised_base(workshop: Workshop, recipe: str, bits: int, nested: bool) -> None:
    """It learns, reports its memory, and merges to the same weights as plain PEFT with the decoded base."""
    run = finished(
        workshop.run(
            recipe, "qwen3_moe",
            adapter={"rank": 4, "quantize_base": True, "quantize_bits": bits, "quantize_scales": nested},
            options={"save_merged": True}, moe={"train_router": True},
        )
    )  # fmt: skip
    told = run.resolved["quantized"]
    assert (told["bits"], told["nested"], told["experts"]) == (bits, nested, 2 * 4 * 2)
    assert told["bits_a_weight"] == pytest.approx({4: 4.5, 8: 8.125}[bits] - (0.373 if nested else 0), rel=0.05)
    assert told["bytes_after"] < told["bytes_before"]
    base = workshop.model("qwen3_moe")
    with torch.no_grad():
        plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), run.folder.adapter)
        unquantised = plain(torch.arange(5, 25).unsqueeze(0)).logits
    difference = (merged_logits(run) - unquantised).abs().max().item()
    assert 1e-4 < difference < (2.0 if bits == 4 else 0.5), "training used the decoded base"
    config = json.loads((run.folder.merged / "config.json").read_text())
    assert "quantization_config" not in config


def test_quantised_and_plain_runs_learn_alike(workshop: Workshop) -> None:
    """With eight bits the loss of each step hardly differs from that with sixteen."""
    plain = finished(workshop.run("sft", "mixtral", training={"n_epochs": 3}))
    eight = {"rank": 4, "alpha": 8, "quantize_base": True, "quantize_bits": 8}
    coded = finished(workshop.run("sft", "mixtral", training={"n_epochs": 3}, adapter=eight))
    assert coded.steps("ce") == pytest.approx(plain.steps("ce"), rel=0.01)
    assert coded.steps("ce") != plain.steps("ce")


def test_quantised_experts_need_our_implementation(workshop: Workshop) -> None:
    run = workshop.run("sft", "mixtral", adapter={"quantize_base": True}, moe={"experts_backend": "peft"})
    assert run.exit_code == FAILED
    assert "true, which compute experts by grouped_mm; expected" in run.reason


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_triton_is_refused_where_there_is_no_gpu(workshop: Workshop) -> None:
    run = workshop.run("sft", "mixtral", moe={"experts_backend": "triton"})
    assert run.exit_code == FAILED
    assert "moe.experts_backend: 'triton' is not valid here; it needs a CUDA GPU" in run.reason


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["mixtral", "llama4_text", "gpt_oss"])
@pytest.mark.parametrize("adapter", [{"rank": 4}, {"rank": 4, "quantize_base": True}, None])
def test_triton_learns_as_torch_does(workshop: Workshop, family: str, adapter: Any) -> None:
    runs = [
        finished(
            workshop.run("sft", family, adapter=adapter, moe={"experts_backend": backend},
                         **({} if adapter else {"optimizer": {"lr": 1e-3}}))
        )
        for backend in ("torch", "triton")
    ]  # fmt: skip
    assert runs[1].resolved["moe"]["experts_implementation"] == "moe_triton"
    assert runs[1].steps("ce") == pytest.approx(runs[0].steps("ce"), rel=1e-3)


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_every_family_trains_quantised(workshop: Workshop, family: str) -> None:
    run = finished(
        workshop.run("sft", family, sft_rows(8), sft_rows(2, 50), adapter={"rank": 4, "quantize_base": True})
    )
    assert (run.resolved["quantized"]["experts"] > 0) is (family not in tiny_models.DENSE)


def test_experts_that_choose_are_given_up_where_all_weights_train_too(workshop: Workshop) -> None:
    run = workshop.run("dpo", "granitemoe", adapter=None, optimizer={"lr": 1e-3},
                       moe={"moe_load_balancing": "expert_choice"})  # fmt: skip
    assert run.exit_code == COMPLETED, run.reason
    assert run.resolved["reference"] == "a second copy"
    assert run.steps("preference_loss")[0] == pytest.approx(0.6931, abs=1e-3), (
        "the copy's experts choose the tokens too"
    )
