"""Sparse upcycling: the MoE computes the same as the dense model with any routers, and nothing is lost."""

import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, MistralConfig, MistralForCausalLM

from llama_stack_provider_moe.compute.models import upcycle as module
from llama_stack_provider_moe.compute.models.upcycle import main, upcycle
from llama_stack_provider_moe.errors import InvalidInput, ModelError
from tests.support import tiny_models

IDS = torch.randint(3, 300, (3, 40), generator=torch.Generator().manual_seed(7))


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama."""
    return tiny_models.build("llama", tmp_path_factory.mktemp("dense") / "llama")


def logits(folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        found: torch.Tensor = model(IDS).logits
    return found


def mistral(folder: Path, **changes: Any) -> Path:
    config = MistralConfig(**{**tiny_models._SHAPE, "intermediate_size": 48, "sliding_window": 16, **changes})
    torch.manual_seed(3)
    MistralForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("experts", "top_k"), [(4, 2), (2, 1), (3, 3), (8, 2)])
def test_logits_equal_the_dense_models(dense: Path, tmp_path: Path, experts: int, top_k: int) -> None:
    report = upcycle(dense, tmp_path / "moe", experts=experts, top_k=top_k, seed=experts)
    model = AutoModelForCausalLM.from_pretrained(report.folder)
    assert type(model).__name__ == "MixtralForCausalLM"
    assert (model.config.num_local_experts, model.config.num_experts_per_tok) == (experts, top_k)
    assert model.dtype == torch.float32
    expected = logits(dense)
    assert expected.std() > 0.1
    assert (logits(report.folder) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("family", ["mistral", "qwen3", "tied llama", "bf16 llama"])
def test_other_sources_keep_their_logits(family: str, tmp_path: Path) -> None:
    source = tmp_path / "dense"
    if family == "mistral":
        mistral(source)
    elif family == "bf16 llama":
        tiny_models.model("llama").to(torch.bfloat16).save_pretrained(source)
    else:
        tiny_models.build(family.removeprefix("tied "), source, tie_word_embeddings=family.startswith("tied"))
    out = upcycle(source, tmp_path / "moe").folder
    assert (logits(out) - logits(source)).abs().max() < 1e-5
    config = json.loads((out / "config.json").read_text())
    assert config["model_type"] == ("qwen3_moe" if family == "qwen3" else "mixtral")
    assert config["tie_word_embeddings"] is family.startswith("tied")
    assert config["dtype"] == ("bfloat16" if family == "bf16 llama" else "float32")
    if family == "mistral":
        assert config["sliding_window"] == 16


def test_routers_decide_by_token_and_reach_every_expert(dense: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(upcycle(dense, tmp_path / "moe").folder)
    with torch.no_grad():
        routers = model(IDS, output_router_logits=True).router_logits
    for logits_TE in routers:
        chosen = logits_TE.topk(2, dim=-1).indices
        assert set(chosen.flatten().tolist()) == {0, 1, 2, 3}
        assert logits_TE.std(dim=-1).min() > 0
    assert not torch.equal(routers[0], routers[1])


def test_experts_are_copies_and_noise_sets_them_apart(dense: Path, tmp_path: Path) -> None:
    equal = AutoModelForCausalLM.from_pretrained(upcycle(dense, tmp_path / "equal").folder)
    noisy = AutoModelForCausalLM.from_pretrained(upcycle(dense, tmp_path / "noisy", expert_noise=0.1).folder)
    gradients = []
    for model in (equal, noisy):
        model(IDS, labels=IDS).loss.backward()
        gradients.append(model.model.layers[0].mlp.gate.weight.grad.abs().max())
    fused_equal, fused_noisy = (model.model.layers[0].mlp.experts.gate_up_proj.detach() for model in (equal, noisy))
    assert all(torch.equal(fused_equal[0], expert) for expert in fused_equal)
    distance = (fused_noisy - fused_equal).std(dim=(1, 2)) / fused_equal.std(dim=(1, 2))
    assert distance.tolist() == pytest.approx([0.1] * 4, rel=0.1)
    assert not torch.allclose(fused_noisy[0], fused_noisy[1])
    # A router of equal experts learns nothing from the language loss, because no choice changes the output.
    assert gradients[0] < 1e-7 < 1e-5 < gradients[1]


def test_the_seed_decides_and_the_sharding_does_not(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    once = upcycle(dense, tmp_path / "once", seed=5, expert_noise=0.01)
    whole = load_file(once.folder / "model.safetensors")
    other = load_file(upcycle(dense, tmp_path / "other", seed=6, expert_noise=0.01).folder / "model.safetensors")
    assert not torch.equal(
        whole["model.layers.1.block_sparse_moe.gate.weight"], other["model.layers.1.block_sparse_moe.gate.weight"]
    )

    monkeypatch.setattr(module, "SHARD_BYTES", 40_000)
    sharded = upcycle(shard(dense, tmp_path / "sharded dense"), tmp_path / "sharded", seed=5, expert_noise=0.01).folder
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 3
    assert set(index["weight_map"]) == set(whole)
    for name, file in index["weight_map"].items():
        with safe_open(sharded / file, framework="pt") as tensors:
            assert torch.equal(tensors.get_tensor(name), whole[name]), name
    assert torch.equal(logits(sharded), logits(once.folder))
    assert {path.name for path in sharded.iterdir()} >= {"tokenizer.json", "config.json"}


def shard(source: Path, folder: Path) -> Path:
    """`source` in two shards, with its layers mixed."""
    folder.mkdir()
    tensors = load_file(source / "model.safetensors")
    names = sorted(tensors, key=lambda name: name[::-1])
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2])):
        save_file({name: tensors[name] for name in part}, folder / f"part-{number}.safetensors", {"format": "pt"})
        weight_map |= dict.fromkeys(part, f"part-{number}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((source / name).read_bytes())
    return folder


def test_parameters_are_counted(dense: Path, tmp_path: Path) -> None:
    report = upcycle(dense, tmp_path / "moe", experts=4, top_k=2)
    model = AutoModelForCausalLM.from_pretrained(report.folder)
    mlp = 2 * 3 * 32 * 48  # layers, matrices, hidden, intermediate
    routers = 2 * 4 * 32
    assert report.dense == AutoModelForCausalLM.from_pretrained(dense).num_parameters()
    assert report.total == model.num_parameters() == report.dense + 3 * mlp + routers
    assert report.active == report.dense + mlp + routers


def test_others_read_the_new_model_as_far_as_the_umask_lets_them(dense: Path, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        upcycle(dense, tmp_path / "moe")
    finally:
        os.umask(before)
    assert {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "moe").glob("*.safetensors")} == {
        "model.safetensors": 0o640
    }


def test_tokenizer_template_and_generation_config_are_copied(dense: Path, tmp_path: Path) -> None:
    source = shard(dense, tmp_path / "dense")
    (source / "generation_config.json").write_text('{"eos_token_id": 1, "temperature": 0.25, "do_sample": true}')
    (source / "chat_template.jinja").write_text(tiny_models.CHATML)
    out = upcycle(source, tmp_path / "moe").folder
    chat = [{"role": "user", "content": "hello"}]
    old, new = AutoTokenizer.from_pretrained(dense), AutoTokenizer.from_pretrained(out)
    assert new.apply_chat_template(chat) == old.apply_chat_template(chat)
    assert AutoModelForCausalLM.from_pretrained(out).generation_config.temperature == 0.25


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"experts": 1}, "experts: 1 is not valid; expected at least 2"),
        ({"top_k": 0}, "top_k: 0 is not valid; expected 1 to 4"),
        ({"top_k": 5}, "top_k: 5 is not valid; expected 1 to 4"),
        ({"router_std": 0.0}, "router_std: 0.0 is not valid; expected above 0"),
        ({"router_std": float("nan")}, "router_std: nan is not valid"),
        ({"expert_noise": -0.1}, "expert_noise: -0.1 is not valid; expected 0 to 1"),
    ],
)
def test_bad_arguments_are_named(dense: Path, tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        upcycle(dense, tmp_path / "moe", **arguments)
    assert message in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_an_existing_folder_does_not_change(dense: Path, tmp_path: Path) -> None:
    (tmp_path / "note").write_text("mine")
    with pytest.raises(InvalidInput, match=r"out: .* a folder that does not exist yet"):
        upcycle(dense, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["note"]


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("granitemoe", "a 'granitemoe' model can't be upcycled; expected llama, mistral, qwen3"),
        ("mixtral", "a 'mixtral' model can't be upcycled"),
        ("biased attention", "has attention_bias, which a mixtral model does not support"),
        ("biased mlp", "has mlp_bias, which a mixtral model does not support"),
        ("missing tensor", "lacks 1 tensor(s) for a llama model: model.layers.1.mlp.up_proj.weight"),
        ("extra tensor", "has unexpected 1 tensor(s) for a llama model: model.layers.1.mlp.extra.weight"),
        ("no weights", "has no model.safetensors and no index of shards"),
        ("no config", "has no config.json, so it is not a Hugging Face model folder"),
        ("no folder", "is neither a folder nor a hub id"),
        ("unknown hub id", "is not a folder, and it can't be downloaded from the hub"),
    ],
)
def test_sources_that_cant_be_upcycled_say_why(
    case: str, message: str, dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source: str | Path = broken(case, dense, tmp_path / "source", monkeypatch)
    with pytest.raises(ModelError) as caught:
        upcycle(source, tmp_path / "moe")
    assert message in str(caught.value)
    assert not [path for path in tmp_path.iterdir() if path.name != "source"]


def broken(case: str, dense: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> str | Path:
    if case in tiny_models.MOE:
        return tiny_models.build(case, folder)
    if case.startswith("biased"):
        return tiny_models.build(
            "llama", folder, **{"attention_bias" if case == "biased attention" else "mlp_bias": True}
        )
    if case == "no folder":
        return folder / "not" / "there"
    if case == "unknown hub id":
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        return "nobody/no-such-model"
    folder.mkdir()
    if case == "no config":
        return folder
    (folder / "config.json").write_bytes((dense / "config.json").read_bytes())
    tensors = load_file(dense / "model.safetensors")
    if case == "missing tensor":
        del tensors["model.layers.1.mlp.up_proj.weight"]
    if case == "extra tensor":
        tensors["model.layers.1.mlp.extra.weight"] = torch.zeros(1)
    if case != "no weights":
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_a_failure_leaves_nothing(dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(module, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        upcycle(dense, tmp_path / "moe")
    assert not list(tmp_path.iterdir())


def test_command_line(dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "moe"
    assert main([str(dense), str(out), "--experts", "3", "--top-k", "1", "--seed", "9"]) == 0
    assert json.loads((out / "config.json").read_text())["num_local_experts"] == 3
    report = module.upcycle(dense, tmp_path / "again", experts=3, top_k=1, seed=9)
    printed = capsys.readouterr().out
    assert f"{report.total:,} in total, {report.active:,} active per token" in printed
    assert (out / "model.safetensors").read_bytes() == (report.folder / "model.safetensors").read_bytes()

    assert main([str(dense), str(out)]) == 1
    assert "upcycle: out: " in capsys.readouterr().err
