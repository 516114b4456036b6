"""The memory plan of a job before it is sent, and the time that it will take: `moe-train plan`, from the server.

The planner needs torch, so it runs in a process of its own, one at a time.
"""

import json
import logging
import os
import subprocess
from typing import Any

from llama_stack_provider_moe.control.server.pools import Pool
from llama_stack_provider_moe.control.supervisor.executors.local import training_environment
from llama_stack_provider_moe.errors import InvalidInput, Unavailable
from llama_stack_provider_moe.ground import run
from llama_stack_provider_moe.spec import JobSpec, TrainingSpec
from llama_stack_provider_moe.spec.recipes import RECIPES
from llama_stack_provider_moe.spec.server_config import ProviderConfig

LIMIT_S = 180.0  # the imports alone take half a minute of a busy core
_MODULE = "llama_stack_provider_moe.compute.planning.plan_command"
_SAID_LIMIT = 2000  # characters
log = logging.getLogger(__name__)
_planning = Pool("moe-plans", 1, 16, "memory plans")


async def plan(
    spec: JobSpec, memory_bytes: int, config: ProviderConfig, rows: int | None = None, images: int | None = None
) -> dict[str, Any]:
    """Return the plan of a job that was checked.

    Args:
        spec: the job, with resolved names.
        memory_bytes: memory of each GPU; for a job on the CPU, of the machine.
        config: has the interpreter of training processes.
        rows: of a whole epoch; None if unknown.
        images: in each row; None: one, if the job and its model can train on images.

    Raises:
        InvalidInput: the job does not train, or the model's configuration can't be read.
        Unavailable: too many plans are asked for, or the planner failed.
    """
    if not isinstance(spec, TrainingSpec):
        trained = ", ".join(recipe.name for recipe in RECIPES.values() if recipe.trains)
        raise InvalidInput("recipe", spec.recipe, f"one that trains: {trained}")
    words = [*_words("--rows", rows), *_words("--images", images)]
    return await _planning.run(_planned, spec, memory_bytes, config, words)


def _planned(spec: TrainingSpec, memory_bytes: int, config: ProviderConfig, words: list[str]) -> dict[str, Any]:
    try:
        done = subprocess.run(
            [*run.command(config.training_python, _MODULE), "--memory", str(memory_bytes), *words],
            check=False, input=spec.model_dump_json(), capture_output=True, text=True, errors="replace",
            timeout=LIMIT_S, env=training_environment(os.environ, config), cwd=config.state_dir,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise Unavailable(f"the planner did not answer within {LIMIT_S:g} s; try again") from None
    lines = done.stdout.splitlines()
    if not lines:
        log.error("the planner ended with exit code %d: %s", done.returncode, done.stderr[-_SAID_LIMIT:].strip())
        raise Unavailable(f"the planner ended with exit code {done.returncode}; see the server's log")
    document: dict[str, Any] = json.loads(lines[-1])
    if "error" in document:
        raise InvalidInput("model", spec.model_from or spec.model, f"a job that can be planned ({document['error']})")
    return document


def _words(option: str, value: int | None) -> list[str]:
    return [] if value is None else [option, str(value)]
