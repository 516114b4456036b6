"""Prune experts without a server: the code of `moe-train experts prune`.

$ moe-train experts prune MODEL --keep 6 --rows FILE --out pruned [--dry-run]
"""

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from transformers.utils import logging

from llama_stack_provider_moe.compute.models.upcycle import model_folder
from llama_stack_provider_moe.compute.surgery.prune import choose, prepare, prune
from llama_stack_provider_moe.compute.surgery.report import text
from llama_stack_provider_moe.compute.surgery.rows import load_rows
from llama_stack_provider_moe.jobdir import local_names
from llama_stack_provider_moe.spec.command_words import answered
from llama_stack_provider_moe.spec.local_rows import calibration_rows
from llama_stack_provider_moe.spec.surgery_commands import PRUNE_COMMAND, PruneCommand, prune_settings


def main(argv: Sequence[str] | None = None) -> int:
    """Run `moe-train experts prune`; returns 0 if OUT was written, or the dry run is shown."""
    logging.disable_progress_bar()
    return answered(PRUNE_COMMAND, argv, "experts prune", _run)


def _run(command: PruneCommand) -> int:
    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    def progress(done: int, total: int) -> None:
        end = "\n" if done == total or not sys.stderr.isatty() else "\r"
        print(f"{done} of {total} passes of rows", file=sys.stderr, end=end, flush=True)

    asked, training, options = prune_settings(command)
    model = local_names.whole_model(command.model, "MODEL")
    folder = model_folder(model, "model")
    pruning = prepare(folder, asked, field="--")
    if command.rows is None:
        choice = choose(pruning, None)
    else:
        with tempfile.TemporaryDirectory() as beside:
            file = Path(beside) / "rows.jsonl"
            file.write_text("".join(calibration_rows(Path(command.rows), "--rows")), encoding="utf-8")
            rows = load_rows(str(folder), file, command.rows, training, options, say)
            choice = choose(pruning, rows, progress)
            del rows  # the model is not needed to write the other one
    report = prune(pruning, choice, command.model, None if command.dry_run else Path(command.out), say)
    print(report.model_dump_json() if command.as_json else text(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
