"""`moe-train experts prune`, `merge`, `add` and `split`, as their processes run them."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from llama_stack_provider_moe.compute.surgery import add_command, merge_command, prune_command, split_command
from llama_stack_provider_moe.control.cli import local_checks
from llama_stack_provider_moe.errors import InvalidBody, InvalidInput
from llama_stack_provider_moe.spec.surgery_commands import (
    ADD_EXPERTS_COMMAND,
    MERGE_EXPERTS_COMMAND,
    PRUNE_COMMAND,
    SplitCommand,
    surgery_settings,
)
from tests.support import surgery_models, tiny_models
from tests.support.training_support import sft_rows


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return surgery_models.build("olmoe", tmp_path_factory.mktemp("commands") / "base")


@pytest.fixture
def rows(tmp_path: Path) -> str:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in sft_rows(6)))
    return str(file)


def test_a_dry_run_measures_and_writes_nothing(
    base: Path, rows: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "out")
    given = [str(base), "--keep", "6", "--rows", rows, "--dtype", "fp32", "--out", out]
    assert prune_command.main([*given, "--dry-run", "--json"]) == 0
    dry = json.loads(capsys.readouterr().out)
    assert dry["folder"] is None
    assert dry["loss"]["rows"] == 6
    assert not Path(out).exists()
    assert prune_command.main(given) == 0
    said = capsys.readouterr().out
    written = json.loads((Path(out) / "surgery.json").read_text())
    assert {**written, "folder": None} == dry
    assert "8 -> 6 experts in each of 2 layers, top-2" in said
    assert f"saved to {out}" in said


def test_mistakes_are_one_line(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert prune_command.main([str(base), "--drop", "0-6", "--out", str(tmp_path / "out")]) == 2
    assert "--drop: 7 is not valid; expected 1 to 6 experts to remove" in capsys.readouterr().err
    assert prune_command.main([str(base), "--drop", "0:1", "--out", str(tmp_path / "out")]) == 2
    assert "layer 1 is missing" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_dense_model_is_refused_as_other_mistakes_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dense = str(tiny_models.build("llama", tmp_path / "dense"))
    assert prune_command.main([dense, "--drop", "1", "--out", str(tmp_path / "out")]) == 2
    assert "experts prune: MODEL: 'llama' is a dense model; expected one with experts" in capsys.readouterr().err


def test_a_model_whose_files_lack_a_tensor_is_refused_as_one_that_is_dense(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only the plan of the new files shows it, after the model was found fit."""
    damaged = tmp_path / "damaged"
    shutil.copytree(base, damaged)
    (file,) = damaged.glob("*.safetensors")
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.gate.weight"]
    save_file(tensors, file)
    assert split_command.main([str(damaged), "--factor", "3", "--out", str(tmp_path / "out")]) == 2
    assert "experts split: MODEL: its files have no tensor for" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_split_writes_twins(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert split_command.main([str(base), "--factor", "3", "--out", str(tmp_path / "out")]) == 0
    assert "split" in capsys.readouterr().out
    layout = surgery_models.layout_of(surgery_models.load(tmp_path / "out"))
    assert (layout.num_experts, layout.top_k) == (24, 6)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"keep": 6}, "--rows: is missing; expected a file of rows"),
        ({"keep": 6, "drop": ["1"]}, "--keep: 6 is not valid with --drop"),
        ({}, "--keep: is missing; expected the number of experts to keep in each layer; or --drop"),
        ({"drop": ["1"], "by": "usage"}, "--by: 'usage' has no effect with --drop; expected it with --keep"),
        ({"keep": 0, "rows": "a"}, "--keep: 0 is not valid; expected >= 1"),
        ({"drop": ["1", "2"]}, "--drop: '2' is not valid; expected each layer once"),
        ({"drop": ["x:1"]}, "--drop: 'x' is not the number of a layer"),
        ({"drop": ["1"], "rows": "nosuch.jsonl"}, "--rows: 'nosuch.jsonl' is not valid"),
        ({"drop": ["1"], "out": "."}, "--out: '.' is not valid; expected a folder that does not exist yet"),
        ({"drop": ["1"], "model": "./nosuch"}, "MODEL: './nosuch' is not valid"),
    ],
)
def test_the_command_line_is_checked_without_torch(base: Path, given: dict[str, object], expected: str) -> None:
    command = PRUNE_COMMAND.model_validate({"model": str(base), "out": "nosuch-out", **given})
    with pytest.raises(InvalidInput) as caught:
        local_checks.surgery(command)
    assert expected in str(caught.value)


def test_split_needs_a_new_folder(base: Path) -> None:
    with pytest.raises(InvalidInput, match="expected a folder that does not exist yet"):
        local_checks.surgery(SplitCommand.model_validate({"model": str(base), "out": "."}))


