"""Edited models of many families: which tensors change, what they still write, and that nothing else changes."""

import json
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from llama_stack_provider_moe.compute.ablation.apply import apply, dry_run
from llama_stack_provider_moe.compute.ablation.apply_report import APPLIED_FILE, AppliedReport
from llama_stack_provider_moe.compute.ablation.measurements import Measurements
from llama_stack_provider_moe.compute.ablation.writers import find_writers
from llama_stack_provider_moe.compute.methods.ablation import direction, read_direction, remove_output
from llama_stack_provider_moe.compute.moe.derive import find_layout
from tests.support import tiny_models
from tests.support.ablation_models import along, load, measured, plan
from tests.support.family_subject import answer

# Fused on disk: granitemoe's, gpt_oss (transposed, with biases) and llama4_text (transposed). The others: one by one.
FAMILIES = (
    "granitemoeshared", "granitemoehybrid", "mixtral", "qwen2_moe", "olmoe", "phimoe", "glm4_moe", "deepseek_v3",
    "ernie4_5_moe", "lfm2_moe", "llama4_text", "gpt_oss", "llama", *tiny_models.POST_NORM,
)  # fmt: skip
FUSED = ("granitemoeshared", "granitemoehybrid", "llama4_text", "gpt_oss")
_KEPT = TemporaryDirectory()


@cache
def subject(family: str) -> tuple[Path, Measurements]:
    folder = tiny_models.build(family, Path(_KEPT.name) / family)
    model = load(folder)
    drawn = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            # Biases start at 0 and would have nothing to remove; norms start at one number, and would scale nothing.
            if bool((parameter == parameter.flatten()[0]).all()):
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=drawn))
    model.save_pretrained(folder)
    return folder, measured(folder)


