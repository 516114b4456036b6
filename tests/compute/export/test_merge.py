"""A merge on disk: logits of the adapted model, every tensor once, bounded memory, and all or nothing."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks import merge as synthetic
from llama_stack_provider_moe.compute.export import merge as merging
from llama_stack_provider_moe.compute.export.merge import main, merge, shard_size
from llama_stack_provider_moe.compute.export.tensors import read_model
from llama_stack_provider_moe.compute.moe.derive import find_layout
from llama_stack_provider_moe.compute.moe.steering import ROUTER_BIAS
from llama_stack_provider_moe.compute.train import checkpoints
from llama_stack_provider_moe.errors import AdapterError, InvalidInput, NoRoom
from llama_stack_provider_moe.jobdir.events import Started
from llama_stack_provider_moe.jobdir.folder import JobFolder, Manifest, Metrics
from llama_stack_provider_moe.spec import JOB_SPEC, Adapter
from tests.support import tiny_models
from tests.support.export_support import EVERYTHING, adapted, by_peft, gap, logits, tensors

# Measured over all families, with logits of about 2: at most 6.6e-6, which is what PEFT's merge in memory has too, and
# weights that are bitwise its own; a scale that is no power of two may differ in the last bit.
LOGITS_TOLERANCE, WEIGHTS_TOLERANCE = 1e-5, 1e-6


def assert_equal_to_peft(base: Path, adapter: Path, out: Path, folder: Path) -> None:
    """The laws: PEFT's logits, its in-memory merge's weights under the same names, and something did change."""
    model = by_peft(base, adapter)
    plain, loading = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(loading.values()), loading
    expected = logits(model)
    assert gap(logits(plain.eval()), expected) <= LOGITS_TOLERANCE
    with model.disable_adapter():
        assert gap(logits(model), expected) > 1e-3
    checkpoints.merge(model).save_pretrained(folder / "in_memory")
    by_torch, ours = tensors(folder / "in_memory"), tensors(out)
    assert set(ours) == set(by_torch) == set(tensors(base))
    for name, tensor in ours.items():
        assert tensor.dtype == by_torch[name].dtype
        assert gap(tensor, by_torch[name]) <= WEIGHTS_TOLERANCE, name


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_every_family(family: str, tmp_path: Path) -> None:
    base = tiny_models.build(family, tmp_path / "base")
    moe = {} if family in tiny_models.DENSE else {"train_router": True}
    adapter = adapted(base, tmp_path / "adapter", EVERYTHING, **moe)
    report = merge(base, adapter, tmp_path / "out")
    assert_equal_to_peft(base, adapter, tmp_path / "out", tmp_path)
    # What is not adapted is the base's, bit by bit; every other tensor moved.
    before, after = tensors(base), tensors(tmp_path / "out")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert len(moved) == report.merged > 0
    assert (report.merged + report.copied, report.replaced) == (len(before), 0)
    assert 2 * sum(report.adapted.values()) == report.adapter_tensors


@pytest.mark.parametrize(
    ("family", "adapter", "moe"),
    [
        ("mixtral", Adapter(rank=2, alpha=4, plan="trunk"), {}),
        ("qwen2_moe", Adapter(rank=2, alpha=4, plan="all_experts", use_rslora=True, dropout=0.1), {}),
        ("granitemoe", Adapter(rank=3, alpha=4, lora_attn_modules=[], expert_modules=["down_proj"]), {}),
        ("gpt_oss", Adapter(rank=4, alpha=64, lora_attn_modules=[], apply_lora_to_mlp=False), {"train_router": True}),
        ("qwen3_moe", Adapter(rank=4, alpha=4, router_rank=1, alphas={"router": 8}), {"train_router": True}),
    ],
)  # fmt: skip
def test_plans(family: str, adapter: Adapter, moe: dict[str, Any], tmp_path: Path) -> None:
    base = tiny_models.build(family, tmp_path / "base")
    saved = adapted(base, tmp_path / "adapter", adapter, **moe)
    merge(base, saved, tmp_path / "out")
    assert_equal_to_peft(base, saved, tmp_path / "out", tmp_path)


@pytest.mark.parametrize("family", ["granitemoe", "mixtral", "llama4_text", "gpt_oss"])
def test_unequal_ranks_do_not_change_other_experts(family: str, tmp_path: Path) -> None:
    """More than ten experts: on disk 10 sorts before 2."""
    base = tiny_models.build(family, tmp_path / "base", num_local_experts=12)
    layer = "0" if family != "llama4_text" else "1"
    rules = [{"layers": layer, "experts": {"2": 3, "10-11": 1}}]
    saved = adapted(base, tmp_path / "adapter", Adapter(alpha=4, plan="per_expert", lora_attn_modules=[], rules=rules))
    merge(base, saved, tmp_path / "out")
    assert_equal_to_peft(base, saved, tmp_path / "out", tmp_path)
    before, after = (AutoModelForCausalLM.from_pretrained(folder) for folder in (base, tmp_path / "out"))
    layout = find_layout(before)
    assert layout is not None
    for index, experts in layout.experts(before).items():
        for name in (layout.gate_up, layout.down):
            moved = (experts.get_parameter(name) != layout.experts(after)[index].get_parameter(name)).flatten(1).any(1)
            assert moved.nonzero().flatten().tolist() == ([2, 10, 11] if str(index) == layer else []), (index, name)


def test_shards_do_not_matter_and_are_indexed(tmp_path: Path) -> None:
    base = tiny_models.build("mixtral", tmp_path / "base")
    many = tmp_path / "many"
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(many, max_shard_size="20KB")
    assert len(list(many.glob("*.safetensors"))) > 5
    saved = adapted(base, tmp_path / "adapter", EVERYTHING)
    told: list[str] = []
    merge(base, saved, tmp_path / "one")
    merge(many, saved, tmp_path / "out", shard_bytes=30_000, say=told.append)
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) == len(told) > 3
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    held: dict[str, str] = {}
    for file in files:
        with safe_open(tmp_path / "out" / file, framework="pt") as opened:
            assert opened.metadata() == {"format": "pt"}
            held |= dict.fromkeys(opened.keys(), file)
            sizes = [opened.get_tensor(name).nbytes for name in opened.keys()]  # noqa: SIM118  # no mapping
        assert sum(sizes) <= 30_000 or len(sizes) == 1
    one, out = tensors(tmp_path / "one"), tensors(tmp_path / "out")
    assert index["weight_map"] == held
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in out.values())
    assert index["metadata"]["total_parameters"] == sum(tensor.numel() for tensor in out.values())
    assert not (tmp_path / "one" / "model.safetensors.index.json").exists()
    assert one.keys() == out.keys()
    assert all(torch.equal(one[name], out[name]) for name in one)


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_dtype_is_rounded_once_and_vectors_keep_theirs(dtype: str, tmp_path: Path) -> None:
    base = tiny_models.build("glm4_moe", tmp_path / "base")
    saved = adapted(base, tmp_path / "adapter", EVERYTHING)
    merge(base, saved, tmp_path / "exact")
    merge(base, saved, tmp_path / "out", dtype=dtype)
    exact, out = tensors(tmp_path / "exact"), tensors(tmp_path / "out")
    wanted = merging.DTYPES[dtype]
    for name, tensor in out.items():
        assert torch.equal(tensor, exact[name].to(wanted if tensor.dim() > 1 else torch.float32)), name
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == str(wanted).removeprefix("torch.")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == wanted


def test_a_base_of_mixed_dtypes_is_read_by_the_library(tmp_path: Path) -> None:
    """Numbers begin at multiples of their size, whatever lay before them."""
    base = tiny_models.build("granitemoe", tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    half = {name: tensor.half() if ".0." in name else tensor for name, tensor in weights.items()}
    save_file({**half, "a.spare": torch.arange(3, dtype=torch.uint8)}, base / "model.safetensors")
    saved = adapted(base, tmp_path / "adapter", EVERYTHING)
    merge(base, saved, tmp_path / "out")
    out = load_file(tmp_path / "out" / "model.safetensors")
    assert out["a.spare"].tolist() == [0, 1, 2]
    assert {name: tensor.dtype for name, tensor in out.items() if name != "a.spare"} == {
        name: tensor.dtype for name, tensor in half.items()
    }


@pytest.mark.parametrize("family", ["glm4_moe", "minimax_m2", "ernie4_5_moe"])
def test_moved_biases_of_routers_replace_the_bases(family: str, tmp_path: Path) -> None:
    base = tiny_models.build(family, tmp_path / "base")
    saved = adapted(base, tmp_path / "adapter", Adapter(rank=2))
    model = AutoModelForCausalLM.from_pretrained(base)
    layout = find_layout(model)
    assert layout is not None
    assert layout.bias_path is not None
    moved = {layout.path(i, layout.bias_path): torch.rand_like(bias) for i, bias in layout.biases(model).items()}
    save_file(moved, saved / ROUTER_BIAS)
    report = merge(base, saved, tmp_path / "out")
    assert report.replaced == len(moved) > 0
    after = layout.biases(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
    for layer, bias in after.items():
        assert torch.equal(bias, moved[layout.path(layer, layout.bias_path)])
    save_file({"model.layers.7.bias": torch.ones(4)}, saved / ROUTER_BIAS)
    with pytest.raises(AdapterError, match=r"bias model\.layers\.7\.bias \(4,\) has no place in this base"):
        merge(base, saved, tmp_path / "other")


def test_tied_embeddings(tmp_path: Path) -> None:
    base = tiny_models.build("llama", tmp_path / "base", tie_word_embeddings=True)
    saved = adapted(base, tmp_path / "adapter", Adapter(rank=2))
    merge(base, saved, tmp_path / "out")
    assert_equal_to_peft(base, saved, tmp_path / "out", tmp_path)
    # The head is the embeddings: merged into one it would change the other, or be overlooked when the model is loaded.
    untied = tiny_models.build("llama", tmp_path / "untied")
    head = adapted(untied, tmp_path / "head", EVERYTHING)
    with pytest.raises(AdapterError, match=r"LoRA on lm_head\.weight, which is tied"):
        merge(base, head, tmp_path / "other")


def test_files_beside_the_weights(tmp_path: Path) -> None:
    base = tiny_models.build("qwen3_moe", tmp_path / "base")
    (base / "LICENSE").write_text("terms")
    (base / "special_tokens_map.json").write_text("{}")
    saved = adapted(base, tmp_path / "adapter", Adapter(rank=2))
    template = saved / "chat_template.jinja"
    template.write_text(template.read_text() + "{# as trained #}")
    out = tmp_path / "out"
    merge(base, saved, out)
    assert {path.name for path in out.iterdir()} == {
        "model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
        "chat_template.jinja", "LICENSE", "README.md",
    }  # fmt: skip
    for name in ("config.json", "generation_config.json", "LICENSE"):
        assert (out / name).read_bytes() == (base / name).read_bytes()
    assert AutoTokenizer.from_pretrained(out).chat_template.endswith("{# as trained #}")
    card = (out / "README.md").read_text()
    assert "| Adapter | LoRA, rank 2, alpha 32 |" in card
    assert str(tmp_path) not in card
    assert "base_model" not in card
    assert not re.search("^license", card, re.MULTILINE)


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("mixtral")
    base = tiny_models.build("mixtral", folder / "base")
    return base, adapted(base, folder / "adapter", Adapter(rank=2))


def test_out_is_new_and_there_is_room(
    mixtral: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for out in (tmp_path / "folder", tmp_path / "link"):
        out.mkdir() if out.name == "folder" else out.symlink_to(tmp_path / "nowhere")
        with pytest.raises(InvalidInput, match="a folder that does not exist yet"):
            merge(*mixtral, out)
    (tmp_path / ".linked.merging").symlink_to(tmp_path / "folder")
    with pytest.raises(InvalidInput, match=r"\.linked\.merging is not a link"):
        merge(*mixtral, tmp_path / "linked")
    size = (mixtral[0] / "model.safetensors").stat().st_size
    monkeypatch.setattr(merging.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, size))
    with pytest.raises(NoRoom, match=rf"needs [\d,]+ bytes, and its disk has {size:,} free; nothing was written"):
        merge(*mixtral, tmp_path / "out")
    assert not list((tmp_path / "folder").iterdir())
    assert {path.name for path in tmp_path.iterdir()} == {"folder", "link", ".linked.merging"}


def test_the_card_describes_the_job(mixtral: tuple[Path, Path], tmp_path: Path) -> None:
    """Given the job's folder, its adapter, or one of its checkpoints; names of anybody's make no Markdown."""
    job = JobFolder(tmp_path / "job")
    body = {
        "recipe": "dpo", "model": "m", "data": {"dataset_id": "pairs", "validation_dataset_id": "held|out<b>"},
        "adapter": {"rank": 2},
    }  # fmt: skip
    for folder in (job.adapter, job.root / "checkpoints" / "epoch-1"):
        shutil.copytree(mixtral[1], folder)
    job.spec.write_text(JOB_SPEC.validate_python(body).model_dump_json())
    metrics = Metrics(epoch=1, train_loss=0.5, validation_loss=0.4321, perplexity=1.54)
    artifacts = [
        checkpoints.describe("j", "adapter", job.adapter, 2, 40),
        checkpoints.describe("j", "checkpoint", job.root / "checkpoints" / "epoch-1", 1, 20, metrics),
    ]
    job.manifest.write_text(
        Manifest(job_uuid="j", artifacts=artifacts, summary={"rewards/margins": 1.25}).model_dump_json()
    )
    job.resolved.write_text(
        '{"train_rows": 1200, "validation_rows": 60, "adapter": {"trainable_parameters": 5, "total_parameters": 1000}}'
    )
    started = [Started(pid=1, versions={"peft": version}).model_dump_json() for version in ("0.1", "0.2")]
    job.events.write_text("\n".join([*started, "torn"]))
    cards = {}
    for name, given in (("job", job.root), ("adapter", job.adapter), ("epoch", job.root / "checkpoints" / "epoch-1")):
        merge(mixtral[0], given, tmp_path / name / "out")
        cards[name] = (tmp_path / name / "out" / "README.md").read_text().splitlines()
    assert cards["job"] == cards["adapter"]
    common = {"| Recipe | dpo |", "| Data sets | pairs, held?out?b? |", "| rewards/margins | 1.25 |",
              "| Rows | 1,200 trained on; 60 held out |", "| Trained parameters | 5 of 1,000 |",
              "| Versions | peft 0.2 |", "| Optimiser | adamw, learning rate 0.0001 |"}  # fmt: skip
    assert common | {"| Trained | 2 epochs, 40 steps |"} <= set(cards["job"])
    assert common | {"| Held-out loss, perplexity | 0.4321, 1.5400 |"} <= set(cards["epoch"])
    shutil.rmtree(job.adapter)
    with pytest.raises(AdapterError, match="has no adapter"):
        merge(mixtral[0], job.root, tmp_path / "out")


KILLED = """
import os, signal, sys
from llama_stack_provider_moe.compute.export.merge import merge
merge(*sys.argv[1:4], shard_bytes=30_000, say=lambda line: os.kill(os.getpid(), signal.SIGKILL))
"""


def test_a_kill_leaves_no_half_folder_and_the_next_merge_is_whole(mixtral: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = subprocess.run([sys.executable, "-c", KILLED, *map(str, mixtral), str(out)], check=False, timeout=300)
    assert done.returncode == -9
    assert [path.name for path in tmp_path.iterdir()] == [".out.merging"]

    def stop(line: str) -> None:
        with pytest.raises(InvalidInput, match="no other merge is writing"):
            merge(*mixtral, out)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge(*mixtral, out, say=stop)
    assert list(tmp_path.iterdir()) == []
    report = merge(*mixtral, out)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert report.shards == 1
    assert not [path for path in out.iterdir() if "-of-" in path.name]


def test_memory_stays_near_the_largest_tensor(tmp_path: Path) -> None:
    """A checkpoint of 60 MB in several files; with what a process has anyhow taken off."""
    total = synthetic.write_all(tmp_path, synthetic.Shape(layers=3, hidden=1024, inner=1536, experts=2))
    assert total > 60e6
    found = synthetic.in_another_process(tmp_path)
    largest = max(entry.nbytes for entry in read_model(tmp_path / "full").values())
    assert largest < total / 15
    # A tensor as read, in fp32, and as written; and what allocator and libraries take beside it, whatever the size
    # (7 to 15 MB in all were measured; loading the files whole takes more than they are long).
    assert found["peak_bytes_above_start"] < 3 * largest + 8e6 < total / 3
    assert found["merged_tensors"] == 3 * (4 + 1 + 2 * 3)


def test_command_line(mixtral: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [str(mixtral[0]), str(mixtral[1]), str(tmp_path / "out")]
    assert main([*words, "--shard-size", "30KB", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["shards"] > 1
    assert report["bytes"] == sum(entry.nbytes for entry in read_model(tmp_path / "out").values())
    assert main(words) == 2
    assert "out: " in capsys.readouterr().err
    assert main([*words[:2], str(tmp_path / "new"), "--dtype", "int4"]) == 2
    assert "dtype: 'int4' is not valid; expected one of fp32, bf16, fp16" in capsys.readouterr().err
    assert main([words[0], str(tmp_path / "none"), str(tmp_path / "new")]) == 1
    assert "adapter: there is no folder" in capsys.readouterr().err


@pytest.mark.parametrize(("text", "expected"), [("5GB", 5 * 10**9), ("300 kb", None), ("300kb", 300_000), ("7", 7)])
def test_shard_size(text: str, expected: int | None) -> None:
    if expected is None:
        with pytest.raises(InvalidInput, match="--shard-size"):
            shard_size(text)
    else:
        assert shard_size(text) == expected
