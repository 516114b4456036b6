"""The rooms of the package, who may import whom, and the import graph as it is.

    python -m tests.contracts.rooms             # the graph, room by room; exit code 1 for a circle or an arrow up
    python -m tests.contracts.rooms --write     # draws it into docs/explain/rooms.svg

Imports inside functions count as well: the graph is read with `ast`.
"""

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = "llama_stack_provider_moe"
DRAWING = ROOT / "docs" / "explain" / "rooms.svg"


@dataclass(frozen=True)
class Room:
    """One line of the plan.

    Attributes:
        floor: 0 is the ground; a room imports rooms of lower floors.
        libraries: third parties that it may import.
    """

    floor: int
    libraries: frozenset[str] = field(default_factory=frozenset)


def _room(floor: int, libraries: str = "") -> Room:
    return Room(floor, frozenset(libraries.split()))


_MODEL = "torch transformers peft safetensors "
# Each room imports what stands on lower floors of its own tower, and the ground. Nothing else.
ROOMS: dict[str, Room] = {
    "errors": _room(0),
    "ground": _room(1, "yaml"),
    "spec": _room(2, "pydantic pydantic_core"),
    "llama_cpp": _room(2),
    "jobdir": _room(3, "pydantic fsspec"),
    "client": _room(3, "httpx"),
    "serving": _room(4, "pydantic httpx"),
    "shields": _room(4, "pydantic pydantic_core jsonschema"),
    "graders": _room(5, "pydantic httpx rapidfuzz nltk math_verify"),
    "control.store": _room(10, "pydantic sqlalchemy alembic"),
    "control.supervisor": _room(11, "pydantic sqlalchemy httpx optuna"),
    "control.config_check": _room(11, "pydantic sqlalchemy yaml"),
    "control.dashboard": _room(11, "fastapi starlette jinja2 markupsafe"),
    "control.scorer": _room(11, "pydantic"),
    "control.server": _room(12, "pydantic fastapi starlette opentelemetry httpx"),
    "control.guard": _room(13, "pydantic fastapi starlette opentelemetry"),
    "control.cli": _room(12, "pydantic httpx rich typer click yaml"),
    "compute.moe.kernels": _room(20, "torch triton quack"),
    "compute.moe": _room(21, _MODEL + "bitsandbytes triton tqdm"),
    "compute.runtime": _room(21, "torch transformers psutil"),
    "compute.distributed": _room(22, "torch transformers"),
    "compute.models": _room(23, _MODEL + "trl huggingface_hub bitsandbytes unsloth PIL"),
    "compute.methods": _room(24, "torch transformers numpy"),
    "compute.data": _room(24, "pydantic torch transformers trl datasets jinja2"),
    "compute.export": _room(25, _MODEL + "pydantic jinja2 httpx huggingface_hub"),
    "compute.analysis": _room(25, _MODEL + "pydantic numpy matplotlib"),
    "compute.planning": _room(25, _MODEL + "pydantic trl"),
    "compute.grading": _room(28, _MODEL + "pydantic jinja2"),
    "compute.ablation": _room(26, _MODEL + "pydantic numpy"),
    "compute.probing": _room(27, _MODEL + "pydantic"),
    "compute.mixing": _room(27, _MODEL + "pydantic"),
    "compute.surgery": _room(27, _MODEL + "pydantic"),
    "compute.evaluation": _room(27, _MODEL + "pydantic numpy jinja2 httpx lm_eval"),
    "compute.train": _room(28, _MODEL + "pydantic trl datasets psutil mlflow trackio wandb bitsandbytes"),
    "compute.recipes": _room(29, _MODEL + "pydantic trl datasets numpy httpx"),
    "compute.worker": _room(30, "torch transformers datasets ray"),
    "provider": _room(40),
    "guard": _room(41, "fastapi"),
    "": _room(41, "fastapi"),  # the package itself: lazy doors, and fastapi for a type alone
}
# Hosts (llama_stack, ogx) are named by `control.server.compat` alone, which looks for whichever is installed.
# Libraries that one module alone may name: their licence, their weight or their absence is that module's business.
DOORS: dict[str, str] = {
    "unsloth": "compute.models.unsloth.base",
    "ray": "compute.worker.ray",
    "fsspec": "jobdir.mirror",
    "lm_eval": "compute.evaluation.lm_eval_tasks",
    "matplotlib": "compute.analysis.plots",
    "PIL": "compute.models.images",
    "alembic": "control.store.migrations",
    "optuna": "control.supervisor.pruner",
    **dict.fromkeys(("mlflow", "trackio", "wandb"), "compute.train.trackers"),
}


