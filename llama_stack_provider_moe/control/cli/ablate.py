"""`moe-train ablate apply`: reads and checks a plan in YAML or JSON, and has another process apply it."""

from pydantic import ValidationError

from llama_stack_provider_moe.control.cli import local, model_checks
from llama_stack_provider_moe.control.cli.screen import Screen
from llama_stack_provider_moe.control.cli.template import with_layer_experts
from llama_stack_provider_moe.errors import InvalidBody, InvalidInput
from llama_stack_provider_moe.jobdir import local_names
from llama_stack_provider_moe.spec import AblationSpec
from llama_stack_provider_moe.spec.ablate_commands import ApplyCommand
from llama_stack_provider_moe.spec.ablation import AblationOutput
from llama_stack_provider_moe.spec.error_words import problems_of

RECIPE = "ablation"


def apply(screen: Screen, command: ApplyCommand) -> int:
    """Run the command; return its exit code.

    Raises:
        InvalidInput: the plan, or a file that it names, is not valid.
    """
    plan = read_plan(command.plan, command.output)
    model_checks.model(local_names.whole_model(plan.model, "model"), "model")
    local_names.measurements_file(plan.measurements, "measurements")
    return local.run_plan(screen, "compute.ablation.apply_command", command, plan)


def read_plan(name: str, output: AblationOutput | None = None) -> AblationSpec:
    """Return the plan in a file. Its relative paths start from the file's folder.

    Args:
        name: of the file.
        output: replaces the plan's `output`; None: that stays.

    Raises:
        InvalidInput: the file can't be read, or holds no plan.
    """
    body, beside = local.read_plan_file(name, RECIPE)
    local.beside_plan(body, ("model", "measurements"), beside)
    if output is not None:
        body["output"] = output
    body = with_layer_experts(_of_file(body), beside)
    if body.get("eval") is not None:
        raise InvalidInput("eval", body["eval"], "none in a plan that this command applies; a job measures before and "
                           "after, and `moe-train eval` measures each model")  # fmt: skip
    try:
        return AblationSpec.model_validate(body)
    except ValidationError as error:
        raise InvalidBody(problems_of(error)) from None


def _of_file(body: dict[str, object]) -> dict[str, object]:
    """The plan with the routing.json of the job that its `from_analysis` names, if it names one."""
    asked = body.get("from_analysis")
    if not isinstance(asked, dict) or not isinstance(asked.get("job"), str) or "file" in asked:
        return body
    path = local_names.routing_file(asked["job"], "from_analysis.job")
    others = {name: value for name, value in asked.items() if name != "job"}
    return {**body, "from_analysis": {**others, "file": str(path.absolute())}}
