"""`moe-train mix`: reads and checks a plan in YAML or JSON, and has another process mix."""

import json
import os
import tempfile
from pathlib import Path

from pydantic import ValidationError

from llama_stack_provider_moe.control.cli import local, model_checks
from llama_stack_provider_moe.control.cli.job_file import read_job_file
from llama_stack_provider_moe.control.cli.screen import Screen
from llama_stack_provider_moe.errors import InvalidBody, InvalidInput
from llama_stack_provider_moe.jobdir import local_names
from llama_stack_provider_moe.spec import MixSpec
from llama_stack_provider_moe.spec.error_words import problems_of
from llama_stack_provider_moe.spec.local_commands import MixCommand
from llama_stack_provider_moe.spec.local_rows import domain_rows

RECIPE = "mix"


def mix(screen: Screen, command: MixCommand) -> int:
    """Run the command; return its exit code.

    Raises:
        InvalidInput: the plan, or a file that it names, is not valid.
        InvalidRows: a file of rows is not valid.
    """
    plan = read_plan(command.plan)
    named = {"model": plan.model, **{f"branches.{at}.model": plan.branches[at].model for at in plan.kept}}
    for field, model in named.items():
        folder = local_names.whole_model(model, field)
        model_checks.model(folder, field)
        model_checks.contents(folder, field)
    domain_rows(plan)
    if not command.dry_run and os.path.lexists(command.out):
        raise InvalidInput("--out", command.out, "a folder that does not exist yet")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "plan.json"
        file.write_text(json.dumps(plan.model_dump(mode="json")), encoding="utf-8")
        # Set, not copied: `words` leaves out what the user left out.
        command.plan = str(file)
        return local.in_training_python(screen, "compute.mixing.command", command)


def read_plan(name: str) -> MixSpec:
    """Return the plan in a file. Its relative paths start from the file's folder.

    Raises:
        InvalidInput: the file can't be read, or holds no plan.
    """
    body, beside = read_job_file(name)
    recipe = body.setdefault("recipe", RECIPE)
    if recipe != RECIPE:
        raise InvalidInput("recipe", recipe, f"{RECIPE!r}, or no recipe")
    branches = body.get("branches")
    for block in [body, *(branches if isinstance(branches, list) else [])]:
        for field in ("model", "dataset_id"):
            value = block.get(field) if isinstance(block, dict) else None
            if isinstance(value, str) and (beside / value).exists():
                block[field] = str(beside / value)
    try:
        return MixSpec.model_validate(body)
    except ValidationError as error:
        raise InvalidBody(problems_of(error)) from None
