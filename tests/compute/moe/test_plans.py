"""Adapter plans: their targets, weights that stay bit-equal, learning rates per part, and what plain PEFT reads."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM

from llama_stack_provider_moe.compute.moe.adapters import Adapted, add_lora, injected, train_whole
from llama_stack_provider_moe.compute.moe.derive import find_layout
from llama_stack_provider_moe.compute.moe.layout import ExpertLayout
from llama_stack_provider_moe.compute.moe.resolve_settings import apply_moe, resolve_moe
from llama_stack_provider_moe.compute.train.checkpoints import EXPERT_RANKS, merge, save
from llama_stack_provider_moe.errors import AdapterError
from llama_stack_provider_moe.spec import Adapter, Moe
from tests.compute.moe.test_adapters import IDS, MERGE_TOLERANCE, RELOAD_TOLERANCE, gap, logits, randomised
from tests.support import tiny_models

# peft 0.21 looks for a pattern's names among modules, and parameters are none; it applies them all the same.
pytestmark = pytest.mark.filterwarnings(r"ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning")

FAMILIES = ("granitemoe", "mixtral", "qwen3_next", "deepseek_v3", "llama4_text", "gpt_oss")
RULES = [{"experts": {"0": 3, "2": 1}}]
ROUTER_ALONE: dict[str, Any] = {"lora_attn_modules": [], "apply_lora_to_mlp": False}


def made(family: str, moe: dict[str, Any] | None = None, **adapter: Any) -> tuple[Adapted, ExpertLayout]:
    model = tiny_models.model(family)
    layout = find_layout(model)
    assert layout is not None
    resolved = resolve_moe(Moe(**(moe or {})), layout, full=False)
    apply_moe(model, layout, resolved)
    return add_lora(model, Adapter(**adapter), layout, resolved), layout


def trained(adapted: Adapted, steps: int = 3, kind: type = torch.optim.AdamW, **options: Any) -> PeftModel:
    """After some steps of an optimiser at the adapter's own rates; weight decay too must leave alone what is frozen."""
    options = {"lr": 1e-2, "weight_decay": 0.1, **options}
    optimizer = kind([p for p in adapted.model.parameters() if p.requires_grad], **options)
    adapted.rates.apply(optimizer)
    for step in range(steps):
        ids = (IDS + 7 * step) % 300 + 3
        adapted.model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return adapted.model


def delta(model: PeftModel, layout: ExpertLayout, layer: int, module: str) -> Tensor:
    """What the adapter adds to the experts' weight of a layer, as a merge would: (E, ., .)."""
    name = layout.path(layer, layout.experts_path)
    before = model.get_base_model().get_submodule(name)
    while True:  # PEFT nests a wrapper a parameter
        if getattr(before, "parameter_name", None) == module:
            found: Tensor = before.get_delta_weight("default").detach()
            return found
        before = before.base_layer


@pytest.mark.parametrize("family", FAMILIES)
def test_trunk_does_not_change_experts(family: str) -> None:
    adapted, layout = made(family, {"train_router": True}, plan="trunk", rank=2)
    assert "experts" not in adapted.report.by_group
    assert {"attention", "router"} <= set(adapted.report.by_group)
    assert ("shared_experts" in adapted.report.by_group) is bool(layout.shared_experts)
    assert "experts are frozen (adapter.plan trunk)" in adapted.report.notes
    assert not any(".experts." in name for name, p in adapted.model.named_parameters() if p.requires_grad)


@pytest.mark.parametrize("family", FAMILIES)
def test_all_experts_is_what_no_plan_means(family: str) -> None:
    named, unnamed = made(family, plan="all_experts", rank=2)[0].report, made(family, rank=2)[0].report
    assert named.targets == unnamed.targets
    assert named.by_group == unnamed.by_group


