"""LoRA on every family reaches its targets, trains, can be switched off, saved, loaded in plain PEFT and merged."""

import re
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from llama_stack_provider_moe.compute.moe.adapters import AdapterReport, add_lora, train_whole
from llama_stack_provider_moe.compute.moe.derive import find_layout
from llama_stack_provider_moe.compute.moe.layout import ExpertLayout
from llama_stack_provider_moe.compute.moe.resolve_settings import ResolvedMoe, apply_moe, resolve_moe
from llama_stack_provider_moe.compute.train.checkpoints import merge, save
from llama_stack_provider_moe.errors import AdapterError
from llama_stack_provider_moe.spec import Adapter, Moe
from tests.support import tiny_models

IDS = torch.randint(3, 300, (2, 12), generator=torch.Generator().manual_seed(5))
RANK = 2
EVERYTHING = Adapter(rank=RANK, alpha=4, apply_lora_to_output=True)
# Measured over all families, with logits of about 2: at most 1.2e-6 after reloading, where PEFT folds into the weights
# what ours computes beside them, and 3.2e-6 after merging.
RELOAD_TOLERANCE, MERGE_TOLERANCE = 5e-6, 1e-5

QKVO = "self_attn.{q,k,v,o}_proj"
MIXED = {"linear_attn.out_proj": 1, QKVO: 1}
SHARED = "{gate,up,down}_proj"


def fused(block: str, router: str, layers: int) -> dict[str, int]:
    return {f"{block}.experts.{{gate_up,down}}_proj": layers, f"{block}.{router}.weight": layers}


# Family -> what gets LoRA, below a layer, and in how many layers: by hand, from the models' modules.
TARGETS: dict[str, dict[str, int]] = {
    "granitemoe": {QKVO: 2, **fused("block_sparse_moe", "router", 2)},
    "granitemoeshared": {QKVO: 2, **fused("block_sparse_moe", "router", 2), "shared_mlp.{input,output}_linear": 2},
    "granitemoehybrid": {QKVO: 1, **fused("block_sparse_moe", "router", 2), "shared_mlp.{input,output}_linear": 2},
    "mixtral": {QKVO: 2, **fused("mlp", "gate", 2)},
    "minimax_m2": {QKVO: 2, **fused("mlp", "gate", 2)},
    "phimoe": {QKVO: 2, **fused("mlp", "router", 2)},
    "qwen2_moe": {QKVO: 2, **fused("mlp", "gate", 2), f"mlp.shared_expert.{SHARED}": 2},
    "qwen3_next": {**MIXED, "linear_attn.in_proj_qkvz": 1, **fused("mlp", "gate", 2),
                   f"mlp.shared_expert.{SHARED}.weight": 2},
    "qwen3_5_moe": {**MIXED, "linear_attn.in_proj_qkv": 1, **fused("mlp", "gate", 2),
                    f"mlp.shared_expert.{SHARED}": 2},
    "qwen3_moe": {QKVO: 2, **fused("mlp", "gate", 2)},
    "olmoe": {QKVO: 2, **fused("mlp", "gate", 2)},
    "ernie4_5_moe": {QKVO: 2, **fused("mlp", "gate", 1), f"mlp.shared_experts.{SHARED}.weight": 1,
                     f"mlp.{SHARED}.weight": 1},
    "glm4_moe": {QKVO: 2, **fused("mlp", "gate", 1), f"mlp.shared_experts.{SHARED}.weight": 1,
                 f"mlp.{SHARED}.weight": 1},
    "deepseek_v3": {"self_attn.{q_a,q_b,kv_b,o}_proj": 2, "self_attn.kv_a_proj_with_mqa": 2,
                    **fused("mlp", "gate", 1), f"mlp.shared_experts.{SHARED}.weight": 1, f"mlp.{SHARED}.weight": 1},
    "lfm2_moe": {"self_attn.{q,k,v,out}_proj": 1, **fused("feed_forward", "gate", 2), "feed_forward.w{1,2,3}": 1},
    "cohere2_moe": {QKVO: 2, **fused("mlp", "gate", 1), f"mlp.shared_experts.{SHARED}.weight": 1,
                    f"mlp.{SHARED}.weight": 1},
    "llama4_text": {QKVO: 2, **fused("feed_forward", "router", 1), f"feed_forward.shared_expert.{SHARED}": 1,
                    f"feed_forward.{SHARED}": 1},
    "gpt_oss": {QKVO: 2, **fused("mlp", "router", 2)},
    "llama": {QKVO: 2, f"mlp.{SHARED}": 2},
    "qwen3": {QKVO: 2, f"mlp.{SHARED}": 2},
}  # fmt: skip


