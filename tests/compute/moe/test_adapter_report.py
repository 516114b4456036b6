"""What `add_lora` checks and reports, and what rules for experts do not change."""

import re
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from torch import nn

from llama_stack_provider_moe.compute.moe.adapters import add_lora, expert_ranks, injected, put_by_peft, train_whole
from llama_stack_provider_moe.compute.moe.derive import find_layout
from llama_stack_provider_moe.compute.moe.lora_ranks import settings_by_target
from llama_stack_provider_moe.compute.moe.resolve_settings import resolve_moe
from llama_stack_provider_moe.compute.moe.targets import find_targets
from llama_stack_provider_moe.errors import AdapterError
from llama_stack_provider_moe.spec import Adapter, Moe
from tests.compute.moe.test_adapters import resolved_for
from tests.compute.moe.test_plans import made
from tests.support import tiny_models

RANK, ALPHA = 4, 8.0
Q_PROJ = "model.layers.0.self_attn.q_proj"


def with_rank(model: nn.Module, config: LoraConfig) -> PeftModel:
    """Twice the rank at the scale that was asked for."""
    config.r, config.lora_alpha = 2 * RANK, 2 * ALPHA
    return put_by_peft(model, config)


def with_alpha(model: nn.Module, config: LoraConfig) -> PeftModel:
    config.lora_alpha = 2 * ALPHA
    return put_by_peft(model, config)


def on_more(model: nn.Module, config: LoraConfig) -> PeftModel:
    config.target_modules = {*config.target_modules, "lm_head"}
    return put_by_peft(model, config)


def on_less(model: nn.Module, config: LoraConfig) -> PeftModel:
    config.target_modules = {name for name in config.target_modules if not name.endswith("layers.0.self_attn.q_proj")}
    return put_by_peft(model, config)


def frozen(model: nn.Module, config: LoraConfig) -> PeftModel:
    wrapped = put_by_peft(model, config)
    injected(wrapped)[Q_PROJ].lora_A.requires_grad_(False)
    return wrapped


def beside(model: nn.Module, config: LoraConfig) -> PeftModel:
    wrapped = put_by_peft(model, config)
    wrapped.get_base_model().get_submodule("model.norm").requires_grad_(True)
    return wrapped


def coarse(model: nn.Module, config: LoraConfig) -> PeftModel:
    wrapped = put_by_peft(model, config)
    injected(wrapped)[Q_PROJ].lora_B.to(torch.bfloat16)
    return wrapped


@pytest.mark.parametrize(
    ("put", "told"),
    [
        (with_rank, r"LoRA of model\.layers\.\S+ has rank 8 and scale 2, expected 4 and 2"),
        (with_alpha, r"LoRA of model\.layers\.\S+ has rank 4 and scale 4, expected 4 and 2"),
        (on_more, r"these got LoRA and are not targets: lm_head$"),
        (on_less, rf"these targets got no LoRA: {Q_PROJ}$"),
        (frozen, rf"LoRA of these targets would not train: {Q_PROJ}$"),
        (beside, r"these would train beside LoRA: base_model\.model\.model\.norm\.weight$"),
        (coarse, rf"LoRA of these targets is not fp32: {Q_PROJ}$"),
    ],
)
def test_injected_lora_is_compared_with_the_request(
    put: Callable[[nn.Module, LoraConfig], PeftModel], told: str
) -> None:
    model, layout, resolved = resolved_for(tiny_models.model("mixtral"))
    with pytest.raises(AdapterError, match=told):
        add_lora(model, Adapter(rank=RANK, alpha=ALPHA), layout, resolved, put)


