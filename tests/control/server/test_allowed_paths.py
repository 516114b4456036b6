"""Tests which folders a job may read and write, inside and outside the roots, and through links."""

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from llama_stack_provider_moe.control.server.allowed_paths import (
    resolve_adapter_folder,
    resolve_checkpoint_dir,
    resolve_model,
)
from llama_stack_provider_moe.errors import Conflict, Forbidden, InvalidInput, MoeError, NotFound
from llama_stack_provider_moe.spec.server_config import ModelsConfig, ProviderConfig

CAUSAL = {"model_type": "granitemoe", "architectures": ["GraniteMoeForCausalLM"]}


@pytest.fixture
def config(tmp_path: Path) -> ProviderConfig:
    made = ProviderConfig(state_dir=tmp_path / "state", allowed_roots=[tmp_path / "shared"])
    for folder in (made.models_dir, made.jobs_dir, tmp_path / "shared", tmp_path / "outside"):
        folder.mkdir(parents=True)
    return made


def model_at(folder: Path, config: dict[str, Any] = CAUSAL, files: tuple[str, ...] = ("model.safetensors",)) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    for name in (*files, "tokenizer.json"):
        (folder / name).write_bytes(b"{}")
    return folder


def nobody(_job: str) -> None:
    raise NotFound("not your job")


def resolve(model: str | Path, config: ProviderConfig, may_use_job: Any = nobody) -> str:
    return resolve_model(str(model), "model", config, may_use_job)


def test_hub_ids_stay_as_they_are(config: ProviderConfig) -> None:
    for name in ("gpt2", "ibm-granite/granite-3.1-3b-a800m-instruct", "Qwen/Qwen3-30B-A3B"):
        assert resolve(name, config) == name


def allowing(config: ProviderConfig, *patterns: str) -> ProviderConfig:
    return config.model_copy(update={"models": ModelsConfig(allowed=list(patterns))})


@pytest.mark.parametrize(
    ("patterns", "model", "allowed"),
    [
        (["ibm-granite/*"], "ibm-granite/granite-3.1-3b-a800m-instruct", True),
        (["ibm-granite/*"], "ibm-granite-evil/granite", False),
        (["ibm-granite/*"], "evil/ibm-granite", False),
        (["ibm*"], "ibm-evil/granite", False),  # a * does not match a /
        (["*"], "gpt2", True),
        (["*"], "owner/name", False),
        (["*/*"], "owner/name", True),
        (["Qwen/Qwen3-30B-A3B"], "Qwen/Qwen3-30B-A3B", True),
        (["Qwen/Qwen3-30B-A3B"], "Qwen/Qwen3-30B-A3B-evil", False),
        (["Qwen/Qwen3-30B-A3B"], "qwen/qwen3-30b-a3b", False),
        (["a/b", "c/granite-3.?-*"], "c/granite-3.1-3b", True),
        (["a/b", "c/granite-3.?-*"], "c/granite-3.11-3b", False),
        ([], "gpt2", False),
    ],
)
def test_which_hub_ids_a_server_allows(patterns: list[str], model: str, allowed: bool, config: ProviderConfig) -> None:
    config = allowing(config, *patterns)
    if allowed:
        assert resolve(model, config) == model
        return
    with pytest.raises(InvalidInput) as caught:
        resolve_model(model, "finetuned_model", config, nobody)
    assert str(caught.value).startswith(f"finetuned_model: {model!r} is not valid; expected ")
    assert "`models.allowed`" in str(caught.value)
    assert all(repr(pattern) in str(caught.value) for pattern in patterns), "the error lists the allowed patterns"
    assert str(config.state_dir.parent) not in str(caught.value), "the error names no folder of the machine"


def test_folders_are_not_the_lists_matter(config: ProviderConfig, tmp_path: Path) -> None:
    config = allowing(config)
    for folder in (config.models_dir / "own", tmp_path / "shared" / "m"):
        assert resolve(model_at(folder), config) == str(folder)
    assert resolve("own", config) == str(config.models_dir / "own")
    with pytest.raises(Forbidden):
        resolve(model_at(tmp_path / "outside" / "m"), allowing(config, "*/*"))


@pytest.mark.parametrize("pattern", ["", "/models/m", "a/b/c", "a/[bc]", "own er/*", "~/m", "a/", "https://hub/a"])
def test_a_list_accepts_only_hub_ids(pattern: str) -> None:
    with pytest.raises(ValidationError, match="is not a hub id; expected owner/name"):
        ModelsConfig(allowed=[pattern])


