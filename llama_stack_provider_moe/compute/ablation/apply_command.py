"""Take measured directions out of a model, without a server: the code of `moe-train ablate apply`.

`control.cli.ablate` has read the plan, which may be YAML, and gives it as a file of JSON.

$ moe-train ablate apply PLAN.yaml --out ablated [--dry-run]
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError

from llama_stack_provider_moe.compute.ablation.apply import apply, dry_run
from llama_stack_provider_moe.compute.ablation.apply_report import text
from llama_stack_provider_moe.compute.ablation.lora import write_adapter
from llama_stack_provider_moe.compute.ablation.measurements import read
from llama_stack_provider_moe.compute.data.local_sets import say
from llama_stack_provider_moe.errors import InvalidBody
from llama_stack_provider_moe.ground.small_files import read_small
from llama_stack_provider_moe.jobdir import local_names
from llama_stack_provider_moe.spec import AblationSpec
from llama_stack_provider_moe.spec.ablate_commands import ApplyCommand
from llama_stack_provider_moe.spec.command_words import answered
from llama_stack_provider_moe.spec.error_words import problems_of


def main(argv: Sequence[str] | None = None) -> int:
    """Run `moe-train ablate apply`; returns 0 if OUT was written, or the dry run is shown."""
    return answered(ApplyCommand, argv, "ablate apply", _run)


def _run(command: ApplyCommand) -> int:
    try:
        plan = AblationSpec.model_validate_json(read_small(Path(command.plan)))
    except ValidationError as error:
        raise InvalidBody(problems_of(error)) from None
    model = local_names.whole_model(plan.model, "model")
    found = read(local_names.measurements_file(plan.measurements, "measurements"), "measurements")
    if command.dry_run:
        report = dry_run(model, plan, found)
    else:
        write = write_adapter if plan.output == "lora" else apply
        report = write(model, plan, found, Path(command.out), say)
    print(report.model_dump_json() if command.as_json else text(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
