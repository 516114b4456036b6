"""One backend for each `loader`, and one place that knows how the loaders differ."""

import ast
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import llama_stack_provider_moe.compute as compute
from llama_stack_provider_moe.compute.models.backend import BACKENDS, Transformers, Unsloth, backend_of
from llama_stack_provider_moe.spec import JOB_SPEC
from llama_stack_provider_moe.spec.unsloth_limits import Loader

SFT: dict[str, Any] = {"recipe": "sft", "model": "a/b", "data": {"dataset_id": "d"}, "adapter": {}}
EXPORT = {"recipe": "export", "of": "job", "export": {"gguf": ["bf16"]}}


def test_every_loader_has_a_backend() -> None:
    assert set(BACKENDS) == set(get_args(Loader))
    assert isinstance(backend_of(JOB_SPEC.validate_python(SFT)), Transformers)
    assert isinstance(backend_of(JOB_SPEC.validate_python({**SFT, "loader": "unsloth"})), Unsloth)
    assert isinstance(backend_of(JOB_SPEC.validate_python(EXPORT)), Transformers)


def test_the_backend_is_known_before_torch_is_imported() -> None:
    """Unsloth has to be imported before transformers, so asking for the backend must not import it."""
    code = (
        "import sys, llama_stack_provider_moe.compute.models.backend\n"
        "heavy = {'torch', 'transformers', 'trl', 'peft', 'unsloth', 'bitsandbytes'} & set(sys.modules)\n"
        "sys.exit(f'imported {sorted(heavy)}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr


def test_nothing_on_the_compute_side_asks_for_the_loaders_name() -> None:
    """Code asks the backend what it can do. Only the table reads the name."""
    assert compute.__file__ is not None
    root = Path(compute.__file__).parent
    readers = {
        path.relative_to(root).as_posix()
        for path in root.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and node.attr == "loader" and "spec" in ast.unparse(node.value)
    }
    assert readers == {"models/backend.py"}
