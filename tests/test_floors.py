"""The floors of the house: imports only point down, and the server's side never pulls in torch."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import llama_stack_provider_moe

ROOT = Path(llama_stack_provider_moe.__file__).parent
PACKAGE = ROOT.name
HOSTS = {"llama_stack", "llama_stack_api", "ogx", "ogx_api"}
LEARNING = {
    "torch", "transformers", "peft", "trl", "accelerate", "datasets", "bitsandbytes", "safetensors",
    "tokenizers", "huggingface_hub", "numpy", "jinja2", "psutil", "triton",
}  # fmt: skip
GROUND = {"errors", "spec", "config", "datarows", "llama_cpp"}

# room (longest prefix wins) -> third parties it may import, modules of ours it may import
# What reads and writes a job's folder, where the towers meet; the store is not among it.
FOLDER = {
    "jobs.folder",
    "jobs.events",
    "jobs.scan",
    "jobs.checkpoint_index",
    "jobs.cluster_run",
    "jobs.exports",
    "jobs.mirrors",
}
FLOORS: dict[str, tuple[set[str], set[str]]] = {
    **{room: ({"pydantic"}, GROUND) for room in GROUND},
    "jobs": ({"pydantic", "sqlalchemy", "alembic"}, GROUND | {"jobs"}),
    "jobs.mirrors": ({"pydantic", "fsspec"}, GROUND | FOLDER),
    "jobs.executors.ray": ({"httpx"}, GROUND | {"jobs"}),  # Ray's own client would import half of Ray
    "": ({"fastapi"}, GROUND | {"host", "provider"}),  # the package itself: lazy doors, fastapi for a type alone
    "provider": (set(), GROUND | {"", "host"}),  # "": the doors themselves, not what lies behind them
    "host": ({"pydantic", "fastapi", "starlette", "opentelemetry"}, GROUND | {"jobs", "host"}),
    "host.compat": (HOSTS, GROUND),
    "cli": ({"pydantic", "httpx", "rich", "typer", "yaml", "click"}, GROUND | {"jobs", "cli"}),
    "losses": ({"torch"}, {"losses"}),
    "experts": (LEARNING - {"trl", "accelerate", "datasets"}, GROUND | {"experts"}),
    "experts.kernels": ({"torch", "triton"}, {"experts.kernels"}),
    # Of `training` an evaluation knows what lies below both: how rows are rendered, how a model is loaded.
    "evaluation": (
        LEARNING | {"pydantic", "lm_eval"},
        GROUND | {"experts", "evaluation", "training.rendering", "training.loader"},
    ),
    "evaluation.served": ({"httpx"}, GROUND | {"evaluation"}),
    "training": (
        LEARNING | {"pydantic", "mlflow", "trackio", "wandb"},
        # Of exports what training leaves for them beside its weights.
        GROUND | {"experts", "losses", "training", "evaluation", "export.probe", "export.servers"} | FOLDER,
    ),
    "training.strategy": (LEARNING, GROUND | {"training", "analysis"}),  # what a job takes, before it begins
    "training.on_ray": ({"ray"}, GROUND | {"training"} | FOLDER),
    "training.ray_node": ({"ray"}, GROUND | {"training"} | FOLDER),
    # Alone in naming Unsloth: parts of it are AGPL-3.0, and it is in an environment of its own.
    "training.unsloth_base": (LEARNING | {"unsloth"}, GROUND | {"experts", "training"}),
    "training.recipes": (
        LEARNING | {"pydantic"},
        GROUND | {"experts", "losses", "training", "analysis", "export"} | FOLDER,
    ),
    "export": (
        LEARNING - {"trl", "accelerate", "datasets"} | {"pydantic"},
        GROUND | {"experts", "export", "training.loader"} | FOLDER,
    ),
    "export.hub": ({"huggingface_hub", "pydantic"}, GROUND),
    "export.ollama": ({"httpx", "pydantic", "transformers"}, GROUND | {"export"}),
    "analysis": (LEARNING | {"pydantic", "matplotlib"}, GROUND | {"experts", "training", "analysis"} | FOLDER),
}


def modules() -> Iterator[tuple[str, Path]]:
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        yield ".".join(part for part in parts if part != "__init__"), path


def imports(path: Path) -> Iterator[tuple[int, str]]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute here"
            assert node.module is not None
            if node.module == PACKAGE:
                yield from ((node.lineno, f"{PACKAGE}.{alias.name}") for alias in node.names)
            else:
                yield node.lineno, node.module


def inside(name: str, rooms: set[str]) -> bool:
    return any(name == room or name.startswith(room + ".") for room in rooms)


@pytest.mark.parametrize(("name", "path"), [pytest.param(*each, id=each[0] or "package") for each in modules()])
def test_imports_point_down(name: str, path: Path) -> None:
    room = max((room for room in FLOORS if inside(name, {room}) or room == ""), key=len)
    third_parties, ours = FLOORS[room]
    for line, imported in imports(path):
        top = imported.partition(".")[0]
        if top == PACKAGE:
            inner = imported.removeprefix(PACKAGE).lstrip(".")
            assert inside(inner, ours) or inside(name, {inner}), (
                f"{name}:{line} ({room or 'package'}) imports {imported}"
            )
        elif top not in sys.stdlib_module_names:
            assert top in third_parties, f"{name}:{line} ({room or 'package'}) imports {imported}"


def test_recipes_do_not_import_the_entry() -> None:
    for name, path in modules():
        if name.startswith("training.") and name != "training.main":
            assert f"{PACKAGE}.training.main" not in {imported for _, imported in imports(path)}, name


@pytest.mark.parametrize("module", ["", ".provider", ".cli", ".jobs.supervisor", ".host.routes", ".host.service"])
def test_the_servers_side_stays_without_torch(module: str) -> None:
    code = (
        f"import sys, {PACKAGE}{module}\n"
        "heavy = {'torch', 'transformers', 'trl', 'peft', 'datasets', 'accelerate', 'triton'} & set(sys.modules)\n"
        "sys.exit(f'imported {sorted(heavy)}' if heavy else 0)"
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
    lines = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in modules()}
    too_long = {name: count for name, count in lines.items() if count > 400}
    assert not too_long, f"files over 400 lines: {too_long}"


def test_sizes_of_functions() -> None:
    too_long = [
        f"{name}:{node.name} ({node.end_lineno - node.lineno + 1})"
        for name, path in modules()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno is not None
        and node.end_lineno - node.lineno + 1 > 80
    ]
    assert not too_long, f"functions over 80 lines: {too_long}"
