"""Merged experts are the averages that the report names, in every family; alignment undoes a permutation."""

import doctest
import itertools
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from llama_stack_provider_moe.compute.export import gguf, verify
from llama_stack_provider_moe.compute.export.merge import merge
from llama_stack_provider_moe.compute.export.reference import read_reference
from llama_stack_provider_moe.compute.methods import expert_merging
from llama_stack_provider_moe.compute.methods.expert_merging import (
    best_assignment,
    distances,
    hierarchical_clusters,
    router_guided_clusters,
    shares_by_use,
)
from llama_stack_provider_moe.compute.models.adapted import with_adapter
from llama_stack_provider_moe.compute.surgery.actions import choose, prepare
from llama_stack_provider_moe.compute.surgery.calibrate import calibrate
from llama_stack_provider_moe.compute.surgery.observe import logit_products, mean_outputs
from llama_stack_provider_moe.compute.surgery.prepared import Rows, make
from llama_stack_provider_moe.compute.surgery.report import SurgeryReport, text
from llama_stack_provider_moe.errors import InvalidInput
from llama_stack_provider_moe.spec.surgery import Likeness, Surgery
from tests.support import llama_support, surgery_models, tiny_models
from tests.support.export_support import EVERYTHING, adapted, gap, logits
from tests.support.llama_support import ALIGNED

ROWS = surgery_models.prompts(4, 12)
# Measured over all families: at most 3e-7, as sums have another order.
TOLERANCE = 1e-6
BY_HAND = ("granitemoe", "mixtral", "minimax_m2", "qwen3_moe", "glm4_moe", "deepseek_v3", "llama4_text", "gpt_oss",
           "ernie4_5_moe", "phimoe")  # fmt: skip


def merged(base: Path, out: Path | None, **asked: object) -> SurgeryReport:
    """Merge by the rows, without a command."""
    surgery = Surgery.model_validate({"action": "merge", "keep": 6, **asked})
    prepared = prepare(base, surgery)
    return make(prepared, choose(prepared, Rows(surgery_models.load(base), ROWS, 3)), str(base), out)


def by_hand(base: Path, out: Path, report: SurgeryReport) -> PreTrainedModel:
    """The model that the report describes: every tensor of a layer that counts the experts, averaged."""
    old = surgery_models.load(base).state_dict()
    model: PreTrainedModel = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(out), dtype=torch.float32)
    layers = {each.layer: each for each in report.layers}
    for name, wanted in model.state_dict().items():
        tensor = old[name]
        if tensor.shape != wanted.shape:
            layer = layers[int(name.split(".layers.")[1].split(".")[0])]
            assert layer.clusters is not None
            assert layer.shares is not None
            axis = next(at for at, (a, b) in enumerate(zip(tensor.shape, wanted.shape, strict=True)) if a != b)
            parts: list[Tensor] = []
            for cluster, shares in zip(layer.clusters, layer.shares, strict=True):
                weight = torch.tensor(shares).view([-1 if at == axis else 1 for at in range(tensor.dim())])
                parts.append((tensor.index_select(axis, torch.tensor(cluster)) * weight).sum(dim=axis))
            tensor = torch.stack(parts, dim=axis)
        wanted.copy_(tensor)
    return model.eval()


def loss_of(model: PreTrainedModel) -> float:
    """The mean loss of the rows."""
    total, tokens = 0.0, 0
    for prompt in ROWS:
        ids = torch.tensor([prompt.ids])
        with torch.no_grad():
            total += float(model(ids, labels=ids).loss) * (len(prompt.ids) - 1)
        tokens += len(prompt.ids) - 1
    return total / tokens


