"""What `moe-train` does without a server: run a supervisor, and what needs torch in a process of its own."""

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from llama_stack_provider_moe.cli.exits import Exit
from llama_stack_provider_moe.cli.screen import Screen
from llama_stack_provider_moe.errors import InvalidInput

_UPCYCLE = "llama_stack_provider_moe.experts.upcycle"
_ANALYZE_ROUTING = "llama_stack_provider_moe.analysis.routing"
_EVAL = "llama_stack_provider_moe.evaluation.command"
_EXPORT_MERGE = "llama_stack_provider_moe.export.merge"
_EXPORT_CHECK = "llama_stack_provider_moe.export.load_check"
_EXPORT_GGUF = "llama_stack_provider_moe.export.gguf"
_NEEDED = ("torch", "transformers", "safetensors")
_SAID_LIMIT = 4000  # characters


def supervise(screen: Screen, run_config: Path, provider_id: str | None, exit_when_idle: bool) -> Exit:
    """Run jobs of the provider in `run_config` until a signal says to leave; its log goes to standard error."""
    # SQLAlchemy takes longer to import than any other command takes to run.
    from llama_stack_provider_moe.cli.run_config import read_run_config
    from llama_stack_provider_moe.jobs import supervisor

    config = read_run_config(run_config, provider_id)
    if not exit_when_idle:
        # `idle_exit_s` is for supervisors that the next job starts again; this one nobody would.
        limits = config.supervisor.model_copy(update={"idle_exit_s": math.inf})
        config = config.model_copy(update={"supervisor": limits})
    if screen.as_json:
        screen.line({"pid": os.getpid(), "state_dir": str(config.state_dir)})
    return Exit.OK if supervisor.supervise(config) == 0 else Exit.LOST


def upcycle(screen: Screen, arguments: list[str]) -> int:
    """Run `experts.upcycle` with `arguments`; its exit code."""
    return _in_training_python(screen, _UPCYCLE, arguments)


def analyze_routing(screen: Screen, arguments: list[str]) -> int:
    """Run `analysis.routing` with `arguments`; its exit code."""
    return _in_training_python(screen, _ANALYZE_ROUTING, [*arguments, *(["--json"] if screen.as_json else [])])


def evaluate(screen: Screen, arguments: list[str]) -> int:
    """Run `evaluation.command` with `arguments`; its exit code."""
    return _in_training_python(screen, _EVAL, [*arguments, *(["--json"] if screen.as_json else [])])


def export_merge(screen: Screen, arguments: list[str]) -> int:
    """Run `export.merge` with `arguments`; its exit code."""
    return _in_training_python(screen, _EXPORT_MERGE, [*arguments, *(["--json"] if screen.as_json else [])])


def export_check(screen: Screen, arguments: list[str]) -> int:
    """Run `export.load_check` with `arguments`; its exit code."""
    return _in_training_python(screen, _EXPORT_CHECK, [*arguments, *(["--json"] if screen.as_json else [])])


def export_gguf(screen: Screen, arguments: list[str]) -> int:
    """Run `export.gguf` with `arguments`; its exit code."""
    return _in_training_python(screen, _EXPORT_GGUF, [*arguments, *(["--json"] if screen.as_json else [])])


def _in_training_python(screen: Screen, module: str, arguments: list[str]) -> int:
    """Run a module that needs torch, in another process: this one never imports it."""
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise InvalidInput("python", sys.executable, "an environment for training: pip install "
                           f"'llama-stack-provider-moe[train]' (this one lacks {', '.join(missing)})")  # fmt: skip
    command = [sys.executable, "-m", module, *arguments]
    if not screen.as_json:
        return _shell_code(subprocess.run(command, check=False).returncode)
    done = subprocess.run(command, check=False, capture_output=True, text=True, errors="replace")
    code = _shell_code(done.returncode)
    if code == Exit.OK:
        screen.document(_document(done.stdout))
    else:
        name = module.rpartition(".")[2]
        screen.error(None, done.stderr[-_SAID_LIMIT:].strip() or f"{name} ended with exit code {code}", code)
    return code


def _document(printed: str) -> dict[str, Any]:
    """One that was printed as JSON, or lines for a person."""
    if printed.startswith("{"):
        document: dict[str, Any] = json.loads(printed)
        return document
    return {"report": printed.splitlines()}


def _shell_code(returned: int) -> int:
    """Death by a signal as shells tell it."""
    return returned if returned >= 0 else 128 - returned
