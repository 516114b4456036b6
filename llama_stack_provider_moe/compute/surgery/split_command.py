"""Split experts without a server: the code of `moe-train experts split`.

$ moe-train experts split MODEL --factor 2 --out split [--dry-run]
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from transformers.utils import logging

from llama_stack_provider_moe.compute.models.upcycle import model_folder
from llama_stack_provider_moe.compute.surgery.report import text
from llama_stack_provider_moe.compute.surgery.split import prepare_split, split
from llama_stack_provider_moe.jobdir import local_names
from llama_stack_provider_moe.spec.command_words import answered
from llama_stack_provider_moe.spec.surgery import Surgery
from llama_stack_provider_moe.spec.surgery_commands import SplitCommand


def main(argv: Sequence[str] | None = None) -> int:
    """Run `moe-train experts split`; returns 0 if OUT was written, or the dry run is shown."""
    logging.disable_progress_bar()
    return answered(SplitCommand, argv, "experts split", _run)


def _run(command: SplitCommand) -> int:
    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    folder = model_folder(local_names.whole_model(command.model, "MODEL"), "model")
    splitting = prepare_split(folder, Surgery(action="split", factor=command.factor), field="--")
    report = split(splitting, command.model, None if command.dry_run else Path(command.out), say)
    print(report.model_dump_json() if command.as_json else text(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