@pytest.mark.parametrize("family", FAMILIES)
def test_only_named_experts_change_and_each_has_its_rank(family: str) -> None:
    adapted, layout = made(family, plan="per_expert", rank=2, rules=RULES)
    before = {name: p.detach().clone() for name, p in adapted.model.named_parameters() if not p.requires_grad}
    model = trained(adapted)
    assert all(torch.equal(dict(model.named_parameters())[name], tensor) for name, tensor in before.items())
    for layer in layout.moe_layers:
        for module in (layout.gate_up, layout.down):
            ranks = [int(torch.linalg.matrix_rank(part, rtol=1e-4)) for part in delta(model, layout, layer, module)]
            assert ranks[1] == ranks[3] == 0
            assert ranks[0] <= 3
            assert ranks[2] <= 1
            assert delta(model, layout, layer, module)[[1, 3]].abs().max() == 0
    # With 24 tokens a layer's routing may leave an expert without any; not in all layers at once.
    moved = sum(delta(model, layout, layer, layout.down)[[0, 2]].abs().amax(dim=(1, 2)) for layer in layout.moe_layers)
    assert (moved > 0).any()
    merged = merge(model)
    plain = tiny_models.model(family)
    for layer, experts in layout.experts(merged).items():
        old = layout.experts(plain)[layer]
        for module in (layout.gate_up, layout.down):
            assert torch.equal(experts.get_parameter(module)[[1, 3]], old.get_parameter(module)[[1, 3]])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("plan", ["trunk", "all_experts", "per_expert", "router"])
def test_plain_peft_loads_every_plan(family: str, plan: str, tmp_path: Path) -> None:
    """Saved, reloaded, merged and reloaded again: the same logits; off: the base bitwise."""
    tiny_models.build(family, tmp_path / "base")
    extra: dict[str, Any] = {"plan": plan, "alphas": {"router": 6, "attention": 5}}
    if plan == "per_expert":
        extra["rules"] = RULES
    if plan == "router":
        extra = {**ROUTER_ALONE, "alphas": {"router": 40}}
    adapted, layout = made(family, {"train_router": True}, rank=2, router_rank=3, **extra)
    assert (set(adapted.report.by_group) == {"router"}) is (plan == "router")
    base_logits = logits(tiny_models.model(family))
    model = trained(adapted).eval()
    expected = logits(model)
    assert gap(expected, base_logits) > 1e-3
    with model.disable_adapter():
        assert gap(logits(model), base_logits) <= 1e-5
        off = logits(model)
        assert torch.equal(logits(model), off)
    shipped = apply_moe(model, layout, resolve_moe(Moe(), layout, full=False))
    save(model, tiny_models.tokenizer(), tmp_path / "adapter", shipped.restored(), step=3)
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    assert gap(logits(again.eval()), expected) <= max(RELOAD_TOLERANCE, 1e-5)  # by another implementation of experts
    merge(again).save_pretrained(tmp_path / "merged")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert gap(logits(plain), expected) <= MERGE_TOLERANCE
    with safe_open(tmp_path / "adapter" / "adapter_model.safetensors", "pt") as file:
        told = json.loads((file.metadata() or {}).get(EXPERT_RANKS, "{}"))
        assert set(told) <= set(file.keys())
    wanted = 4 * len(layout.moe_layers) if plan == "per_expert" else 0
    assert len(told) == wanted, "A and B of two weights a layer"
    assert all(ranks == [3, 0, 1, 0] for ranks in told.values())


def test_rules_by_layer_and_the_later_one_counts() -> None:
    adapted, layout = made(
        "mixtral", plan="per_expert", lora_attn_modules=[],
        rules=[{"layers": "0-1", "experts": {"0-2": 4}}, {"layers": "1", "experts": {"2": 8}}],
    )  # fmt: skip
    model = trained(adapted)
    first, second = (delta(model, layout, layer, "down_proj") for layer in (0, 1))
    assert first[3].abs().max() == second[3].abs().max() == 0
    a = {
        layer: next(p for name, p in model.named_parameters() if f"layers.{layer}.mlp.experts.lora_A" in name)
        for layer in (0, 1)
    }
    assert a[0].shape[0] == 4 * 4
    assert a[1].shape[0] == 4 * 8
    rows = a[1].view(4, 8, -1).abs().sum(-1) > 0
    assert rows.sum(-1).tolist() == [4, 4, 8, 0]


