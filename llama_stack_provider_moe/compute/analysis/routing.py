"""A routing analysis without a server: the code of `moe-train analyze routing`.

$ moe-train analyze routing MODEL --rows a=FILE --rows b=FILE [--adapter FOLDER] ...
"""

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from transformers.utils import logging

from llama_stack_provider_moe.compute.analysis.routing_run import analyse, load_routed, text, write_report
from llama_stack_provider_moe.errors import InvalidInput
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
    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    def progress(done: int, total: int) -> None:
        end = "\n" if done == total or not sys.stderr.isatty() else "\r"
        print(f"{done} of {total} rows", file=sys.stderr, end=end, flush=True)

    command.model, command.adapter = local_names.on_base(command.model, command.adapter)
    spec, files = routing_job(command)
    out = Path(command.out)
    if (out / REPORT_FILE).exists():
        raise InvalidInput("--out", command.out, "a folder without a report")
    with tempfile.TemporaryDirectory() as folder:
        rows = {name: Path(folder) / f"{name}.jsonl" for name in files}
        for name, path in files.items():
            rows[name].write_text("".join(routing_rows(path, spec)), encoding="utf-8")
        report = analyse(spec, rows, load_routed(spec), say, progress)
    write_report(report, out, say)
    print(report.model_dump_json() if command.as_json else f"{text(report)}\nwritten to {out / REPORT_FILE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
