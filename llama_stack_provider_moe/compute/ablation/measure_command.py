"""A measurement without a server: the code of `moe-train ablate measure`.

$ moe-train ablate measure MODEL --rows target=FILE --rows baseline=FILE [--adapter FOLDER] ...
"""

import sys
from collections.abc import Sequence

from transformers.utils import logging

from llama_stack_provider_moe.compute.ablation.analyze import analyze, text
from llama_stack_provider_moe.compute.ablation.measure import measured, write_measurements
from llama_stack_provider_moe.compute.ablation.subject import load_subject
from llama_stack_provider_moe.compute.data import local_sets
from llama_stack_provider_moe.jobdir import local_names
from llama_stack_provider_moe.spec.ablate_commands import MEASURE_COMMAND, MeasureCommand, measure_job
from llama_stack_provider_moe.spec.ablation import MEASUREMENTS_FILE
from llama_stack_provider_moe.spec.command_words import answered
from llama_stack_provider_moe.spec.local_rows import measured_rows


def main(argv: Sequence[str] | None = None) -> int:
    """Run `moe-train ablate measure`; returns 0 if the measurements were written."""
    logging.disable_progress_bar()
    return answered(MEASURE_COMMAND, argv, "ablate measure", _run)


def _run(command: MeasureCommand) -> int:
    command.model, command.adapter = local_names.on_base(command.model, command.adapter)
    spec, files = measure_job(command)
    out = local_sets.new_folder(command.out, MEASUREMENTS_FILE)
    with local_sets.as_rows(files, lambda path, _: measured_rows(path, spec)) as rows:
        subject, progress = load_subject(spec), local_sets.progress_of("passes of rows")
        found, routing = measured(spec, rows, subject, local_sets.say, progress)
    path = write_measurements(found, routing, out, local_sets.say)
    report = analyze(found)
    print(report.model_dump_json() if command.as_json else f"{text(report)}\nwritten to {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