def test_a_layer_without_a_named_expert_gets_nothing() -> None:
    report = made("mixtral", plan="per_expert", rules=[{"layers": "1", "experts": {"0": 4}}])[0].report
    assert report.targets["mlp.experts.down_proj"] == 1
    assert any("1 of 8 experts get LoRA, in 1 of 2 layers" in note for note in report.notes)


def test_the_report_counts_the_numbers_that_train() -> None:
    """Of experts of rank 3, 0, 1, 0: four ranks of (H + 2I) and (I + H) numbers, in two layers."""
    report = made("granitemoe", plan="per_expert", rank=2, rules=RULES)[0].report
    assert report.by_group["experts"] == 2 * 4 * ((32 + 48) + (24 + 32))


@pytest.mark.parametrize("modules", [["gate_up_proj"], ["down_proj"]])
def test_projections_by_name(modules: list[str]) -> None:
    report = made("mixtral", expert_modules=modules, lora_attn_modules=[])[0].report
    assert set(report.targets) == {f"mlp.experts.{modules[0]}"}


def test_layers_by_range() -> None:
    adapted, _ = made("lfm2_moe", layers="0,2", lora_attn_modules=[], rank=2)
    layers = {
        name.split(".layers.")[1].split(".")[0] for name, p in adapted.model.named_parameters() if p.requires_grad
    }
    assert layers == {"0", "2"}
    assert set(adapted.report.by_group) == {"experts", "dense_mlp"}


@pytest.mark.parametrize("use_rslora", [False, True])
def test_alpha_and_rank_by_group(use_rslora: bool) -> None:
    adapted, _ = made(
        "qwen2_moe", {"train_router": True}, rank=4, router_rank=9, alpha=8, use_rslora=use_rslora,
        alphas={"experts": 2, "router": 3},
    )  # fmt: skip
    power = 0.5 if use_rslora else 1
    expected = {"experts": 2 / 4**power, "gate": 3 / 9**power, "self_attn": 8 / 4**power, "shared_expert": 8 / 4**power}
    seen = set()
    for name, module in adapted.model.named_modules():
        if isinstance(module, LoraLayer):
            part = next(part for part in expected if f".{part}." in f"{name}.")
            assert module.scaling["default"] == pytest.approx(expected[part]), name
            seen.add(part)
    assert seen == set(expected)


@pytest.mark.parametrize("backend", ["torch", "peft"])
@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("family", ["granitemoe", "llama4_text", "gpt_oss"])
def test_experts_change_by_the_requested_scale(family: str, use_rslora: bool, backend: str) -> None:
    """Folded in by hand, W_e + s B_e A_e with s = alpha / r, or alpha / sqrt(r), gives the same logits.

    From the factors alone: what PEFT says of its scale, and what it makes of the factors, is not asked.
    """
    rank, alpha = 4, 6.0
    adapted, _ = made(
        family, {"experts_backend": backend}, lora_attn_modules=[], rank=rank, alpha=alpha, use_rslora=use_rslora
    )
    plain, scale = tiny_models.model(family), alpha / (math.sqrt(rank) if use_rslora else rank)
    base = logits(plain)
    randomised(adapted.model)
    weights = dict(plain.named_parameters())
    folded = 0
    with torch.no_grad():
        for name, layer in injected(adapted.model).items():
            if ".experts." not in name:  # Llama 4's shared and dense layers are modules
                layer.lora_B["default"].weight.zero_()
                continue
            a, b = (part["default"].weight for part in (layer.lora_A, layer.lora_B))
            for expert in range(4):
                update = scale * b[:, expert::4] @ a[expert * rank : (expert + 1) * rank]
                weight = weights[name][expert]
                weight += update if update.shape == weight.shape else update.T  # gpt-oss has (in, out); none is square
                folded += 1
    assert folded >= 8
    assert gap(logits(plain), base) > 0.05
    assert gap(logits(adapted.model), logits(plain)) < MERGE_TOLERANCE
    assert gap(logits(merge(adapted.model)), logits(plain)) < MERGE_TOLERANCE


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD])
def test_groups_and_experts_learn_at_their_own_rates(kind: type) -> None:
    """A first step at rate m is m times the step at rate 1, whatever the optimiser makes of gradients."""
    rules = [{"experts": {"0-1": 2}}, {"experts": {"2-3": 2}, "lr_multiplier": 4.0}]
    torch.manual_seed(0)
    slow, _ = made("mixtral", plan="per_expert", rank=2, rules=[*rules[:1], {"experts": {"2-3": 2}}])
    torch.manual_seed(0)
    fast, _ = made("mixtral", plan="per_expert", rank=2, rules=rules, lr_multipliers={"attention": 3.0, "experts": 0.5})
    steps = []
    for adapted in (slow, fast):
        before = {name: p.detach().clone() for name, p in adapted.model.named_parameters() if p.requires_grad}
        trained(adapted, steps=1, kind=kind)
        after = dict(adapted.model.named_parameters())
        steps.append({name: after[name].detach() - old for name, old in before.items()})
    assert any(step.abs().max() > 0 for name, step in steps[0].items() if "experts" in name and "lora_B" in name)
    for name, step in steps[0].items():
        factor: Tensor | float = 3.0
        if "experts" in name:
            by_expert = torch.tensor([0.5, 0.5, 2.0, 2.0])
            factor = by_expert.repeat_interleave(2).unsqueeze(1) if "lora_A" in name else by_expert.repeat(2)
        torch.testing.assert_close(steps[1][name], step * factor, rtol=1e-3, atol=1e-7)


