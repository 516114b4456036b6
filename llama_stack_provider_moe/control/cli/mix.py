"""`moe-train mix`: reads and checks a plan in YAML or JSON, and has another process mix."""

from pydantic import ValidationError

from llama_stack_provider_moe.control.cli import local, model_checks
from llama_stack_provider_moe.control.cli.screen import Screen
from llama_stack_provider_moe.errors import InvalidBody
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
    return local.run_plan(screen, "compute.mixing.command", command, plan)


def read_plan(name: str) -> MixSpec:
    """Return the plan in a file. Its relative paths start from the file's folder.

    Raises:
        InvalidInput: the file can't be read, or holds no plan.
    """
    body, beside = local.read_plan_file(name, RECIPE)
    branches = body.get("branches")
    for block in [body, *(branches if isinstance(branches, list) else [])]:
        if isinstance(block, dict):
            local.beside_plan(block, ("model", "dataset_id"), beside)
    try:
        return MixSpec.model_validate(body)
    except ValidationError as error:
        raise InvalidBody(problems_of(error)) from None