def test_merge_says_how_and_what_it_costs(
    base: Path, rows: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    given = [str(base), "--keep", "6", "--by", "router_logits", "--align", "off", "--rows", rows, "--dtype", "fp32"]
    assert merge_command.main([*given, "--out", str(out)]) == 0
    said = capsys.readouterr()
    assert "by router logits (M-SMoE): 8 -> 6 experts in each of 2 layers, top-2" in said.out
    assert "KL " in said.out
    assert "greatest change of a logit" in said.out
    assert "warning: the router has one row for each cluster" in said.out
    assert "18 of 18 passes of rows" in said.err
    written = json.loads((out / "surgery.json").read_text())
    assert (written["action"], written["by"]) == ("merge", "router_logits")
    assert merge_command.main([str(base), "--keep", "6", "--by", "weights", "--out", str(out), "--dry-run"]) == 0
    assert "nothing was written" in capsys.readouterr().out


def test_add_measures_both_files(base: Path, rows: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    general = tmp_path / "general.jsonl"
    general.write_text("".join(json.dumps(row) + "\n" for row in sft_rows(4, first=50)))
    out = tmp_path / "out"
    given = ["--count", "2", "--router", "domain", "--noise", "0.1", "--seed", "3", "--dtype", "fp32"]
    files = ["--rows", rows, "--general-rows", str(general)]
    assert add_command.main([str(base), *given, *files, "--out", str(out)]) == 0
    said = capsys.readouterr()
    assert "with new experts: 8 -> 10 experts in each of 2 layers, top-2" in said.out
    assert "loss on 4 general rows" in said.out
    assert "new experts that a token of the rows chooses" in said.out
    assert surgery_models.layout_of(surgery_models.load(out)).num_experts == 10


def test_add_takes_the_mlps_of_a_folder(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    donor = tiny_models.build("llama", tmp_path / "donor", intermediate_size=24)
    given = [str(base), "--mlp-from", str(donor), "--router", "zero", "--out", str(tmp_path / "out")]
    assert add_command.main(given) == 0
    capsys.readouterr()
    assert add_command.main([str(base), "--closed", "--out", str(tmp_path / "other")]) == 2
    assert "--closed: True is not valid; expected false, because Olmoe chooses by logits alone" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("kind", "given", "expected"),
    [
        (MERGE_EXPERTS_COMMAND, {}, "--keep: is missing; expected the number of experts"),
        (
            MERGE_EXPERTS_COMMAND,
            {"keep": 6},
            "--rows: is missing; expected a file of rows, because --by outputs",
        ),
        (MERGE_EXPERTS_COMMAND, {"keep": 6, "by": "weights", "out": "."}, "--out: '.' is not valid"),
        (ADD_EXPERTS_COMMAND, {"router": "domain"}, "--rows: is missing; expected a file of rows"),
        (ADD_EXPERTS_COMMAND, {"router": "domain", "rows": "a"}, "--general-rows: is missing; expected"),
        (ADD_EXPERTS_COMMAND, {"general_rows": "a"}, "--general-rows: 'a' is not valid; expected --rows beside it"),
        (ADD_EXPERTS_COMMAND, {"mlp_from": "./nosuch"}, "--mlp-from: './nosuch' is not valid"),
        (ADD_EXPERTS_COMMAND, {"count": 0}, "--count: 0 is not valid; expected >= 1"),
        (
            ADD_EXPERTS_COMMAND,
            {"router": "closed"},
            "--router: 'closed' is not valid; expected 'copy', 'domain' or 'zero'",
        ),
        (ADD_EXPERTS_COMMAND, {"seed": 3}, "--seed: 3 has no effect without --noise; expected none"),
        (ADD_EXPERTS_COMMAND, {"batch_size": 0}, "--batch-size: 0 is not valid; expected >= 1"),
    ],
)
def test_other_command_lines_are_checked_without_torch(
    base: Path, kind: Any, given: dict[str, object], expected: str
) -> None:
    command = kind.model_validate({"model": str(base), "out": "nosuch-out", **given})
    with pytest.raises((InvalidInput, InvalidBody)) as caught:
        local_checks.surgery(command)
    assert expected in str(caught.value)


def test_a_command_asks_for_what_a_job_asks_for(base: Path) -> None:
    given = {"model": str(base), "keep": 4, "by": "weights", "align": "on"}
    found = surgery_settings(MERGE_EXPERTS_COMMAND.model_validate(given)).surgery
    assert (found.action, found.keep, found.likeness, found.aligned) == ("merge", 4, "weights", True)
    added = surgery_settings(ADD_EXPERTS_COMMAND.model_validate({"model": str(base), "copy_of": 3})).surgery
    assert added.added.copy_of == 3
