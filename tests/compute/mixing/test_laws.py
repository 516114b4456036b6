"""What a mix computes: one branch copied is that branch; experts are the branches' own; what is shared is the mean."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from llama_stack_provider_moe.compute.export import gguf, verify
from llama_stack_provider_moe.compute.export.reference import read_reference
from llama_stack_provider_moe.compute.mixing.mix import dry_run, mix
from llama_stack_provider_moe.compute.mixing.report import MixReport
from llama_stack_provider_moe.compute.models.upcycle import upcycle
from llama_stack_provider_moe.spec.mixing import MIX_FILE
from tests.compute.mixing.branches import DENSE, changed, dense, logits, plan
from tests.support import llama_support


@pytest.mark.parametrize("family", DENSE)
def test_one_branch_copied_is_that_branch(family: str, tmp_path: Path) -> None:
    base = dense(family, tmp_path / "base")
    branch = changed(base, tmp_path / "branch", 0.1)
    made = mix(str(base), plan("btx", {"a": branch, "b": branch, "c": branch}), tmp_path / "mixed")
    expected = logits(branch)
    assert (expected - logits(base)).abs().max() > 0.01, "the branch differs from its base"
    assert (logits(tmp_path / "mixed") - expected).abs().max() < 1e-5
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "mixed")
    assert made.parameters == model.num_parameters()
    assert model.config.tie_word_embeddings is family.startswith("tied")


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_token_that_one_expert_gets_sees_that_branchs_mlp(family: str, tmp_path: Path) -> None:
    """Branches that differ in MLPs alone, and a router that always chooses one of them."""
    base = dense(family, tmp_path / "base")
    branches = {name: changed(base, tmp_path / name, 0.3, ".mlp.", seed) for seed, name in enumerate("abc")}
    mix(str(base), plan("btx", branches, top_k=1), tmp_path / "mixed")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "mixed", dtype=torch.float32).eval()
    from tests.compute.mixing.branches import IDS

    for at, branch in enumerate(branches.values()):
        handles = [
            layer.mlp.gate.register_forward_pre_hook(lambda _, given: (torch.ones_like(given[0]),))
            for layer in model.model.layers
        ]
        with torch.no_grad():
            for layer in model.model.layers:
                layer.mlp.gate.weight.zero_()
                layer.mlp.gate.weight[at] = 1.0
            found = model(IDS).logits
        for handle in handles:
            handle.remove()
        assert (found - logits(branch)).abs().max() < 1e-5


def test_shared_weights_are_the_weighted_mean_and_experts_are_copies(tmp_path: Path) -> None:
    base = dense("llama", tmp_path / "base")
    branches = {name: changed(base, tmp_path / name, 0.1, seed=seed) for seed, name in enumerate("abc")}
    asked = plan("btx", branches)
    for branch, weight in zip(asked.branches, (1.0, 3.0, 0.0), strict=True):
        branch.weight = weight
    report = mix(str(base), asked, tmp_path / "mixed")
    a, b, c = (load_file(folder / "model.safetensors") for folder in branches.values())
    mixed = load_file(tmp_path / "mixed" / "model.safetensors")
    for name in mixed:
        if "block_sparse_moe" not in name:
            assert torch.allclose(mixed[name], (a[name] + 3 * b[name]) / 4, atol=1e-6), name
    for at, branch in enumerate((a, b, c)):
        for theirs, ours in (("gate", "w1"), ("up", "w3"), ("down", "w2")):
            name = f"model.layers.1.block_sparse_moe.experts.{at}.{ours}.weight"
            assert torch.equal(mixed[name], branch[f"model.layers.1.mlp.{theirs}_proj.weight"])
    assert [round(each.weight, 3) for each in report.experts] == [0.25, 0.75, 0]
    # Norms of constant weights have no spread, so a little less than the noise's 0.1.
    assert all(0.08 < (each.moved_shared or 0) < 0.11 for each in report.experts)
    assert all(0.09 < (each.moved_experts or 0) < 0.11 for each in report.experts)
    assert json.loads((tmp_path / "mixed" / MIX_FILE).read_text()) == report.model_dump()
    expected = {"folder": None, "seconds": None}
    dry = dry_run(str(base), asked)
    figures = [each.model_copy(update={"moved_shared": None, "moved_experts": None}) for each in report.experts]
    assert dry == report.model_copy(update={**expected, "experts": figures})


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_bar_without_all_branches_but_one_is_that_branch(family: str, tmp_path: Path) -> None:
    """The branch trained its expert, its router and what is shared; its anchor stayed."""
    base = upcycle(dense(family, tmp_path / "dense"), tmp_path / "base", experts=2).folder
    branches = {}
    for seed, name in enumerate("abc"):
        trained = changed(base, tmp_path / f"{name}-expert", 0.2, "experts.1.", seed)
        trained = changed(trained, tmp_path / f"{name}-router", 2.0, "gate.weight", seed + 7)
        branches[name] = changed(trained, tmp_path / name, 0.1, "self_attn", seed)
    mix(str(base), plan("bar", branches, leave_out=["a", "c"]), tmp_path / "one")
    expected = logits(branches["b"])
    assert (expected - logits(base)).abs().max() > 0.01
    assert (logits(tmp_path / "one") - expected).abs().max() < 1e-5

    report = mix(str(base), plan("bar", branches, top_k=3), tmp_path / "all")
    assert [each.name for each in report.experts] == ["anchor", "a", "b", "c"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "all", dtype=torch.float32)
    assert report.parameters == model.num_parameters()
    old = AutoModelForCausalLM.from_pretrained(branches["c"], dtype=torch.float32)
    anchor = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    for mixed, branch, first in zip(model.model.layers, old.model.layers, anchor.model.layers, strict=True):
        assert torch.equal(mixed.mlp.experts.down_proj[3], branch.mlp.experts.down_proj[1])
        assert torch.equal(mixed.mlp.experts.gate_up_proj[0], first.mlp.experts.gate_up_proj[0])
        rows, theirs = mixed.mlp.gate.weight, branch.mlp.gate.weight
        assert torch.allclose(rows[3] - rows[0], theirs[1] - theirs[0], atol=1e-6), "the odds are the branch's"


def test_a_mix_in_several_files_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = dense("llama", tmp_path / "base")
    branches = {name: changed(base, tmp_path / name, 0.1, seed=seed) for seed, name in enumerate("ab")}
    mix(str(base), plan("btx", branches, seed=5), tmp_path / "whole")
    monkeypatch.setattr("llama_stack_provider_moe.compute.mixing.mix.SHARD_BYTES", 20_000)
    report: MixReport = mix(str(base), plan("btx", branches, seed=5), tmp_path / "parts")
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 3
    assert torch.equal(logits(tmp_path / "parts"), logits(tmp_path / "whole"))
    other = mix(str(base), plan("btx", branches, seed=6), tmp_path / "other")
    assert other.parameters == report.parameters
    assert not torch.equal(logits(tmp_path / "other"), logits(tmp_path / "whole")), "the seed is that of the routers"


@pytest.mark.wide
def test_a_mix_converts_to_gguf(tmp_path: Path) -> None:
    tools = llama_support.toolchain()
    base = llama_support.build("llama", tmp_path / "base", **{**llama_support.ALIGNED, "initializer_range": 0.03})
    branches = {name: changed(base, tmp_path / name, 0.3, seed=seed) for seed, name in enumerate("ab")}
    mix(str(base), plan("btx", branches), tmp_path / "mixed")
    gguf.convert(tmp_path / "mixed", tmp_path / "f32.gguf", "f32", tools)
    reference = read_reference(tmp_path / "mixed", say=lambda line: None)
    check = verify.verify(tmp_path / "f32.gguf", tmp_path / "mixed", tools, reference, "f32")
    assert check.logits is not None
    assert check.logits.relative_difference < 1e-4
