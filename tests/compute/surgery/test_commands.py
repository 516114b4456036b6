"""`moe-train experts prune` and `split`, as their processes run them."""

import json
from pathlib import Path

import pytest

from llama_stack_provider_moe.compute.surgery import prune_command, split_command
from llama_stack_provider_moe.control.cli import local_checks
from llama_stack_provider_moe.errors import InvalidInput
from llama_stack_provider_moe.spec.surgery_commands import PRUNE_COMMAND, SplitCommand
from tests.support import surgery_models
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


def test_split_writes_twins(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert split_command.main([str(base), "--factor", "3", "--out", str(tmp_path / "out")]) == 0
    assert "split" in capsys.readouterr().out
    layout = surgery_models.layout_of(surgery_models.load(tmp_path / "out"))
    assert (layout.num_experts, layout.top_k) == (24, 6)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"keep": 6}, "--rows: None is not valid; expected a file of rows"),
        ({"keep": 6, "drop": ["1"]}, "keep: 6 is not valid with `drop`"),
        ({"drop": ["1", "2"]}, "--drop: '2' is not valid; expected each layer once"),
        ({"drop": ["x:1"]}, "'x' is not the number of a layer"),
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
