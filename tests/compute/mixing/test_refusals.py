"""What can't be mixed is named before anything is written."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llama_stack_provider_moe.compute.export.tensors import TensorEntry
from llama_stack_provider_moe.compute.mixing import mix as module
from llama_stack_provider_moe.compute.mixing.mix import dry_run, mix
from llama_stack_provider_moe.compute.models.upcycle import upcycle
from llama_stack_provider_moe.errors import InvalidInput, ModelError, NoRoom
from tests.compute.mixing.branches import changed, dense, plan
from tests.support import tiny_models


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return dense("llama", tmp_path_factory.mktemp("refused") / "base")


def with_tensors(change: Callable[[dict[str, torch.Tensor]], object], base: Path, folder: Path) -> Path:
    changed(base, folder, 0.1)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def with_config(changes: dict[str, Any], base: Path, folder: Path) -> Path:
    changed(base, folder, 0.1)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


def other_tokenizer(base: Path, folder: Path) -> Path:
    changed(base, folder, 0.1)
    content = json.loads((folder / "tokenizer.json").read_text())
    content["added_tokens"].append({**content["added_tokens"][0], "id": 383, "content": "<|new|>"})
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder


def other_template(base: Path, folder: Path) -> Path:
    changed(base, folder, 0.1)
    (folder / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    return folder


def without(file: str, base: Path, folder: Path) -> Path:
    changed(base, folder, 0.1)
    (folder / file).unlink()
    return folder


CASES: dict[str, tuple[Callable[[Path, Path], Path], str]] = {
    "layers": (lambda _, to: dense("llama", to, num_hidden_layers=3), "num_hidden_layers 2, as `model` has; it has 3"),
    "width": (lambda _, to: dense("llama", to, intermediate_size=40), "a model with intermediate_size "),
    "family": (lambda _, to: dense("qwen3", to), "a model of type 'llama', as `model` is; its model_type is 'qwen3'"),
    "an adapter": (lambda base, to: without("model.safetensors", base, to), "has no model.safetensors and no model"),
    "not a model": (lambda base, to: without("config.json", base, to), "has no config.json"),
    "rope": (
        lambda base, to: with_config({"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}, base, to),
        "a model with rope_parameters ",
    ),
    "lacks": (
        lambda base, to: with_tensors(lambda found: found.pop("model.norm.weight"), base, to),
        "a model with the tensors of `model`; it lacks 1: model.norm.weight",
    ),
    "has more": (
        lambda base, to: with_tensors(lambda found: found.update(extra=torch.zeros(1)), base, to),
        "a model with the tensors of `model`; it also has 1: extra",
    ),
    "vocabulary": (
        lambda base, to: with_tensors(
            lambda found: found.update({"lm_head.weight": torch.zeros(385, 32)}), base, to
        ),
        "tensors of the shapes of `model`: lm_head.weight has (385, 32) for (384, 32)",
    ),
    "integers": (
        lambda base, to: with_tensors(
            lambda found: found.update({"model.norm.weight": torch.ones(32, dtype=torch.int8)}), base, to
        ),
        "model.norm.weight is torch.int8; expected 16 or 32 bits",
    ),
    "tokens": (other_tokenizer, "a model with the tokenizer of `model`; its tokens differ"),
    "no tokenizer": (
        lambda base, to: without("tokenizer.json", base, to), "a folder with the tokenizer of `model`; it has none",
    ),
    "template": (other_template, "a model with the chat template of branch 'first', as the result has one"),
    "another base": (
        lambda _, to: dense("llama", to, seed=99), "a model that was trained from `model`; the cosine of their",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_branch_that_does_not_fit(case: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make, words = CASES[case]
    branches = {"first": changed(base, tmp_path / "first", 0.1), "second": make(base, tmp_path / "second")}
    if case != "another base":  # that alone needs weights

        def read(*_: object) -> None:
            raise AssertionError("a weight was read")

        monkeypatch.setattr(TensorEntry, "read", read)
    for work in (lambda: dry_run(str(base), plan("btx", branches)),
                 lambda: mix(str(base), plan("btx", branches), tmp_path / "out")):  # fmt: skip
        with pytest.raises((InvalidInput, ModelError)) as caught:
            work()
        assert words in str(caught.value)
        assert str(caught.value).startswith("branches.1.model: ")
    assert not [path for path in tmp_path.iterdir() if path.name not in branches], "nothing was written"


def test_a_refusal_shows_models_as_their_owner_named_them(base: Path, tmp_path: Path) -> None:
    (tmp_path / "jobs").mkdir()
    own = tmp_path / "models" / "own"
    left = tmp_path / "jobs" / "other" / "artifacts" / "model"
    for folder in (own, left):
        folder.parent.mkdir(parents=True)
        dense("llama", folder, seed=1)
    fits = changed(base, tmp_path / "fits", 0.1)
    for folder, name in ((own, "own"), (left, "other/model")):
        with pytest.raises(InvalidInput) as caught:
            dry_run(str(base), plan("btx", {"fits": fits, "second": folder}))
        assert str(caught.value).startswith(f"branches.1.model: {name!r} is not valid; expected a model that was train")


def test_bases_that_do_not_fit(base: Path, tmp_path: Path) -> None:
    branches = {name: changed(base, tmp_path / name, 0.1) for name in "ab"}
    moe = tiny_models.build("granitemoe", tmp_path / "granite")
    four = upcycle(base, tmp_path / "four", experts=4).folder
    for folder, method, words in (
        (moe, "btx", "model: a 'granitemoe' model can't be upcycled; expected llama, mistral, qwen3"),
        (moe, "bar", "a model of type mixtral, qwen3_moe, which `moe-train upcycle` makes, with method 'bar'"),
        (
            four,
            "bar",
            "a model of 2 experts, an anchor and one that trains (`moe-train upcycle --experts 2`); it has 4",
        ),
        (tmp_path / "none", "btx", "is neither a folder nor a hub id"),
    ):
        with pytest.raises((InvalidInput, ModelError)) as caught:
            mix(str(folder), plan(method, branches), tmp_path / "out")
        assert words in str(caught.value)
        assert str(caught.value).startswith("model: ")


def test_an_anchor_that_trained(base: Path, tmp_path: Path) -> None:
    pair = upcycle(base, tmp_path / "pair", experts=2).folder
    branches = {"a": changed(pair, tmp_path / "a", 0.1, "experts.1."), "b": changed(pair, tmp_path / "b", 0.1)}
    with pytest.raises(InvalidInput, match=r"branches.1.model: .* expected a model with the first expert of `model`"):
        mix(str(pair), plan("bar", branches), tmp_path / "out")


def test_a_folder_that_exists_stays(base: Path, tmp_path: Path) -> None:
    branches = {name: changed(base, tmp_path / name, 0.1) for name in "ab"}
    (tmp_path / "out").mkdir()
    with pytest.raises(InvalidInput, match=r"out: .* a folder that does not exist yet"):
        mix(str(base), plan("btx", branches), tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_numbers_that_are_not_finite_and_full_disks_leave_nothing(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(name: str) -> Callable[[dict[str, torch.Tensor]], None]:
        def change(tensors: dict[str, torch.Tensor]) -> None:
            tensors[name].view(-1)[0] = torch.inf

        return change

    for name, words in (
        ("model.layers.1.mlp.up_proj.weight", r"branches\.1\.model: .*up_proj.weight in .* not finite"),
        ("model.norm.weight", r"model: model\.norm\.weight is not finite in the mix"),
    ):
        b = with_tensors(broken(name), base, tmp_path / "b")
        with pytest.raises(ModelError, match=words):
            mix(str(base), plan("btx", {"a": changed(base, tmp_path / "a", 0.1), "b": b}), tmp_path / "out")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]
        shutil.rmtree(tmp_path / "a")
        shutil.rmtree(tmp_path / "b")

    def full(*_: object) -> None:
        raise NoRoom("out: no room")

    changed(base, tmp_path / "a", 0.1)
    monkeypatch.setattr(module, "check_room", full)
    with pytest.raises(NoRoom):
        mix(str(base), plan("btx", {"a": tmp_path / "a", "c": tmp_path / "a"}), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_top_1_is_told_to_train_no_router(base: Path, tmp_path: Path) -> None:
    branches = {name: changed(base, tmp_path / name, 0.1) for name in "ab"}
    assert dry_run(str(base), plan("btx", branches)).warnings == []
    (warning,) = dry_run(str(base), plan("btx", branches, top_k=1)).warnings
    assert warning.startswith("top_k is 1")
