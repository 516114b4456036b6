"""The floors of the house: imports only point down, and the server's side never pulls in torch."""

import ast
import subprocess
import sys

import pytest

from tests.contracts.rooms import DOORS, DRAWING, PACKAGE, ROOMS, arrows_up, circles, imports, modules, room_of
from tests.contracts.rooms_drawing import svg

HOSTS = {"llama_stack", "llama_stack_api", "ogx", "ogx_api"}


def test_no_room_imports_itself_by_a_detour() -> None:
    assert circles() == []


def test_imports_point_down() -> None:
    assert arrows_up() == []


def test_the_drawing_is_of_this_code() -> None:
    assert DRAWING.read_text(encoding="utf-8") == svg(), "run `python -m tests.contracts.rooms --write`"


@pytest.mark.parametrize("name", modules(), ids=lambda name: name or "package")
def test_third_parties_are_those_of_the_room(name: str) -> None:
    allowed = ROOMS[room_of(name)].libraries
    for line, imported in imports(modules()[name]):
        top = imported.partition(".")[0]
        if top == PACKAGE or top in sys.stdlib_module_names:
            continue
        assert top in allowed, f"{name}:{line} ({room_of(name) or 'package'}) imports {imported}"
        door = DOORS.get(top)
        assert door is None or (name + ".").startswith(door + "."), f"{name}:{line} imports {top}, which is {door}'s"


def test_every_room_and_every_door_is_there() -> None:
    assert {room_of(name) for name in modules()} == set(ROOMS)
    for library, door in DOORS.items():
        inside = [path for name, path in modules().items() if (name + ".").startswith(door + ".")]
        used = {imported.partition(".")[0] for path in inside for _, imported in imports(path)}
        assert library in used, f"{door} is the door to {library}, and doesn't import it"


def test_recipes_do_not_import_the_entry() -> None:
    for name, path in modules().items():
        if name.startswith("compute.") and not name.startswith("compute.worker"):
            assert f"{PACKAGE}.compute.worker.main" not in {imported for _, imported in imports(path)}, name


SERVERS_SIDE = ["", ".provider", ".control.cli", ".control.supervisor.supervisor", ".control.server.routes",
                ".control.server.service"]  # fmt: skip


def test_the_servers_side_stays_without_torch() -> None:
    """One after the other in one process, because they have most of their imports in common."""
    code = (
        "import importlib, sys\n"
        f"for module in {[PACKAGE + module for module in SERVERS_SIDE]}:\n"
        "    importlib.import_module(module)\n"
        "    heavy = {'torch', 'transformers', 'trl', 'peft', 'datasets', 'accelerate', 'triton'} & set(sys.modules)\n"
        "    if heavy:\n"
        "        sys.exit(f'{module} imported {sorted(heavy)}')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr


def test_importing_the_package_pulls_in_nothing_of_a_server() -> None:
    code = (
        f"import sys, {PACKAGE}\n"
        f"loaded = {sorted(HOSTS)} + ['fastapi', 'sqlalchemy', 'pydantic']\n"
        "loaded = sorted(set(loaded) & set(sys.modules))\n"
        "sys.exit(f'imported {loaded}' if loaded else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr


def test_sizes_of_files() -> None:
    lines = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in modules().items()}
    too_long = {name: count for name, count in lines.items() if count > 400}
    assert not too_long, f"files over 400 lines: {too_long}"


def test_sizes_of_functions() -> None:
    too_long = [
        f"{name}:{node.name} ({node.end_lineno - node.lineno + 1})"
        for name, path in modules().items()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno is not None
        and node.end_lineno - node.lineno + 1 > 80
    ]
    assert not too_long, f"functions over 80 lines: {too_long}"
