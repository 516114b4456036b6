"""A pruned model is the model with those experts masked, in every family; it loads, trains, merges and converts."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from llama_stack_provider_moe.compute.analysis.routing_report import Prompt
from llama_stack_provider_moe.compute.export import gguf, verify
from llama_stack_provider_moe.compute.export.merge import merge
from llama_stack_provider_moe.compute.export.reference import read_reference
from llama_stack_provider_moe.compute.models.adapted import with_adapter
from llama_stack_provider_moe.compute.moe.masking import masked_experts
from llama_stack_provider_moe.compute.surgery import write
from llama_stack_provider_moe.compute.surgery.actions import choose, prepare
from llama_stack_provider_moe.compute.surgery.calibrate import losses
from llama_stack_provider_moe.compute.surgery.plan import plan_tensors
from llama_stack_provider_moe.compute.surgery.prepared import Prepared, Rows, make
from llama_stack_provider_moe.compute.surgery.report import SurgeryReport, text
from llama_stack_provider_moe.errors import AdapterError, ModelError
from llama_stack_provider_moe.spec.surgery import REPORT_FILE, Surgery
from tests.support import llama_support, surgery_models, tiny_models
from tests.support.export_support import EVERYTHING, adapted, gap, logits, tensors
from tests.support.llama_support import ALIGNED

# Measured over all families: 0 for most, at most 4e-7.
TOLERANCE = 1e-6
ROWS = surgery_models.prompts(4, 12)


def pruned(base: Path, out: Path, asked: Surgery, prompts: list[Prompt] = ROWS) -> SurgeryReport:
    """Prune by the rows, without a command."""
    pruning, model = prepare(base, asked), surgery_models.load(base)
    return make(pruning, choose(pruning, Rows(model, prompts, 3)), str(base), out)


def masked_gap(base: PreTrainedModel, new: PreTrainedModel, report: SurgeryReport) -> tuple[float, float]:
    """Greatest difference of logits from the model before with the dropped experts masked, and without a mask."""
    ids = torch.tensor([prompt.ids[:12] for prompt in ROWS])
    with torch.no_grad():
        after, whole = new(ids).logits, base(ids).logits
        with masked_experts(base, surgery_models.layout_of(base), {each.layer: each.dropped for each in report.layers}):
            masked = base(ids).logits
    return gap(after, masked), gap(after, whole)


@pytest.mark.parametrize("family", tiny_models.MOE)
def test_every_family_computes_what_it_computes_with_the_experts_masked(family: str, tmp_path: Path) -> None:
    base = surgery_models.build(family, tmp_path / "base")
    report = pruned(base, tmp_path / "out", Surgery(action="prune", keep=6))
    model, new = surgery_models.load(base), surgery_models.load(tmp_path / "out")
    off, moved = masked_gap(model, new, report)
    assert off <= TOLERANCE
    assert moved > 100 * TOLERANCE
    layout = surgery_models.layout_of(new)
    assert (layout.num_experts, report.experts_before, report.experts_after) == (6, 8, 6)
    assert report.parameters_after == sum(each.numel() for each in new.state_dict().values())
    assert report.parameters_before == sum(each.numel() for each in model.state_dict().values())
    for each in report.layers:
        assert each.scores is not None
        assert min(each.scores[old] for old in each.kept) >= max(each.scores[old] for old in each.dropped) or (
            family in surgery_models.IN_GROUPS
        )
        if family in surgery_models.IN_GROUPS:
            assert [sum(old // 4 == group for old in each.dropped) for group in (0, 1)] == [1, 1]
    assert SurgeryReport.model_validate_json((tmp_path / "out" / REPORT_FILE).read_text()) == report


@pytest.mark.parametrize("family", ["granitemoe", "olmoe", "gpt_oss"])
def test_a_list_by_layer_and_many_files(family: str, tmp_path: Path) -> None:
    model = tiny_models.model(family, **surgery_models.eight(family))
    model.save_pretrained(tmp_path / "base", max_shard_size="20KB")
    assert len(list((tmp_path / "base").glob("*.safetensors"))) > 3
    pruning = prepare(tmp_path / "base", Surgery(action="prune", drop={"0": "0,7", "1": "3-4"}))
    plan_report = make(pruning, choose(pruning, None), "base", None)
    assert plan_report.folder is None
    assert not (tmp_path / "out").exists()
    whole = make(pruning, choose(pruning, None), "base", tmp_path / "out")
    off, moved = masked_gap(model, surgery_models.load(tmp_path / "out"), whole)
    assert off <= TOLERANCE < moved
    assert (whole.layers[0].kept, whole.layers[1].dropped) == ([1, 2, 3, 4, 5, 6], [3, 4])
    assert whole.loss is None


def test_new_files_have_an_index(tmp_path: Path) -> None:
    base = surgery_models.build("mixtral", tmp_path / "base")
    pruning = prepare(base, Surgery(action="prune", drop={"all": "2,5"}))
    choice = choose(pruning, None)
    plan = plan_tensors(pruning.resized, choice.experts)
    write.write_folder(pruning.resized, plan, tmp_path / "many", {}, shard_bytes=20_000)
    make(pruning, choice, "base", tmp_path / "one")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 3
    one, many = surgery_models.load(tmp_path / "one"), surgery_models.load(tmp_path / "many")
    assert all(torch.equal(tensor, many.state_dict()[name]) for name, tensor in one.state_dict().items())


@pytest.mark.parametrize(
    ("family", "changes", "renormalised"),
    [
        ("granitemoe", {}, True), ("mixtral", {}, True), ("gpt_oss", {}, True), ("phimoe", {}, True),
        ("qwen3_moe", {"norm_topk_prob": True}, True), ("qwen3_moe", {"norm_topk_prob": False}, False),
        ("olmoe", {}, False), ("qwen2_moe", {}, False), ("minimax_m2", {}, True), ("lfm2_moe", {}, True),
    ],
)  # fmt: skip
def test_experts_that_no_token_chose(family: str, changes: dict[str, bool], renormalised: bool, tmp_path: Path) -> None:
    base = surgery_models.build(family, tmp_path / "base", **changes)
    few = surgery_models.prompts(1, 3)  # three tokens of two experts each leave two experts of eight unused
    report = pruned(base, tmp_path / "out", Surgery(action="prune", keep=6, by="usage"), few)
    assert all(each.scores is not None and each.scores[old] == 0 for each in report.layers for old in each.dropped)
    model, new = surgery_models.load(base), surgery_models.load(tmp_path / "out")
    ids = torch.tensor([few[0].ids])
    with torch.no_grad():
        moved = gap(model(ids).logits, new(ids).logits)
    assert report.loss is not None
    if renormalised:
        assert moved <= TOLERANCE
        assert report.warnings == []
        assert report.loss.kl == pytest.approx(0, abs=TOLERANCE)
    else:
        assert moved > 1000 * TOLERANCE
        (warning,) = report.warnings
        mass = [each.mass or 0.0 for each in report.layers]
        assert f"on average {sum(mass) / len(mass):.4f}, and {max(mass):.4f} in the worst layer" in warning
        assert min(mass) > 0.01
        assert warning in text(report)


def test_the_loss_is_that_of_both_models(tmp_path: Path) -> None:
    base = surgery_models.build("granitemoe", tmp_path / "base")
    report = pruned(base, tmp_path / "out", Surgery(action="prune", keep=4))
    assert report.loss is not None
    for folder, found in ((base, report.loss.before), (tmp_path / "out", report.loss.after)):
        model, total, tokens = surgery_models.load(folder), 0.0, 0
        for prompt in ROWS:
            ids = torch.tensor([prompt.ids])
            with torch.no_grad():
                total += float(model(ids, labels=ids).loss) * (len(prompt.ids) - 1)
            tokens += len(prompt.ids) - 1
        assert found == pytest.approx(total / tokens, abs=1e-5)
        assert report.loss.tokens == tokens
    layout = surgery_models.layout_of(model := surgery_models.load(base))
    nothing = losses(model, layout, ROWS, {}, 2)
    assert nothing.before == nothing.after
    assert nothing.kl == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("family", ["granitemoe", "qwen3_moe", "gpt_oss"])
def test_the_new_model_trains_and_merges_and_refuses_an_adapter_of_the_old_one(family: str, tmp_path: Path) -> None:
    base = surgery_models.build(family, tmp_path / "base")
    old_adapter = adapted(base, tmp_path / "old_adapter", EVERYTHING)
    pruned(base, tmp_path / "new", Surgery(action="prune", keep=5))
    adapter = adapted(tmp_path / "new", tmp_path / "adapter", EVERYTHING)
    model = with_adapter(surgery_models.load(tmp_path / "new"), adapter, None)
    before = [parameter.clone() for name, parameter in model.named_parameters() if "lora_" in name]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    ids = torch.tensor([prompt.ids[:12] for prompt in ROWS])
    optimizer = torch.optim.SGD([each for each in model.parameters() if each.requires_grad], lr=0.1)
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    after = [parameter for name, parameter in model.named_parameters() if "lora_" in name]
    assert any(not torch.equal(one, other) for one, other in zip(before, after, strict=True))
    merge(tmp_path / "new", adapter, tmp_path / "merged")
    merged = surgery_models.load(tmp_path / "merged")
    expected = logits(with_adapter(surgery_models.load(tmp_path / "new"), adapter, None).eval())
    assert gap(logits(merged), expected) <= 1e-5
    with pytest.raises(ModelError, match="is not an adapter of this model"):
        with_adapter(surgery_models.load(tmp_path / "new"), old_adapter, None)
    with pytest.raises((ModelError, AdapterError)):
        merge(tmp_path / "new", old_adapter, tmp_path / "refused")
    assert not (tmp_path / "refused").exists()


def test_files_are_cut_bit_by_bit_and_keep_their_dtypes(tmp_path: Path) -> None:
    base = surgery_models.build("mixtral", tmp_path / "base")
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(tmp_path / "bf16")
    pruning = prepare(tmp_path / "bf16", Surgery(action="prune", drop={"0": "1", "1": "6"}))
    make(pruning, choose(pruning, None), "bf16", tmp_path / "out")
    old, new = tensors(tmp_path / "bf16"), tensors(tmp_path / "out")
    for layer, gone in ((0, 1), (1, 6)):
        kept = [expert for expert in range(8) if expert != gone]
        block = f"model.layers.{layer}.block_sparse_moe"
        assert torch.equal(new[f"{block}.gate.weight"], old[f"{block}.gate.weight"][kept])
        for at, expert in enumerate(kept):
            for matrix in ("w1", "w2", "w3"):
                one, other = (
                    new[f"{block}.experts.{at}.{matrix}.weight"],
                    old[f"{block}.experts.{expert}.{matrix}.weight"],
                )
                assert torch.equal(one, other)
                assert one.dtype == torch.bfloat16
        assert f"{block}.experts.7.w1.weight" not in new
    untouched = [name for name in old if "block_sparse_moe" not in name]
    assert untouched
    assert all(torch.equal(new[name], old[name]) for name in untouched)


def test_a_killed_or_refused_surgery_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = surgery_models.build("granitemoe", tmp_path / "base")
    pruning: Prepared = prepare(base, Surgery(action="prune", drop={"all": "0"}))

    def broken(*_: object) -> None:
        raise OSError("the disk is gone")

    monkeypatch.setattr(write, "_write_tensor", broken)
    with pytest.raises(OSError, match="disk is gone"):
        make(pruning, choose(pruning, None), "base", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_it_converts_to_gguf(tmp_path: Path) -> None:
    tools = llama_support.toolchain()
    base = llama_support.build("granitemoe", tmp_path / "base", initializer_range=0.03, num_local_experts=8, **ALIGNED)
    pruning = prepare(base, Surgery(action="prune", drop={"all": "0,5"}))
    make(pruning, choose(pruning, None), "base", tmp_path / "out")
    gguf.convert(tmp_path / "out", tmp_path / "f32.gguf", "f32", tools)
    reference = read_reference(tmp_path / "out", say=lambda line: None)
    check = verify.verify(tmp_path / "f32.gguf", tmp_path / "out", tools, reference, "f32")
    assert check.logits is not None
    assert check.logits.relative_difference < 1e-4
