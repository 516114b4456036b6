"""Runs a supervisor on this machine, and commands that need torch in separate processes."""

import importlib.util
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, cast

from pydantic import BaseModel

from llama_stack_provider_moe.control.cli.exits import Exit
from llama_stack_provider_moe.control.cli.job_file import read_job_file
from llama_stack_provider_moe.control.cli.screen import Screen
from llama_stack_provider_moe.errors import InvalidInput
from llama_stack_provider_moe.ground import run
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
    command = [*run.command(sys.executable, f"{_PACKAGE}.{module}"), *words(line), *json_option]
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


class PlanCommand(Protocol):
    """A command line with a plan, which writes to a new folder."""

    plan: str
    out: str
    dry_run: bool


def read_plan_file(name: str, recipe: str) -> tuple[dict[str, object], Path]:
    """Return the plan in a file, a job whose recipe may be left out, and the folder that its paths start from.

    Raises:
        InvalidInput: the file can't be read, or is a job of another recipe.
    """
    body, beside = read_job_file(name)
    given = body.setdefault("recipe", recipe)
    if given != recipe:
        raise InvalidInput("recipe", given, f"{recipe!r}, or no recipe")
    return body, beside


def beside_plan(block: dict[str, object], fields: Sequence[str], beside: Path) -> None:
    """Replace relative paths in fields of a plan that name something beside the plan's file."""
    for field in fields:
        value = block.get(field)
        if isinstance(value, str) and (beside / value).exists():
            block[field] = str(beside / value)


def run_plan[Line: CommandLine](screen: Screen, module: str, line: Line, plan: BaseModel) -> int:
    """Run a module with a plan that has been read and checked, in another process; return its exit code.

    Args:
        screen: standard output and error.
        module: of this package.
        line: a `PlanCommand`; its plan is replaced by a file of JSON.
        plan: the job.

    Raises:
        InvalidInput: the output exists, or this environment can't train.
    """
    command = cast(PlanCommand, line)
    if not command.dry_run and os.path.lexists(command.out):
        raise InvalidInput("--out", command.out, "a folder that does not exist yet")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "plan.json"
        file.write_text(json.dumps(plan.model_dump(mode="json")), encoding="utf-8")
        # Set, not copied: `words` leaves out what the user left out.
        command.plan = str(file)
        return in_training_python(screen, module, line)


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