def tensors(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def everywhere(family: str) -> str:
    return f"0-{load(subject(family)[0]).config.num_hidden_layers - 1}"


@pytest.mark.parametrize("family", FAMILIES)
def test_no_block_writes_the_direction(family: str, tmp_path: Path) -> None:
    """The residual stream keeps what the embeddings put there, to rounding: so every writer was found."""
    folder, found = subject(family)
    unit = direction(found.target.mean_LH[1], found.baseline.mean_LH[1], "projected")
    wanted = plan(everywhere(family), ablate_individual_experts=family in tiny_models.MOE)
    report = apply(str(folder), wanted, found, tmp_path / "out")
    before, after = along(load(folder), unit), along(load(tmp_path / "out"), unit)
    assert float((before[1:] - before[0]).abs().max()) > 0.1
    assert float((after[1:] - after[0]).abs().max()) < 1e-4
    old, new = tensors(folder), tensors(tmp_path / "out")
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert changed == {each.name for each in report.touched}
    assert old.keys() == new.keys()
    unchanged = [name for names in report.skipped.values() for name in names]
    assert sorted([*unchanged, *changed]) == sorted(old), "every tensor is in the report, once"
    for each in report.touched:
        assert each.along_before is not None
        assert each.along_after is not None
        assert each.along_before > 1e-3
        assert each.along_after < (1e-6 if each.kind != "router" else each.along_before)
        if each.kind != "router" and not each.name.endswith("bias"):
            assert each.norm_after == pytest.approx(each.norm_before)
    assert json.loads((tmp_path / "out" / APPLIED_FILE).read_bytes()) == report.model_dump(mode="json")
    assert ("routed experts" in " ".join(report.missed)) == (family in ("glm4_moe", "deepseek_v3", "ernie4_5_moe",
                                                                        "lfm2_moe", "llama4_text"))  # fmt: skip


@pytest.mark.parametrize("family", ["mixtral", "granitemoeshared", "gpt_oss", "glm4_moe"])
def test_only_the_named_blocks_and_experts_change(family: str, tmp_path: Path) -> None:
    folder, found = subject(family)
    wanted = plan("1", 0, scale=0.7, sparsity=0.25, ablate_individual_experts=True, expert_subset=[0, 3], gate_scale=0)
    report = apply(str(folder), wanted, found, tmp_path / "out")
    before, after = load(folder), load(tmp_path / "out")
    layout = find_layout(before)
    assert layout is not None
    name = layout.path(1, f"{layout.experts_path}.{layout.down}")
    old, new = before.get_parameter(name), after.get_parameter(name)
    assert [not torch.equal(*pair) for pair in zip(old, new, strict=True)] == [True, False, False, True]
    unit = direction(found.target.mean_LH[0], found.baseline.mean_LH[0], "projected", sparsity=0.25)
    by_hand = [
        remove_output((matrix.mT if layout.transposed else matrix).detach(), unit, 0.7, "column")
        for matrix in old
    ]  # fmt: skip
    for expert in (0, 3):
        made = new[expert].mT if layout.transposed else new[expert]
        assert torch.allclose(made, by_hand[expert], atol=1e-7)
        assert int((made == (old[expert].mT if layout.transposed else old[expert])).all(dim=1).sum()) == 8
    assert {each.layer for each in report.touched} == {1}
    assert {each.kind for each in report.touched} <= {"attention", "shared", "experts"}
    subset = [each.experts for each in report.touched if each.kind == "experts"]
    assert subset == ([2] * len(subset) if family in FUSED else [None] * len(subset))
    for kept in ("router", "0."):
        assert all(kept not in each.kind for each in report.touched)


@pytest.mark.parametrize("family", ["mixtral", "granitemoeshared", "glm4_moe"])
def test_each_layer_has_its_own_experts(family: str, tmp_path: Path) -> None:
    """Layer 0 is not named, so none of its experts changes; with all experts named, the edit is that of no choice."""
    folder, found = subject(family)
    changes = {"ablate_individual_experts": True, "gate_scale": 0}
    report = apply(str(folder), plan("0-1", layer_experts={"1": "0,3"}, **changes), found, tmp_path / "out")
    before, after = load(folder), load(tmp_path / "out")
    layout = find_layout(before)
    assert layout is not None
    changed = {
        layer: [not torch.equal(*pair) for pair in zip(
            *(each.get_parameter(layout.path(layer, f"{layout.experts_path}.{layout.down}")) for each in (before, after)
        ), strict=True)] for layer in layout.moe_layers
    }  # fmt: skip
    expected = {layer: [False] * 4 for layer in layout.moe_layers} | {1: [True, False, False, True]}
    assert changed == expected
    assert not any("routed experts" in each for each in report.missed if "block 0" in each and 0 in layout.moe_layers)
    everything = {str(layer): "0-3" for layer in layout.moe_layers}
    apply(str(folder), plan("0-1", layer_experts=everything, **changes), found, tmp_path / "named")
    apply(str(folder), plan("0-1", **changes), found, tmp_path / "all")
    named, whole = tensors(tmp_path / "named"), tensors(tmp_path / "all")
    assert all(torch.equal(named[name], whole[name]) for name in whole)


@pytest.mark.parametrize("family", ["mixtral", "granitemoeshared", "glm4_moe", "phimoe"])
@pytest.mark.parametrize("gate_scale", [0.5, 1.0])
def test_a_gate_reads_as_if_the_direction_were_out_of_its_input(family: str, gate_scale: float, tmp_path: Path) -> None:
    """The gates of the unedited model, with the direction taken out of their input by a hook, give the same logits."""
    folder, found = subject(family)
    apply(str(folder), plan(everywhere(family), gate_scale=gate_scale), found, tmp_path / "out")
    edited, hooked, plain = load(tmp_path / "out"), load(tmp_path / "out"), load(folder)
    layout = find_layout(plain)
    assert layout is not None
    unit = direction(found.target.mean_LH[1], found.baseline.mean_LH[1], "projected")
    for layer, router in layout.routers(hooked).items():
        block = hooked.get_submodule(f"{layout.layers_path}.{layer}")
        norm = block.get_submodule(str(found.provenance.router_norms[layer]))
        q = read_direction(unit, norm.weight.detach()).float()

        def out_of_it(module: object, inputs: tuple[Tensor, ...], q: Tensor = q) -> tuple[Tensor, ...]:
            state = inputs[0]
            return (state - gate_scale * (state @ q)[..., None] * q, *inputs[1:])

        with torch.no_grad():
            router.get_parameter(layout.router_weight).copy_(
                layout.routers(plain)[layer].get_parameter(layout.router_weight))  # fmt: skip
        router.register_forward_pre_hook(out_of_it)
    with torch.no_grad():
        assert torch.allclose(answer(edited), answer(hooked), atol=1e-5)
    weights = [layout.routers(each)[layout.moe_layers[0]].get_parameter(layout.router_weight)
               for each in (edited, plain)]  # fmt: skip
    assert not torch.equal(*weights)


@pytest.mark.parametrize("family", ["mixtral", "granitemoeshared"])
def test_sharded_equals_single(family: str, tmp_path: Path) -> None:
    folder, found = subject(family)
    load(folder).save_pretrained(tmp_path / "sharded", max_shard_size="40KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    wanted = plan("0-1", ablate_individual_experts=True)
    apply(str(folder), wanted, found, tmp_path / "one")
    said: list[str] = []
    apply(str(tmp_path / "sharded"), wanted, found, tmp_path / "many", said.append)
    one, many = tensors(tmp_path / "one"), tensors(tmp_path / "many")
    assert one.keys() == many.keys()
    assert all(torch.equal(one[name], many[name]) for name in one)
    names = {path.name for path in (tmp_path / "sharded").glob("*.safetensors*")}
    assert {path.name for path in (tmp_path / "many").glob("*.safetensors*")} == names
    assert len(said) == len(names) - 1
    with torch.no_grad():
        assert torch.equal(answer(load(tmp_path / "one")), answer(load(tmp_path / "many")))


def test_a_model_in_bf16_is_edited_in_fp32_and_rounded_once(tmp_path: Path) -> None:
    folder, _ = subject("mixtral")
    load(folder).bfloat16().save_pretrained(tmp_path / "bf16")
    found = measured(tmp_path / "bf16")
    report = apply(str(tmp_path / "bf16"), plan("0-1", gate_scale=0), found, tmp_path / "out")
    old, new = tensors(tmp_path / "bf16"), tensors(tmp_path / "out")
    unit = direction(found.target.mean_LH[1], found.baseline.mean_LH[1], "projected")
    for each in report.touched:
        assert new[each.name].dtype == torch.bfloat16
        assert torch.equal(new[each.name], remove_output(old[each.name].float(), unit, 1.0, "column").bfloat16())
        assert each.along_after is not None
        assert each.along_after < 2**-8, "what rounding leaves is reported"


def test_a_dry_run_says_what_apply_does(tmp_path: Path) -> None:
    folder, found = subject("glm4_moe")
    wanted = plan("0-1", ablate_individual_experts=True, expert_subset=[1])
    dry = dry_run(str(folder), wanted, found)
    assert sorted(folder.parent.glob(".*")) == []
    done = apply(str(folder), wanted, found, tmp_path / "out")
    assert dry.folder is None
    assert [each.name for each in dry.touched] == [each.name for each in done.touched]
    assert (dry.skipped, dry.missed, dry.bytes) == (done.skipped, done.missed, done.bytes)
    assert all(each.norm_before is None for each in dry.touched)
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "config.json").write_bytes((folder / "config.json").read_bytes())
    alone = dry_run(str(tmp_path / "config"), wanted, found)
    assert {(each.layer, each.kind) for each in alone.touched} == {(each.layer, each.kind) for each in dry.touched}
    assert 2 * alone.bytes == pytest.approx(dry.bytes, rel=0.01), "bf16 by the config, fp32 in the files"


def test_experts_whose_sum_goes_through_a_norm(tmp_path: Path) -> None:
    """FlexOlmo's routers read the stream without a norm, so they stay."""
    from tests.support.family_subject import Subject as Family

    model, folder = Family("flex_olmo").model(), tmp_path / "flex"
    drawn = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=drawn))
    model.save_pretrained(folder)
    tiny_models.tokenizer().save_pretrained(folder)
    found = measured(folder)
    unit = direction(found.target.mean_LH[1], found.baseline.mean_LH[1], "projected")
    layers = f"0-{len(found.target.mean_LH) - 1}"
    apply(str(folder), plan(layers, ablate_individual_experts=True, gate_scale=0), found, tmp_path / "out")
    before, after = along(load(folder), unit), along(load(tmp_path / "out"), unit)
    assert float((before[1:] - before[0]).abs().max()) > 0.1
    assert float((after[1:] - after[0]).abs().max()) < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_every_kind_of_writer_is_found(family: str) -> None:
    model = load(subject(family)[0])
    layout = find_layout(model)
    kinds: dict[str, set[int]] = {}
    for each in find_writers(model, layout):
        kinds.setdefault(each.kind, set()).add(each.layer)
    assert kinds["attention"] == set(range(model.config.num_hidden_layers))
    if layout is None:
        assert kinds.keys() == {"attention", "dense"}
        return
    assert kinds["experts"] == kinds["router"] == set(layout.moe_layers)
    assert kinds.get("dense", set()) == set(layout.dense_layers)
    assert kinds.get("shared", set()) == (set(layout.moe_layers) if layout.shared_path else set())


def test_the_report_is_read_again() -> None:
    folder, found = subject("mixtral")
    report = dry_run(str(folder), plan("0-1"), found)
    assert AppliedReport.model_validate_json(report.model_dump_json()) == report