def test_a_long_list_is_cut(config: ProviderConfig) -> None:
    with pytest.raises(InvalidInput) as caught:
        resolve("other/m", allowing(config, *(f"owner/model-{number:04}" for number in range(1000))))
    assert len(str(caught.value)) < 700


def test_a_folder_in_models_takes_precedence_over_the_hub(config: ProviderConfig) -> None:
    own = model_at(config.models_dir / "smollm-moe")
    assert resolve("smollm-moe", config) == str(own)
    assert resolve(own, config) == str(own)
    (config.models_dir / "alias").symlink_to(own)
    assert resolve("alias", config) == str(own)


@pytest.mark.parametrize(
    "name", ["../secret", "a/b/c", "", ".", "./x", "a b", "x/../y", "owner/", "-x", "a\0b", "x" * 300]
)
def test_what_is_neither_a_hub_id_nor_a_folder(name: str, config: ProviderConfig) -> None:
    with pytest.raises(InvalidInput, match="model"):
        resolve(name, config)


def test_folders_outside_the_roots(config: ProviderConfig, tmp_path: Path) -> None:
    outside = model_at(tmp_path / "outside" / "m")
    inside = model_at(tmp_path / "shared" / "m")
    assert resolve(inside, config) == str(inside)
    (config.models_dir / "link").symlink_to(outside)
    for path in (outside, inside / ".." / ".." / "outside" / "m", config.models_dir / "link", "/etc", "~/x"):
        with pytest.raises(Forbidden, match="outside the folders that jobs may read models from"):
            resolve(path, config)
    with pytest.raises(Forbidden):
        resolve("link", config)
    (inside / "model-2.safetensors").symlink_to(outside / "model.safetensors")
    with pytest.raises(Forbidden, match=r"'model-2\.safetensors'"):
        resolve(inside, config)


def test_a_folder_outside_the_roots_looks_like_a_missing_one(config: ProviderConfig, tmp_path: Path) -> None:
    texts = []
    for name in ("m", "not-there"):
        with pytest.raises(Forbidden) as caught:
            resolve(tmp_path / "outside" / name, config)
        texts.append(str(caught.value).replace(f"/{name}'", "/?'"))
    assert texts[0] == texts[1]


def test_models_of_jobs_are_their_owners(config: ProviderConfig) -> None:
    mine = model_at(config.jobs_dir / "mine" / "artifacts" / "merged")
    theirs = model_at(config.jobs_dir / "theirs" / "artifacts" / "merged")
    asked: list[str] = []

    def may_use_job(name: str) -> None:
        asked.append(name)
        if name != "mine":
            raise NotFound(f"job {name!r} does not exist")

    assert resolve(mine, config, may_use_job) == str(mine)
    with pytest.raises(NotFound):
        resolve(theirs, config, may_use_job)
    assert asked == ["mine", "theirs"]
    (mine / "config.json").unlink()
    (mine / "config.json").symlink_to(theirs / "config.json")
    with pytest.raises(Forbidden):
        resolve(mine, config, may_use_job)


def test_no_such_folder(config: ProviderConfig, tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="there is no folder"):
        resolve(tmp_path / "shared" / "gone", config)


@pytest.mark.parametrize(
    ("content", "files", "text"),
    [
        ({"model_type": "bert", "architectures": ["BertForMaskedLM"]}, ("model.safetensors",), "'bert' with architec"),
        ({"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}, ("model.safetensors",), "'t5'"),
        ({}, ("model.safetensors",), "a causal language model"),
        (CAUSAL, (), "this one has none"),
        (CAUSAL, ("pytorch_model.bin",), "pytorch_model.bin may run code when loaded"),
        (CAUSAL, ("model.safetensors", "adapter_config.json"), "adapter.init_from, or export it merged"),
        ([], ("model.safetensors",), "config.json; this one holds [], not an object"),
    ],
)
def test_folders_without_a_usable_model(
    content: dict[str, Any], files: tuple[str, ...], text: str, config: ProviderConfig
) -> None:
    folder = model_at(config.models_dir / "m", content, files)
    with pytest.raises(InvalidInput) as caught:
        resolve(folder, config)
    assert text in str(caught.value)


def test_causal_language_models_are_accepted(config: ProviderConfig) -> None:
    for index, content in enumerate(
        [
            CAUSAL,
            {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]},
            {"model_type": "llama4", "architectures": ["Llama4ForConditionalGeneration"], "text_config": {}},
        ]
    ):
        folder = model_at(config.models_dir / f"m{index}", content)
        assert resolve(folder, config) == str(folder)


def test_all_shards_must_be_there(config: ProviderConfig) -> None:
    shards = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    folder = model_at(config.models_dir / "m", CAUSAL, shards)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": dict(zip("ab", shards, strict=True))})
    )
    assert resolve(folder, config) == str(folder)
    (folder / shards[1]).unlink()
    with pytest.raises(InvalidInput, match=r"model-00002-of-00002\.safetensors is missing"):
        resolve(folder, config)
    (folder / "model.safetensors.index.json").write_text("{")
    with pytest.raises(InvalidInput, match=r"readable model\.safetensors\.index\.json"):
        resolve(folder, config)


