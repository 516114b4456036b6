"""Python blocks of pages: they import what exists, call what the client has, and run where no server is asked."""

import ast
import importlib
import importlib.util
import inspect
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from llama_stack_client import LlamaStackClient

from llama_stack_provider_moe.client import Client
from tests.contracts.doc_blocks import ROOT, Block

# What a block that asks a server, a hub or a model has in it.
OURS = "llama_stack_provider_moe.client"
_ASKS = ("http://", "https://", "Client(", "from_pretrained(", "load_dataset(")


def require_imports(tree: ast.Module, where: str) -> None:
    """Refuse an import of what does not exist."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                importlib.import_module(alias.name)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            module = importlib.import_module(node.module)
            for alias in node.names:
                assert hasattr(module, alias.name) or importlib.util.find_spec(f"{node.module}.{alias.name}"), (
                    f"{where}: {node.module} has no {alias.name}"
                )


def require_calls(tree: ast.Module, where: str) -> int:
    """Refuse a call of a client (ours, if the block imports it) that it does not have; how many calls there were."""
    clients = {
        target.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call)
        if ast.unparse(node.value.func).endswith("LlamaStackClient")
        for target in node.targets
        if isinstance(target, ast.Name)
    } | {"client"}
    ours = any(isinstance(node, ast.ImportFrom) and node.module == OURS for node in ast.walk(tree))
    client: object = Client if ours else LlamaStackClient(base_url="http://localhost:1")
    calls = 0
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        root, *names = ast.unparse(node.func).split(".")
        if root not in clients:
            continue
        found: Any = client
        for name in names:
            assert hasattr(found, name), f"{where}: {ast.unparse(node.func)}: the client has no {name}"
            found = getattr(found, name)
        parameters = inspect.signature(found).parameters
        unknown = {keyword.arg for keyword in node.keywords if keyword.arg} - set(parameters)
        assert not unknown, f"{where}: {ast.unparse(node.func)} takes no {sorted(unknown)}"
        calls += 1
    return calls


def asks(block: Block) -> bool:
    """Whether the block needs a server, a hub or a model."""
    return any(word in block.text for word in _ASKS)


def run(blocks: list[Block], folder: Path) -> None:
    """Run blocks of one page one after another, as a reader would paste them."""
    code = "\n".join(block.text for block in blocks)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "error"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, f"{blocks[0]}: {done.stderr}"
