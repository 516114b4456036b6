"""Mix branches without a server: the code of `moe-train mix`.

`control.cli.mix` has read the plan, which may be YAML, and gives it as a file of JSON.

$ moe-train mix PLAN.yaml --out mixed [--dry-run]
"""

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError
from transformers.utils import logging

from llama_stack_provider_moe.compute.mixing.mix import StartRouters, dry_run, mix
from llama_stack_provider_moe.compute.mixing.report import MixReport, text
from llama_stack_provider_moe.compute.mixing.routers import from_domains
from llama_stack_provider_moe.errors import InvalidBody
from llama_stack_provider_moe.ground.small_files import read_small
from llama_stack_provider_moe.jobdir import local_names
from llama_stack_provider_moe.spec import MixSpec
from llama_stack_provider_moe.spec.command_words import answered
from llama_stack_provider_moe.spec.error_words import problems_of
from llama_stack_provider_moe.spec.local_commands import MixCommand
from llama_stack_provider_moe.spec.local_rows import domain_rows


def main(argv: Sequence[str] | None = None) -> int:
    """Run `moe-train mix`; returns 0 if OUT was written, or the dry run is shown."""
    logging.disable_progress_bar()
    return answered(MixCommand, argv, "mix", _run)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _run(command: MixCommand) -> int:
    try:
        plan = MixSpec.model_validate_json(read_small(Path(command.plan)))
    except ValidationError as error:
        raise InvalidBody(problems_of(error)) from None
    report = _mixed(command, plan)
    print(report.model_dump_json() if command.as_json else text(report))
    return 0


def _mixed(command: MixCommand, plan: MixSpec) -> MixReport:
    model = local_names.whole_model(plan.model, "model")
    named = [
        branch.model_copy(update={"model": local_names.whole_model(branch.model, f"branches.{at}.model")})
        if at in plan.kept
        else branch
        for at, branch in enumerate(plan.branches)
    ]
    plan = plan.model_copy(update={"branches": named})
    if command.dry_run:
        return dry_run(model, plan)
    with tempfile.TemporaryDirectory() as folder:
        start: StartRouters | None = None
        if plan.start == "domains":
            rows = {name: Path(folder) / f"{name}.jsonl" for name in (plan.branches[at].name for at in plan.kept)}
            for name, lines in domain_rows(plan).items():
                rows[name].write_text("".join(lines), encoding="utf-8")
            start = from_domains(plan, rows, _say)
        return mix(model, plan, Path(command.out), _say, start_routers=start)


if __name__ == "__main__":
    sys.exit(main())