def test_a_model_needs_its_tokenizer(config: ProviderConfig) -> None:
    folder = model_at(config.models_dir / "m")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(InvalidInput, match="tokenizer"):
        resolve(folder, config)


def checkpoints(directory: str | Path, config: ProviderConfig, job: str = "job") -> str:
    return resolve_checkpoint_dir(str(directory), job, "checkpoint_dir", config)


def test_checkpoints_stay_under_the_roots(config: ProviderConfig, tmp_path: Path) -> None:
    base = config.state_dir / "checkpoints"
    assert checkpoints("runs/a", config) == str(base / "runs" / "a")
    assert checkpoints(base, config) == str(base)
    assert checkpoints(tmp_path / "shared" / "new", config) == str(tmp_path / "shared" / "new")
    assert not base.exists(), "a check creates nothing"
    (tmp_path / "shared" / "link").symlink_to(tmp_path / "outside")
    for outside in (
        tmp_path / "outside", "../jobs/other", config.jobs_dir, "/", "~", "../checkpoints2",
        tmp_path / "shared" / ".." / "outside", tmp_path / "shared" / "link" / "x",
    ):  # fmt: skip
        with pytest.raises(Forbidden, match="outside the folders that jobs may write checkpoints to"):
            checkpoints(outside, config)


def test_obstacles_to_a_checkpoint_folder(config: ProviderConfig, tmp_path: Path) -> None:
    (tmp_path / "shared" / "file").write_text("x")
    with pytest.raises(InvalidInput, match="can't write to"):
        checkpoints(tmp_path / "shared" / "file" / "deeper", config)
    own = tmp_path / "shared" / "job"
    own.symlink_to(tmp_path / "outside")
    with pytest.raises(Forbidden, match="is a link"):
        checkpoints(tmp_path / "shared", config)
    own.unlink()
    own.mkdir()
    assert checkpoints(tmp_path / "shared", config) == str(tmp_path / "shared")
    (own / "epoch-1").mkdir()
    with pytest.raises(Conflict, match="not empty"):
        checkpoints(tmp_path / "shared", config)
    for name in ("a\0b", "x" * 300):
        with pytest.raises(MoeError) as caught:
            checkpoints(name, config)
        assert caught.value.status == 400, name


@pytest.mark.parametrize("holder", ["folder", "root"])
@pytest.mark.parametrize("adapter", [True, False])
def test_a_circular_link_is_named(holder: str, adapter: bool, config: ProviderConfig, tmp_path: Path) -> None:
    (tmp_path / "shared").rmdir()
    folder = model_at(tmp_path / "shared" / "m" if holder == "folder" else tmp_path / "shared")
    (folder / "me").symlink_to("me")
    ask = resolve_adapter_folder if adapter else resolve_model
    with pytest.raises(InvalidInput, match=r"link 'me' is circular"):
        ask(str(folder), "adapter.init_from" if adapter else "model", config, nobody)
    with pytest.raises(InvalidInput, match="its links lead in a circle"):
        resolve(folder / "me", config)
    with pytest.raises(InvalidInput, match="its links lead in a circle"):
        resolve_checkpoint_dir(str(folder / "me"), "job", "checkpoint_dir", config)


def test_a_circular_folder_of_the_server_contains_nothing(config: ProviderConfig, tmp_path: Path) -> None:
    config.models_dir.rmdir()
    config.models_dir.symlink_to(config.models_dir)
    inside = model_at(tmp_path / "shared" / "m")
    assert resolve(inside, config) == str(inside)
    with pytest.raises(ValidationError, match="its links lead in a circle"):
        ProviderConfig(state_dir=config.models_dir)


def test_a_file_in_the_way_of_checkpoints(config: ProviderConfig) -> None:
    base = config.state_dir / "checkpoints" / "mine"
    base.mkdir(parents=True)
    (base / "job").write_text("")
    with pytest.raises(Conflict, match="exists and is not empty"):
        resolve_checkpoint_dir("mine", "job", "checkpoint_dir", config)
