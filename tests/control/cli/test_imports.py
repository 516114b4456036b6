"""No module of the command line imports in a circle, inside a function or outside."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

import pytest
import typer

import llama_stack_provider_moe.control.cli
from llama_stack_provider_moe.control.cli import commands

FOLDER = Path(llama_stack_provider_moe.control.cli.__file__).parent
ROOM = "llama_stack_provider_moe.control.cli"


def imports(source: str) -> set[str]:
    """Return the modules of the room that `source` imports, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name.removeprefix(ROOM + ".") for alias in node.names if alias.name.startswith(ROOM)}
        elif isinstance(node, ast.ImportFrom) and node.module == ROOM:
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith(ROOM + "."):
            found.add(str(node.module).removeprefix(ROOM + ".").partition(".")[0])
    return found


def order(sources: dict[str, str]) -> list[str]:
    """Return the modules, each after those that it imports; CycleError if there is no such order."""
    return list(TopologicalSorter({name: imports(source) for name, source in sources.items()}).static_order())


def test_no_circle() -> None:
    sources = {path.stem: path.read_text(encoding="utf-8") for path in FOLDER.glob("*.py")}
    sources["commands"] += "".join(f"from {ROOM} import {name}\n" for name in commands.MODULES)  # by name, when needed
    found = order(sources)
    assert found.index("act") < found.index("job_commands") < found.index("commands") < found.index("__init__")


def test_a_circle_through_a_function_would_be_found() -> None:
    inner = f"def act():\n    from {ROOM} import one\n"
    with pytest.raises(CycleError):
        order({"one": f"from {ROOM}.two import x\n", "two": inner})


def test_the_table_of_modules_names_each_command_of_each_module() -> None:
    for name, names in commands.MODULES.items():
        group: Any = typer.main.get_command(commands.app_of([name]))
        assert tuple(group.commands) == names, name


def test_a_command_line_imports_the_module_of_its_command() -> None:
    assert commands.modules_of(["status", "job-1"]) == ["job_commands"]
    assert list(commands.modules_of(["--help"])) == list(commands.modules_of(["wrong"])) == list(commands.MODULES)