def test_the_schedule_keeps_the_ratios_and_logs_the_plain_rate() -> None:
    """The first group, whose rate is logged, is that of multiplier 1, be the others faster or slower."""
    adapted, _ = made("mixtral", {"train_router": True}, lr_multipliers={"attention": 2.0, "experts": 0.5})
    optimizer = torch.optim.AdamW([p for p in adapted.model.parameters() if p.requires_grad], lr=1e-2)
    adapted.rates.apply(optimizer)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    optimizer.step()
    scheduler.step()
    assert scheduler.get_last_lr() == pytest.approx([5e-3, 2.5e-3, 1e-2])
    counted = sum(len(group["params"]) for group in optimizer.param_groups)
    assert counted == sum(p.requires_grad for p in adapted.model.parameters())


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("mixtral", {"plan": "per_expert", "rules": [{"experts": {"4": 2}}]},
     r"rules\.0\.experts: '4' names expert 4; expected 0 to 3"),
    ("mixtral", {"plan": "per_expert", "rules": [{"layers": "0-2", "experts": {"0": 2}}]},
     r"rules\.0\.layers: '0-2' names layer 2, which has no experts; expected layers among 0, 1"),
    ("deepseek_v3", {"plan": "per_expert", "rules": [{"layers": "0", "experts": {"0": 2}}]},
     r"rules\.0\.layers: '0' names layer 0, which has no experts; expected layers among 1"),
    ("mixtral", {"plan": "per_expert", "layers": "0", "rules": RULES},
     r"adapter\.layers: '0' excludes layer 1, whose experts adapter\.rules name"),
    ("mixtral", {"layers": "2"}, r"adapter\.layers: '2' names layer 2; this model has 0 to 1"),
    ("deepseek_v3", {"layers": "0"}, r"adapter\.layers: '0' leaves nothing to adapt of experts, shared_experts"),
    ("mixtral", {"router_rank": 3}, r"router_rank: 3 would have no effect: .*moe\.train_router true"),
    ("mixtral", {"alphas": {"router": 3}}, r"alphas: router would have no effect: .* only has attention, experts"),
    ("mixtral", {"lr_multipliers": {"shared_experts": 3}}, r"lr_multipliers: shared_experts would have no effect"),
    ("mixtral", ROUTER_ALONE, "without a target trains nothing; .* or moe.train_router true"),
    ("mixtral", {"plan": "trunk", "expert_modules": ["down_proj"]}, r"expert_modules: would have no effect"),
]  # fmt: skip


@pytest.mark.parametrize(("family", "adapter", "expected"), REFUSED)
def test_settings_without_effect_or_target_are_refused(family: str, adapter: dict[str, Any], expected: str) -> None:
    with pytest.raises(AdapterError, match=expected):
        made(family, **adapter)