def tower(room: str) -> str:
    """`control`, `compute`, or the ground that both stand on."""
    first = room.partition(".")[0]
    return "control" if room in ("", "provider", "guard") else first if first in ("control", "compute") else "ground"


def may_import(room: str, other: str) -> bool:
    """Whether the plan lets `room` import `other`: on a lower floor, and of no other tower."""
    return room == other or (ROOMS[other].floor < ROOMS[room].floor and tower(other) in ("ground", tower(room)))


def room_of(module: str) -> str:
    """The room of a module, named below the package ("" is the package itself)."""
    found = [room for room in ROOMS if room and (module == room or module.startswith(room + "."))]
    if not found and module:
        raise LookupError(f"{module} is in no room; tests/contracts/rooms.py has the list")
    return max(found, key=len, default="")


@cache
def modules() -> dict[str, Path]:
    """Every module by its name below the package, and its file."""
    root = ROOT / PACKAGE
    found = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        name = ".".join(part for part in parts if part != "__init__")
        if name not in ("control", "compute"):  # the towers themselves hold a docstring
            found[name] = path
    return found


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Line and full name of whatever a file imports, wherever in it; of our own a module, not what it holds."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute here"
            assert node.module is not None
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield node.lineno, inner if inner.removeprefix(f"{PACKAGE}.") in modules() else node.module


@dataclass(frozen=True)
class Arrow:
    """One import of a room by another."""

    module: str
    line: int
    imported: str


@cache
def graph() -> dict[str, dict[str, list[Arrow]]]:
    """Room -> room -> the imports between them."""
    found: dict[str, dict[str, list[Arrow]]] = {room: {} for room in ROOMS}
    for module, path in modules().items():
        for line, name in imports(path):
            if not name.startswith(f"{PACKAGE}."):
                continue
            inner = name.removeprefix(f"{PACKAGE}.")
            here, there = room_of(module), room_of(inner)
            if here != there:
                found[here].setdefault(there, []).append(Arrow(module, line, inner))
    return found


def circles() -> list[list[str]]:
    """Rooms that import each other, each circle once."""
    found: list[list[str]] = []
    done: set[str] = set()

    def follow(room: str, way: list[str]) -> None:
        if room in way:
            found.append([*way[way.index(room) :], room])
            return
        if room in done:
            return
        for other in graph()[room]:
            follow(other, [*way, room])
        done.add(room)

    for room in ROOMS:
        follow(room, [])
    return found


def arrows_up() -> list[str]:
    """Imports that the plan forbids, one line each."""
    return [
        f"{arrow.module}:{arrow.line} ({room or 'package'}) imports {arrow.imported} ({other})"
        for room, others in graph().items()
        for other, arrows in others.items()
        if not may_import(room, other)
        for arrow in arrows
    ]


def main() -> int:
    """Print the graph; 1 where the plan does not hold."""
    if "--write" in sys.argv:
        from tests.contracts.rooms_drawing import svg

        DRAWING.write_text(svg(), encoding="utf-8")
    else:
        for room, others in graph().items():
            print(f"{room or 'package':22} -> {', '.join(sorted(others)) or 'nothing of ours'}")
        print(f"{len(ROOMS)} rooms, {len(modules())} modules, {len(circles())} circles, {len(arrows_up())} arrows up")
    for problem in [*(" -> ".join(circle) for circle in circles()), *arrows_up()]:
        print(problem, file=sys.stderr)
    return 1 if circles() or arrows_up() else 0


if __name__ == "__main__":
    sys.exit(main())
