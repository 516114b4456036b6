"""Runs a supervisor on this machine, and commands that need torch in separate processes."""

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

from llama_stack_provider_moe.control.cli.exits import Exit
from llama_stack_provider_moe.control.cli.screen import Screen
from llama_stack_provider_moe.errors import InvalidInput
from llama_stack_provider_moe.spec.command_words import CommandLine, words

_PACKAGE = "llama_stack_provider_moe"
_NEEDED = ("torch", "transformers", "safetensors")
_SAID_LIMIT = 4000  # characters


def supervise(screen: Screen, run_config: Path, provider_id: str | None, exit_when_idle: bool) -> Exit:
    """Run jobs of a provider until a signal arrives; the log goes to standard error.

    Args:
        screen: standard output and error.
        run_config: run YAML of the server.
        provider_id: id of the provider, if the YAML has several.
        exit_when_idle: exit when no job has run for the YAML's `idle_exit_s`.
    """
    # Importing SQLAlchemy takes longer than running any other command.
    from llama_stack_provider_moe.control.config_check.run_yaml import read_run_config
    from llama_stack_provider_moe.control.config_check.start import require
    from llama_stack_provider_moe.control.supervisor import supervisor

    config = read_run_config(run_config, provider_id)
    require(config, str(run_config))
    if not exit_when_idle:
        # `idle_exit_s` is for supervisors that the next job restarts; nothing would restart this one.
        limits = config.supervisor.model_copy(update={"idle_exit_s": math.inf})
        config = config.model_copy(update={"supervisor": limits})
    if screen.as_json:
        screen.line({"pid": os.getpid(), "state_dir": str(config.state_dir)})
    return Exit.OK if supervisor.supervise(config) == 0 else Exit.LOST


def in_training_python(screen: Screen, module: str, line: CommandLine) -> int:
    """Run a module that needs torch with this command line, in another process; return its exit code.

    Raises:
        InvalidInput: this environment can't train.
    """
    require_training_environment()
    json_option = ["--json"] if screen.as_json and "as_json" in type(line).model_fields else []
    command = [sys.executable, "-m", f"{_PACKAGE}.{module}", *words(line), *json_option]
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


def require_training_environment() -> None:
    """Raise InvalidInput if this environment can't train."""
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise InvalidInput("python", sys.executable, "an environment for training: pip install "
                           f"'llama-stack-provider-moe[train]' (this one lacks {', '.join(missing)})")  # fmt: skip


def _document(printed: str) -> dict[str, object]:
    """Parse a JSON document, or wrap lines that were printed for a user."""
    if printed.startswith("{"):
        document: dict[str, object] = json.loads(printed)
        return document
    return {"report": printed.splitlines()}


def _shell_code(returned: int) -> int:
    """Return the exit code as a shell does: 128 plus the signal, if a signal ended the process."""
    return returned if returned >= 0 else 128 - returned