def spelled_out(patterns: dict[str, int]) -> dict[str, int]:
    """`{"a.{q,k}": 2}` -> `{"a.q": 2, "a.k": 2}`."""
    found: dict[str, int] = {}
    for pattern, count in patterns.items():
        head, brace, rest = pattern.partition("{")
        choices, _, tail = rest.partition("}")
        found |= {head + choice + tail: count for choice in choices.split(",")} if brace else {pattern: count}
    return found


def resolved_for(model: PreTrainedModel, **moe: Any) -> tuple[PreTrainedModel, ExpertLayout | None, ResolvedMoe]:
    layout = find_layout(model)
    return model, layout, resolve_moe(Moe(**moe), layout, full=False)


def logits(model: Any, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(ids).logits
    return found


def gap(one: Tensor, other: Tensor) -> float:
    return (one - other).abs().max().item()


def randomised(model: PeftModel) -> None:
    """LoRA as if trained: B begins at zero, and would hide both its own effect and A's gradient."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1, generator=generator)


@dataclass
class Trained:
    """One family's model with LoRA on everything, before and after a step of AdamW."""

    family: str
    folder: Path
    model: PeftModel
    layout: ExpertLayout | None
    report: AdapterReport
    base_logits: Tensor
    frozen_before: dict[str, Tensor] = field(default_factory=dict)
    before: dict[str, Tensor] = field(default_factory=dict)
    gradients: dict[str, Tensor] = field(default_factory=dict)
    received: dict[int, Tensor] = field(default_factory=dict)


@pytest.fixture(scope="module", params=tiny_models.FAMILIES)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    family = request.param
    folder = tmp_path_factory.mktemp(family)
    tiny_models.model(family).save_pretrained(folder / "base")
    base, layout, resolved = resolved_for(
        tiny_models.model(family), **({} if family in tiny_models.DENSE else {"train_router": True})
    )
    shipped = apply_moe(base, layout, resolved)
    base_logits = logits(base)
    adapted = add_lora(base, EVERYTHING, layout, resolved)
    model, report = adapted.model, adapted.report
    assert gap(logits(model), base_logits) == 0  # B is zero
    randomised(model)
    outcome = Trained(family, folder, model, layout, report, base_logits)
    for name, parameter in model.named_parameters():
        kept = outcome.before if parameter.requires_grad else outcome.frozen_before
        kept[name] = parameter.detach().clone()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    # One token: with top-k 2 of 4, experts are left without any.
    handles = [] if layout is None else [
        router.register_forward_hook(
            lambda _, inputs, outputs, layer=layer: outcome.received.update({layer: chosen(layout, outputs)})
        )
        for layer, router in layout.routers(model).items()
    ]  # fmt: skip
    model(input_ids=IDS[:1, :1]).logits.logsumexp(dim=-1).sum().backward()
    for handle in handles:
        handle.remove()
    outcome.gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    optimizer.zero_grad()
    model(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    save(model, tiny_models.tokenizer(), folder / "adapter", shipped.restored(), step=1)
    return outcome


def chosen(layout: ExpertLayout, outputs: tuple[Tensor, ...]) -> Tensor:
    """Tokens each expert got, (E,)."""
    picked = outputs[layout.chosen_at] if layout.chosen_at < len(outputs) else outputs[layout.logits_at].argmax(-1)
    return picked.flatten().bincount(minlength=layout.num_experts)


def test_every_requested_target_got_lora_in_every_layer(trained: Trained) -> None:
    expected = {**spelled_out(TARGETS[trained.family]), "lm_head": 1}
    assert trained.report.targets == expected
    # The same, read off the names of the saved weights; two on one module (`base_layer`) are two parameters of it.
    saved = Counter(
        re.sub(r"\.base_layer|.*\.layers\.\d+\.|^base_model\.model\.", "", name.partition(".lora_A.")[0])
        for name in trained.before
        if ".lora_A." in name
    )
    without_weight: Counter[str] = Counter()
    for name, count in expected.items():
        module = re.sub(r"\.(weight|gate_up_proj|down_proj)$", "", name) if is_parameter(name) else name
        without_weight[module] += count
    assert saved == without_weight


def is_parameter(target: str) -> bool:
    return target.endswith(".weight") or ".experts." in target


def test_report_counts_what_trains(trained: Trained) -> None:
    report = trained.report
    assert report.trainable_parameters == sum(tensor.numel() for tensor in trained.before.values())
    assert report.trainable_parameters == sum(report.by_group.values())
    assert report.total_parameters == report.trainable_parameters + sum(
        t.numel() for t in trained.frozen_before.values()
    )
    assert all("lora_" in name for name in trained.before)
    assert not any("lora_" in name for name in trained.frozen_before)
    assert f"{report.trainable_parameters:,} of {report.total_parameters:,} parameters train" in report.text()


def test_every_part_gets_a_gradient_and_experts_only_where_tokens_went(trained: Trained) -> None:
    assert set(trained.gradients) == set(trained.before)
    for name, gradient in trained.gradients.items():
        if ".experts." not in name:
            continue  # the whole batch's step, below, moves them
        assert trained.layout is not None
        received = trained.received[int(re.findall(r"layers\.(\d+)\.", name)[0])]
        experts = trained.layout.num_experts
        # A: rows e*r + k; B: columns k*E + e.
        by_expert = gradient if "lora_A" in name else gradient.reshape(-1, RANK, experts).permute(2, 0, 1)
        slices = by_expert.reshape(experts, -1)
        assert ((slices != 0).any(dim=1) == (received > 0)).all(), name
        assert 0 < (received > 0).sum() < experts


def test_a_step_moves_all_of_lora_and_nothing_else(trained: Trained) -> None:
    now = dict(trained.model.named_parameters())
    assert all(torch.equal(now[name], tensor) for name, tensor in trained.frozen_before.items())
    # Not by weight decay alone, which moves a weight by lr * 0.1 of itself; AdamW's first step is lr wherever there
    # is a gradient.
    still = [n for n, t in trained.before.items() if gap(now[n], t * (1 - 1e-3)) < 5e-3]
    assert still == []


def test_the_adapter_off_is_the_base_bitwise(trained: Trained) -> None:
    assert gap(logits(trained.model), trained.base_logits) > 0.01
    with trained.model.disable_adapter():
        assert torch.equal(logits(trained.model), trained.base_logits)


def test_plain_peft_loads_what_was_saved_and_merges_it(trained: Trained) -> None:
    """The merged model equals the adapted one in memory, and again when it is loaded without PEFT."""
    base = AutoModelForCausalLM.from_pretrained(trained.folder / "base").eval()
    expected = logits(trained.model)
    again = PeftModel.from_pretrained(base, trained.folder / "adapter").eval()
    assert gap(logits(again), expected) <= RELOAD_TOLERANCE
    saved = {path.name for path in (trained.folder / "adapter").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= saved
    merged = merge(again)
    assert gap(logits(merged), expected) <= MERGE_TOLERANCE
    merged.save_pretrained(trained.folder / "merged")
    plain = AutoModelForCausalLM.from_pretrained(trained.folder / "merged").eval()
    assert type(plain) is type(base)
    assert gap(logits(plain), expected) <= MERGE_TOLERANCE


def test_parameters_of_granite_by_formula() -> None:
    model, layout, resolved = resolved_for(tiny_models.model("granitemoe"), train_router=True)
    report = add_lora(model, Adapter(rank=3, apply_lora_to_output=True), layout, resolved).report
    hidden, key_value, inner, experts, vocabulary, rank, layers = 32, 16, 24, 4, 384, 3, 2
    assert report.by_group == {
        "attention": layers * rank * (2 * (hidden + hidden) + 2 * (hidden + key_value)),
        "experts": layers * experts * rank * ((hidden + 2 * inner) + (inner + hidden)),
        "router": layers * rank * (hidden + experts),
        "output_head": rank * (hidden + vocabulary),
    }
    assert "LoRA r=3, alpha=32" in report.text()


@pytest.mark.parametrize(
    ("family", "adapter", "groups"),
    [
        ("mixtral", Adapter(apply_lora_to_mlp=False), {"attention"}),
        ("mixtral", Adapter(lora_attn_modules=[]), {"experts"}),
        ("deepseek_v3", Adapter(lora_attn_modules=[]), {"experts", "shared_experts", "dense_mlp"}),
        ("llama4_text", Adapter(lora_attn_modules=["q_proj"], apply_lora_to_mlp=False), {"attention"}),
    ],
)
def test_nothing_is_adapted_beyond_what_was_asked(family: str, adapter: Adapter, groups: set[str]) -> None:
    model, layout, resolved = resolved_for(tiny_models.model(family))
    report = add_lora(model, adapter, layout, resolved).report
    assert set(report.by_group) == groups
    if adapter.lora_attn_modules == ["q_proj"]:
        assert set(report.targets) == {"self_attn.q_proj"}


REFUSED: list[tuple[str, dict[str, Any], Adapter, dict[str, Any], str]] = [
    ("granitemoehybrid", {"layer_types": ["linear_attention"] * 2}, Adapter(lora_attn_modules=["q_proj"]), {},
     r"lora_attn_modules: this granitemoehybrid model has no q_proj"),
    ("deepseek_v3", {}, Adapter(lora_attn_modules=["q_proj", "k_proj"]), {},
     r"kv_a_proj_with_mqa combines k_proj, v_proj; expected all of them or none"),
    ("qwen3_next", {}, Adapter(lora_attn_modules=["v_proj"]), {}, "in_proj_qkvz combines k_proj, q_proj, v_proj"),
    ("mixtral", {"tie_word_embeddings": True}, Adapter(apply_lora_to_output=True), {},
     r"apply_lora_to_output: true is not valid .*tie_word_embeddings"),
    ("mixtral", {}, Adapter(use_dora=True), {}, r"adapter\.use_dora: true is not valid on parameters \(experts\)"),
    ("mixtral", {}, Adapter(dropout=0.1), {"experts_backend": "peft"},
     r"adapter\.dropout: 0\.1 is not valid on experts that PEFT adapts"),
    ("mixtral", {}, Adapter(use_dora=True, apply_lora_to_mlp=False), {"train_router": True},
     r"use_dora: true is not valid on parameters \(router\)"),
]  # fmt: skip


@pytest.mark.parametrize(("family", "changes", "adapter", "moe", "expected"), REFUSED)
def test_impossible_targets_are_refused_by_name(
    family: str, changes: dict[str, Any], adapter: Adapter, moe: dict[str, Any], expected: str
) -> None:
    model, layout, resolved = resolved_for(tiny_models.model(family, **changes), **moe)
    with pytest.raises(AdapterError, match=expected):
        add_lora(model, adapter, layout, resolved)
    assert not any("lora" in name for name, _ in model.named_modules())


def test_a_target_that_peft_skips_is_an_error() -> None:
    """PEFT passes in silence over a name that matches nothing while another one matches; we do not."""
    model, layout, resolved = resolved_for(tiny_models.model("mixtral"))
    assert layout is not None
    expected = r"these targets got no LoRA: model\.layers\.0\.mlp\.experts\.gone, model\.layers\.1\.mlp\.experts\.gone$"
    with pytest.raises(AdapterError, match=expected):
        add_lora(model, Adapter(), replace(layout, down="gone"), resolved)


@pytest.mark.parametrize("use_dora", [False, True])
def test_attention_alone_takes_dropout_and_dora(use_dora: bool) -> None:
    model, layout, resolved = resolved_for(tiny_models.model("mixtral"))
    adapter = Adapter(rank=RANK, apply_lora_to_mlp=False, dropout=0.5, use_dora=use_dora)
    adapted = add_lora(model, adapter, layout, resolved)
    peft_model, report = adapted.model, adapted.report
    randomised(peft_model.eval())
    assert report.method.startswith("DoRA" if use_dora else "LoRA")
    assert any("magnitude" in name for name, p in peft_model.named_parameters() if p.requires_grad) is use_dora
    assert torch.equal(logits(peft_model), logits(peft_model))
    peft_model.train()
    assert gap(logits(peft_model), logits(peft_model)) > 1e-3


@pytest.mark.parametrize("train_router", [False, True])
@pytest.mark.parametrize("family", ["granitemoe", "qwen3_moe", "llama4_text", "gpt_oss"])
def test_lora_on_the_router_is_there_only_if_asked(family: str, train_router: bool) -> None:
    model, layout, resolved = resolved_for(tiny_models.model(family), train_router=train_router)
    assert layout is not None
    adapted = add_lora(model, Adapter(rank=RANK), layout, resolved)
    peft_model, report = adapted.model, adapted.report
    assert ("router" in report.by_group) is train_router
    before = {layer: router.get_parameter("weight").clone() for layer, router in layout.routers(model).items()}
    randomised(peft_model)
    merged = merge(peft_model)
    for layer, router in layout.routers(merged).items():
        assert torch.equal(router.get_parameter("weight"), before[layer]) is not train_router


def test_lora_weights_are_fp32_on_a_bf16_model() -> None:
    model, layout, resolved = resolved_for(tiny_models.model("granitemoe").to(torch.bfloat16), train_router=True)
    apply_moe(model, layout, resolved)
    peft_model = add_lora(model, EVERYTHING, layout, resolved).model
    dtypes = {(parameter.requires_grad, parameter.dtype) for parameter in peft_model.parameters()}
    assert dtypes == {(True, torch.float32), (False, torch.bfloat16)}
    assert torch.isfinite(logits(peft_model)).all()


@pytest.mark.parametrize("train_router", [False, True])
@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_train_whole(family: str, train_router: bool) -> None:
    model = tiny_models.model(family)
    layout = find_layout(model)
    resolved = resolve_moe(Moe(train_router=train_router), layout, full=True) if layout else resolved_for(model)[2]
    report = train_whole(model, layout, resolved)
    routers = set() if layout is None else {
        f"{layout.path(layer, layout.router_path)}.{name}"
        for layer, router in layout.routers(model).items() for name, _ in router.named_parameters()
    }  # fmt: skip
    steering = {name for name in routers if "correction_bias" in name}
    still = steering if train_router else routers
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    assert {name for name, parameter in model.named_parameters() if not parameter.requires_grad} == still
    trainable = sum(parameter.numel() for name, parameter in model.named_parameters() if name not in still)
    assert report.trainable_parameters == trainable == sum(report.by_group.values())
    assert ("routers are frozen" in report.text()) is (layout is not None and not train_router)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    model(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    unmoved = {name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])}
    # A bias of zeros that has no gradient (a key's bias: softmax does not see it) stays zero under weight decay.
    assert {name for name in unmoved if not name.endswith("bias")} == {n for n in still if not n.endswith("bias")}
    assert still <= unmoved
    if train_router:
        assert not (routers - steering) & unmoved