def test_routers_alone_need_a_gradient() -> None:
    """With top-1 Mixtral renormalises the weight of the only expert to 1; Llama 4 keeps the router's sigmoid."""
    model = tiny_models.model("mixtral", num_experts_per_tok=1)
    layout = find_layout(model)
    alone = Moe(train_router_only=True)
    with pytest.raises(AdapterError, match="no gradient for them: this model sends each token to one expert"):
        train_whole(model, layout, resolve_moe(alone, layout, full=True))
    with pytest.raises(AdapterError, match="no gradient for them"):
        add_lora(model, Adapter(**ROUTER_ALONE), layout, resolve_moe(Moe(train_router=True), layout, full=False))
    model.requires_grad_(True)
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert layout is not None
    gradients = [router.weight.grad.abs().max() for router in layout.routers(model).values()]  # type: ignore[union-attr]
    assert max(gradients) < 1e-6, "the refusal tells the truth"
    report = made("llama4_text", {"train_router": True}, **ROUTER_ALONE)[0].report
    assert (set(report.by_group), report.notes[0]) == (
        {"router"}, "only the routers have LoRA; every other weight stays as it is")  # fmt: skip


@pytest.mark.parametrize("plan", ["all_experts", "per_expert"])
def test_plans_of_experts_are_refused_on_a_dense_model(plan: str) -> None:
    model = tiny_models.model("llama")
    adapter = Adapter(plan=plan, **({"rules": RULES} if plan == "per_expert" else {}))
    with pytest.raises(AdapterError, match=rf"plan: '{plan}' is not valid .* it has no experts"):
        add_lora(model, adapter, None, resolve_moe(Moe(), None, full=False))


INVALID: list[tuple[dict[str, Any], str]] = [
    ({"plan": "per_expert"}, "needs at least one"),
    ({"rules": RULES}, "are used by plan 'per_expert' only"),
    ({"plan": "all_experts", "rules": RULES}, "are used by plan 'per_expert' only"),
    ({"plan": "all_experts", "apply_lora_to_mlp": False}, "expected apply_lora_to_mlp true"),
    ({"plan": "per_expert", "rules": [{"experts": {}}]}, "at least 1 item"),
    ({"plan": "per_expert", "rules": [{"experts": {"a": 1}}]}, "'a' is not valid; expected experts such as"),
    ({"plan": "per_expert", "rules": [{"experts": {"0": 0}}]}, "experts.0\n  Input should be greater than or equal"),
    ({"plan": "per_expert", "rules": [{"experts": {"0-2": 1, "2": 2}}]}, "expert 2 is named twice"),
    ({"plan": "per_expert", "rules": [{"experts": {"0": 1}, "layers": "1-"}]}, "String should match pattern"),
    ({"layers": "5-2"}, "range '5-2' ends before it begins"),
    ({"plan": "per_expert", "rules": [{"experts": {"7-0": 1}}]}, "range '7-0' ends before it begins"),
    ({"plan": "per_expert", "rules": [{"experts": {"0," * 64 + "0": 1}}]}, "is not valid; expected experts such as"),
    ({"alphas": {"router": 0}}, "alphas.router\n  Input should be greater than 0"),
    ({"lr_multipliers": {"head": 1}}, "Input should be 'attention'"),
    ({"expert_modules": []}, "at least 1 item"),
    ({"quantize_bits": 8}, "is used only with quantize_base true"),
    ({"quantize_scales": True}, "quantize_scales: true is used only with quantize_base true and quantize_bits 4"),
    ({"quantize_base": True, "quantize_bits": 8, "quantize_scales": True}, "quantize_scales: true is used only with"),
    ({"plan": "all_experts", "use_dora": True}, "use_dora: true is not valid with plan 'all_experts'"),
    ({"quantize_base": True, "use_dora": True, "apply_lora_to_mlp": False}, "not valid with quantize_base true"),
]  # fmt: skip


@pytest.mark.parametrize(("adapter", "expected"), INVALID)
def test_contradictions_are_refused_in_the_spec(adapter: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        Adapter(**adapter)
