"""A measurement without a server: the code of `moe-train ablate measure`.

$ moe-train ablate measure MODEL --rows target=FILE --rows baseline=FILE [--adapter FOLDER] ...
"""

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from transformers.utils import logging

from llama_stack_provider_moe.compute.ablation.analyze import analyze, text
from llama_stack_provider_moe.compute.ablation.measure import measured, write_measurements
from llama_stack_provider_moe.compute.ablation.subject import load_subject
from llama_stack_provider_moe.errors import InvalidInput
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
    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    def progress(done: int, total: int) -> None:
        end = "\n" if done == total or not sys.stderr.isatty() else "\r"
        print(f"{done} of {total} passes of rows", file=sys.stderr, end=end, flush=True)

    command.model, command.adapter = local_names.on_base(command.model, command.adapter)
    spec, files = measure_job(command)
    out = Path(command.out)
    if (out / MEASUREMENTS_FILE).exists():
        raise InvalidInput("--out", command.out, f"a folder without {MEASUREMENTS_FILE}")
    with tempfile.TemporaryDirectory() as folder:
        rows = {name: Path(folder) / f"{name}.jsonl" for name in files}
        for name, path in files.items():
            rows[name].write_text("".join(measured_rows(path, spec)), encoding="utf-8")
        found, routing = measured(spec, rows, load_subject(spec), say, progress)
    path = write_measurements(found, routing, out, say)
    report = analyze(found)
    print(report.model_dump_json() if command.as_json else f"{text(report)}\nwritten to {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