@pytest.mark.parametrize("family", BY_HAND)
def test_the_new_model_is_what_the_report_says(family: str, tmp_path: Path) -> None:
    base = surgery_models.build(family, tmp_path / "base")
    report = merged(base, tmp_path / "out")
    new = surgery_models.load(tmp_path / "out")
    assert gap(logits(new), logits(by_hand(base, tmp_path / "out", report))) <= TOLERANCE
    assert gap(logits(new), logits(surgery_models.load(base))) > 100 * TOLERANCE
    layout = surgery_models.layout_of(new)
    assert (layout.num_experts, report.experts_before, report.experts_after) == (6, 8, 6)
    assert report.loss is not None
    assert report.loss.after == pytest.approx(loss_of(new), abs=1e-5)
    assert report.loss.before == pytest.approx(loss_of(surgery_models.load(base)), abs=1e-5)
    assert report.loss.kl > 0
    for each in report.layers:
        assert each.clusters is not None
        assert sorted(itertools.chain.from_iterable(each.clusters)) == list(range(8))
        assert [sum(shares) for shares in each.shares or []] == [pytest.approx(1)] * 6
        if family in surgery_models.IN_GROUPS:
            assert [{old // 4 for old in cluster} for cluster in each.clusters] == [{0}] * 3 + [{1}] * 3
    assert SurgeryReport.model_validate_json((tmp_path / "out" / "surgery.json").read_text()) == report
    assert "by mean outputs (HC-SMoE): 8 -> 6 experts" in text(report)


@pytest.mark.parametrize("family", [family for family in tiny_models.MOE if family not in BY_HAND])
def test_every_other_family_too(family: str, tmp_path: Path) -> None:
    base = surgery_models.build(family, tmp_path / "base")
    report = merged(base, tmp_path / "out", by="weights")
    new = surgery_models.load(tmp_path / "out")
    assert gap(logits(new), logits(by_hand(base, tmp_path / "out", report))) <= TOLERANCE
    assert report.loss is not None
    assert report.loss.after == pytest.approx(loss_of(new), abs=1e-5)


def shuffled(base: Path, family: str) -> Path:
    """Expert 3 of each layer becomes expert 0 with its hidden neurons in another order, which computes the same."""
    model = surgery_models.load(base)
    layout = surgery_models.layout_of(model)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(3))
    for experts in layout.experts(model).values():
        for name, parameter in experts.named_parameters():
            part = parameter.data[0].clone()
            if name.startswith("gate_up_proj"):
                axis = part.dim() - 1 if layout.transposed else 0
                halves = (
                    2 * order + torch.tensor([[0], [1]]) if family == "gpt_oss" else order + torch.tensor([[0], [24]])
                )
                index = halves.T.flatten() if family == "gpt_oss" else halves.flatten()
                part = part.index_select(axis, index)
            elif name == "down_proj":
                part = part.index_select(0 if layout.transposed else 1, order)
            parameter.data[3] = part
    model.save_pretrained(base)
    return base


@pytest.mark.parametrize("family", ["granitemoe", "mixtral", "qwen2_moe", "gpt_oss", "llama4_text"])
def test_alignment_undoes_a_permutation(family: str, tmp_path: Path) -> None:
    base = shuffled(surgery_models.build(family, tmp_path / "base"), family)
    report = merged(base, tmp_path / "out", keep=7, align=True)
    pairs = [[cluster for cluster in each.clusters or [] if len(cluster) > 1] for each in report.layers]
    assert pairs == [[[0, 3]]] * len(report.layers)
    assert all(min(min(each) for each in layer.shares or []) > 0 for layer in report.layers)
    old, new = surgery_models.load(base), surgery_models.load(tmp_path / "out")
    layout = surgery_models.layout_of(old)
    merged(base, tmp_path / "apart", keep=7)
    apart = surgery_models.load(tmp_path / "apart")
    for layer, experts in layout.experts(old).items():
        first = max((0, 3), key=lambda expert: float(_count(old)[layer][expert]))
        for name, parameter in experts.named_parameters():
            after = layout.experts(new)[layer].get_parameter(name)
            assert torch.allclose(after[0], parameter[first], atol=1e-6)
            if name.startswith("gate_up") and parameter[0].abs().sum() > 0:
                assert not torch.allclose(
                    layout.experts(apart)[layer].get_parameter(name)[0], parameter[first], atol=1e-3
                )


def _count(model: PreTrainedModel) -> dict[int, Tensor]:
    layout = surgery_models.layout_of(model)
    found = calibrate(model, layout, ROWS, 3, contributions=False)
    return dict(zip(layout.moe_layers, found.count_LE, strict=True))


@pytest.mark.parametrize("by", ["outputs", "router_logits"])
def test_what_the_rows_show_is_that_of_the_formula(by: Likeness) -> None:
    """Outputs of all experts on all tokens, and products of logits, computed again one token at a time."""
    model = tiny_models.model("mixtral", **surgery_models.eight("mixtral"))
    layout = surgery_models.layout_of(model)
    seen: dict[int, Tensor] = {}
    for layer, module in layout.experts(model).items():
        module.register_forward_pre_hook(lambda _, given, layer=layer: seen.update({layer: given[0]}))
    outputs, products, tokens = torch.zeros(2, 8, 32), torch.zeros(2, 8, 8), 0
    for prompt in ROWS:
        with torch.no_grad():
            model(torch.tensor([prompt.ids]))
            for layer, hidden_TH in seen.items():
                experts = layout.experts(model)[layer]
                for expert in range(8):
                    gate, up = (hidden_TH @ experts.get_parameter("gate_up_proj")[expert].T).chunk(2, dim=-1)
                    made = (torch.nn.functional.silu(gate) * up) @ experts.get_parameter("down_proj")[expert].T
                    outputs[layer, expert] += made.sum(dim=0)
                logits_TE = hidden_TH @ layout.routers(model)[layer].get_parameter("weight").T
                products[layer] += logits_TE.T @ logits_TE
        tokens += len(prompt.ids)
    if by == "outputs":
        found = mean_outputs(model, layout, ROWS, 3, lambda *_: None)
        assert torch.allclose(found.float(), outputs / tokens, atol=1e-6)
    else:
        found = logit_products(model, layout, ROWS, 3, lambda *_: None)
        assert torch.allclose(found.float(), products, rtol=1e-4, atol=1e-6)


def test_llama_4_outputs_are_not_scaled_by_scores() -> None:
    model = tiny_models.model("llama4_text", num_local_experts=8)
    layout = surgery_models.layout_of(model)
    ((layer, router),) = layout.routers(model).items()
    seen: list[Tensor] = []
    router.register_forward_pre_hook(lambda _, given: seen.append(given[0].detach()))
    found = mean_outputs(model, layout, ROWS, 1, lambda *_: None)
    hidden_TH = torch.cat([each.reshape(-1, 32) for each in seen])
    experts = layout.experts(model)[layer]
    gate, up = (hidden_TH @ experts.get_parameter("gate_up_proj")[5]).chunk(2, dim=-1)
    made = (up * torch.nn.functional.silu(gate)) @ experts.get_parameter("down_proj")[5]
    assert torch.allclose(found[0, 5].float(), made.mean(dim=0), atol=1e-6)


def test_without_rows_weights_decide_and_all_count_the_same(tmp_path: Path) -> None:
    base = surgery_models.build("granitemoe", tmp_path / "base")
    prepared = prepare(base, Surgery(action="merge", keep=5, by="weights"))
    report = make(prepared, choose(prepared, None), "base", tmp_path / "out")
    assert report.loss is None
    assert any("without rows every expert" in each for each in report.warnings)
    assert (
        gap(logits(surgery_models.load(tmp_path / "out")), logits(by_hand(base, tmp_path / "out", report))) <= TOLERANCE
    )
    model = surgery_models.load(base)
    experts = surgery_models.layout_of(model).experts(model)[0]
    weights = torch.cat([each.detach().flatten(1) for each in experts.parameters()], dim=1)
    assert report.layers[0].clusters == [list(each) for each in hierarchical_clusters(distances(weights), 5)]
    with pytest.raises(InvalidInput, match=r"rows, because surgery.by 'outputs' is measured on them"):
        choose(prepare(base, Surgery(action="merge", keep=5)), None)


def test_a_dry_run_measures_the_same(tmp_path: Path) -> None:
    base = surgery_models.build("mixtral", tmp_path / "base")
    dry, wet = merged(base, None), merged(base, tmp_path / "out")
    assert dry.folder is None
    assert dry.model_copy(update={"folder": wet.folder}) == wet


@pytest.mark.parametrize(
    ("family", "keep", "expected"),
    [("mixtral", 1, "surgery.keep: 1 is not valid; expected 2 to 7"), ("glm4_moe", 5, "2 groups of equal size")],
)
def test_numbers_that_can_not_be(family: str, keep: int, expected: str, tmp_path: Path) -> None:
    tiny_models.config(family, **surgery_models.eight(family)).save_pretrained(tmp_path / "model")
    with pytest.raises(InvalidInput, match=expected):
        prepare(tmp_path / "model", Surgery(action="merge", keep=keep))


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_it_trains_and_merges_an_adapter(family: str, tmp_path: Path) -> None:
    base = surgery_models.build(family, tmp_path / "base")
    merged(base, tmp_path / "new", by="router_logits")
    adapter = adapted(tmp_path / "new", tmp_path / "adapter", EVERYTHING)
    merge(tmp_path / "new", adapter, tmp_path / "whole")
    expected = logits(with_adapter(surgery_models.load(tmp_path / "new"), adapter, None).eval())
    assert gap(logits(surgery_models.load(tmp_path / "whole")), expected) <= 1e-5


@pytest.mark.wide
def test_it_converts_to_gguf(tmp_path: Path) -> None:
    tools = llama_support.toolchain()
    base = llama_support.build("granitemoe", tmp_path / "base", initializer_range=0.03, num_local_experts=8, **ALIGNED)
    prepared = prepare(base, Surgery(action="merge", keep=6, by="weights"))
    make(prepared, choose(prepared, None), "base", tmp_path / "out")
    gguf.convert(tmp_path / "out", tmp_path / "f32.gguf", "f32", tools)
    reference = read_reference(tmp_path / "out", say=lambda line: None)
    check = verify.verify(tmp_path / "f32.gguf", tmp_path / "out", tools, reference, "f32")
    assert check.logits is not None
    assert check.logits.relative_difference < 1e-4


def test_examples() -> None:
    assert doctest.testmod(expert_merging).failed == 0


def test_clusters_join_by_the_mean_distance() -> None:
    """Points 0, 1, 3.1 and 6: 0 and 1 join; 3.1 is 2.6 from their mean distance, and 2.9 from 6, so it joins them."""
    points = torch.tensor([[0.0], [1.0], [3.1], [6.0]])
    assert hierarchical_clusters(distances(points), 3) == [(0, 1), (2,), (3,)]
    assert hierarchical_clusters(distances(points), 2) == [(0, 1, 2), (3,)]
    assert hierarchical_clusters(distances(points), 2, groups=2) == [(0, 1), (2, 3)]
    # By the nearest pair (single linkage) 2.05 would join (0, 1); by the mean (2.55) it joins 4.5, which is 2.45 away.
    chain = torch.tensor([[0.0], [1.0], [3.05], [5.5]])
    assert hierarchical_clusters(distances(chain), 2) == [(0, 1), (2, 3)]


def test_router_groups_have_the_most_used_experts() -> None:
    logits_TE = torch.tensor([[1.0, 0.0, 2.0, 0.1], [0.0, 1.0, 0.2, 0.3]])
    gram = logits_TE.T @ logits_TE
    assert router_guided_clusters(gram, torch.tensor([5.0, 6.0, 1.0, 1.0]), 2) == [(0, 2), (1, 3)]
    assert router_guided_clusters(gram, torch.tensor([5.0, 4.0, 1.0, 2.0]), 2, groups=2) == [(0, 1), (2, 3)]
    assert shares_by_use((0, 1), torch.zeros(2)) == [0.5, 0.5]


def test_no_permutation_is_better() -> None:
    drawn = torch.Generator().manual_seed(0)
    for _ in range(20):
        gain = torch.rand(5, 5, generator=drawn)
        found = best_assignment(gain)
        best = max(itertools.permutations(range(5)), key=lambda each: float(gain[range(5), each].sum()))
        assert found.tolist() == list(best)
