"""A routing analysis without a server: the code of `moe-train analyze routing`.

$ moe-train analyze routing MODEL --rows a=FILE --rows b=FILE [--adapter FOLDER] ...
"""

import sys
from collections.abc import Sequence

from transformers.utils import logging

from llama_stack_provider_moe.compute.analysis.routing_run import analyse, load_routed, text, write_report
from llama_stack_provider_moe.compute.data import local_sets
from llama_stack_provider_moe.jobdir import local_names
from llama_stack_provider_moe.spec.command_words import answered
from llama_stack_provider_moe.spec.local_commands import ROUTING_COMMAND, RoutingCommand, routing_job
from llama_stack_provider_moe.spec.local_rows import routing_rows
from llama_stack_provider_moe.spec.routing import REPORT_FILE


def main(argv: Sequence[str] | None = None) -> int:
    """Run `moe-train analyze routing`; returns 0 if the report was written."""
    logging.disable_progress_bar()
    return answered(ROUTING_COMMAND, argv, "analyze routing", _run)


def _run(command: RoutingCommand) -> int:
    command.model, command.adapter = local_names.on_base(command.model, command.adapter)
    spec, files = routing_job(command)
    out = local_sets.new_folder(command.out, REPORT_FILE)
    with local_sets.as_rows(files, lambda path, _: routing_rows(path, spec)) as rows:
        report = analyse(spec, rows, load_routed(spec), local_sets.say, local_sets.progress_of("rows"))
    write_report(report, out, local_sets.say)
    print(report.model_dump_json() if command.as_json else f"{text(report)}\nwritten to {out / REPORT_FILE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