def test_adding_lora_of_many_ranks_gives_no_warning() -> None:
    """PEFT's, of patterns that name parameters, is known to be wrong."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*_pattern")
        made("mixtral", {"train_router": True}, router_rank=9, alphas={"experts": 2})


def test_a_report_in_words() -> None:
    adapted, _ = made(
        "qwen2_moe", {"train_router": True}, plan="all_experts", rank=4, router_rank=9, alpha=8, use_rslora=True,
        alphas={"experts": 2.5, "router": 3}, dropout=0.25, layers="1",
    )  # fmt: skip
    report = adapted.report
    assert report.method == "LoRA r=4 to 9, alpha=2.5 to 8, scaled by its root (rsLoRA), plan all_experts"
    assert made("qwen2_moe", rank=4, alpha=8)[0].report.method == "LoRA r=4, alpha=8"
    assert list(report.by_group) == ["attention", "experts", "shared_experts", "router"]
    assert list(report.targets)[:4] == [f"self_attn.{one}_proj" for one in "qkvo"]
    first, second, *notes = report.text().splitlines()
    assert first.startswith(f"{report.method} on self_attn.q_proj x1, ")
    share = f"{report.trainable_parameters / report.total_parameters:.2%}"
    assert second.startswith(
        f"{report.trainable_parameters:,} of {report.total_parameters:,} parameters train ({share}): attention "
    )
    assert notes == list(report.notes)
    assert report.as_json()["by_group"] == report.by_group


def test_dropout_is_added_where_possible_and_the_rest_is_reported() -> None:
    adapted, _ = made("mixtral", {"train_router": True}, dropout=0.25)
    told = "no dropout on the LoRA of router: PEFT has none on parameters"
    assert [note for note in adapted.report.notes if "dropout" in note] == [told]
    assert any("beside their weights" in note for note in adapted.report.notes)
    for name, layer in injected(adapted.model).items():
        of_layer = layer.lora_dropout["default"]
        assert (of_layer.p if isinstance(of_layer, nn.Dropout) else 0) == (0.25 if "self_attn" in name else 0), name
    for dropout, router in ((0.0, True), (0.25, False)):
        notes = made("mixtral", {"train_router": router}, dropout=dropout)[0].report.notes
        assert not any("dropout" in note for note in notes)


@pytest.mark.parametrize(("family", "shared"), [("deepseek_v3", "shared_experts"), ("granitemoe", None)])
def test_full_training_counts_by_group(family: str, shared: str | None) -> None:
    model = tiny_models.model(family).requires_grad_(False)
    layout = find_layout(model)
    report = train_whole(model, layout, resolve_moe(Moe(train_router=True), layout, full=True))
    expected: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        if "correction_bias" in name:
            continue
        parts = {
            r"^(?!.*\.layers\.)": "embeddings, head, norms", r"\.experts\.": "experts", r"\.(gate|router)\.": "router",
            rf"\.{shared}\.": "shared experts", "": "other weights of the layers",
        }  # fmt: skip
        expected[next(part for pattern, part in parts.items() if re.search(pattern, name))] += parameter.numel()
    assert report.by_group == dict(expected)
    assert ("shared experts" in report.by_group) is (shared is not None)
    assert (report.targets, report.notes) == ({"all weights": 1}, ())
    dense = tiny_models.model("llama").requires_grad_(False)
    dense_report = train_whole(dense, None, resolve_moe(Moe(), None, full=True))
    assert dense_report.notes == ()
    assert dense_report.by_group.keys() == {"embeddings, head, norms", "layers"}
    assert dense_report.trainable_parameters == sum(p.numel() for p in dense.parameters() if p.requires_grad)


def test_experts_of_one_rank_and_rate_are_one_lora() -> None:
    """Nothing is padded with zeros, so nothing is saved of it, and no step is stretched."""
    alike, _ = made("mixtral", plan="per_expert", rules=[{"experts": {"0-3": 4}}], lr_multipliers={"attention": 3.0})
    assert expert_ranks(alike.model) == {}
    assert alike.rates.within == {}
    assert set(alike.rates.by_parameter.values()) == {3.0}, "who has the plain rate is not named"
    other, _ = made("mixtral", plan="per_expert", rules=[{"experts": {"0-3": 4}, "lr_multiplier": 2.0}])
    assert len(other.rates.within) == 2 * 2 * 2
    uneven, _ = made("mixtral", plan="per_expert", rules=[{"experts": {"0-2": 4}}])
    assert uneven.rates.within == {}
    names = [name.replace(".default", "") for name, _ in uneven.model.named_parameters() if "lora_" in name]
    assert expert_ranks(uneven.model) == {name: [4, 4, 4, 0] for name in names if ".experts." in name}


def test_the_router_of_a_layer_without_a_named_expert_is_adapted() -> None:
    adapted, _ = made(
        "mixtral", {"train_router": True}, plan="per_expert", rules=[{"layers": "1", "experts": {"0": 4}}]
    )
    assert adapted.report.targets["mlp.gate.weight"] == 2


def test_layers_and_rules_that_agree() -> None:
    adapted, _ = made("mixtral", plan="per_expert", layers="1", rules=[{"layers": "1", "experts": {"0": 4}}])
    assert set(adapted.report.targets.values()) == {1}


RULES_FROM: dict[str, Any] = {"analysis": "of mine", "moe_layers": [0, 1], "num_experts": 4}


def test_rules_of_an_analysis_are_reported() -> None:
    rules = [{"layers": "1", "experts": {"0-1": 4, "3": 2}}]
    notes = made("mixtral", plan="per_expert", rules=rules, rules_from=RULES_FROM)[0].report.notes
    assert "3 of 8 experts get LoRA, in 1 of 2 layers; the others do not change" in notes
    assert "experts by of mine: layer 1: 0-1, 3" in notes


@pytest.mark.parametrize(("changed", "of"), [({"num_experts": 8}, "8 experts in layers 0-1"),
                                             ({"moe_layers": [1, 2, 4]}, "4 experts in layers 1-2, 4")])  # fmt: skip
def test_rules_of_another_models_analysis_are_refused(changed: dict[str, Any], of: str) -> None:
    told = f"rules_from: 'of mine' is an analysis of another model, of {of}; this one has 4 in layers 0-1$"
    with pytest.raises(AdapterError, match=told):
        made("mixtral", plan="per_expert", rules=[{"experts": {"0": 4}}], rules_from=RULES_FROM | changed)


@pytest.mark.parametrize(("layers", "told"), [(8, "0, 1, 2, 3, 4, 5, 6, 7"), (9, "0, 1, 2, 3, 4, 5, 6, 7, ...")])
def test_of_many_layers_the_first_are_named(layers: int, told: str) -> None:
    model = tiny_models.model("mixtral", num_hidden_layers=layers)
    layout = find_layout(model)
    adapter = Adapter.model_validate({"plan": "per_expert", "rules": [{"layers": "20", "experts": {"0": 1}}]})
    with pytest.raises(AdapterError, match=f"names layer 20, which has no experts; expected layers among {told}$"):
        settings_by_target(adapter, find_targets(model, adapter, layout, train_router=False), layout)
