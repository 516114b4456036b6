"""`plan.toml` quotes files, tests and source lines: all of them must exist."""

import ast
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "llama_stack_provider_moe"
PLAN = tomllib.loads(Path(__file__).with_name("plan.toml").read_text(encoding="utf-8"))


def joined(path: Path) -> str:
    """The lines of a file in the form of `removed`: without indentation, on one line."""
    return " ".join(line.strip() for line in path.read_text(encoding="utf-8").splitlines())


@pytest.mark.parametrize("file", PLAN["files"])
def test_every_file_and_test_exists(file: str) -> None:
    assert (PACKAGE / file).is_file()
    for test in PLAN["files"][file]:
        path, _, name = test.partition("::")
        tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
        names = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        assert not name or name.partition("[")[0] in names, test


@pytest.mark.parametrize("entry", PLAN["equivalent"], ids=lambda entry: f"{entry['file']}: {entry['removed'][:40]}")
def test_every_equivalent_mutant_quotes_its_file(entry: dict[str, str]) -> None:
    assert entry.keys() == {"file", "removed", "added", "why"}
    assert entry["file"] in PLAN["files"]
    assert entry["removed"] in joined(PACKAGE / entry["file"])
    assert entry["added"] != entry["removed"]


def test_no_equivalent_mutant_is_listed_twice() -> None:
    listed = [(entry["file"], entry["removed"], entry["added"]) for entry in PLAN["equivalent"]]
    assert len(listed) == len(set(listed))
