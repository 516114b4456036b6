"""A probe without a server: the code of `moe-train probe fit`.

$ moe-train probe fit MODEL --rows target=FILE --rows baseline=FILE [--adapter FOLDER] ...
"""

import sys
from collections.abc import Sequence

from transformers.utils import logging

from llama_stack_provider_moe.compute.data import local_sets
from llama_stack_provider_moe.compute.probing.artifact import write_probe
from llama_stack_provider_moe.compute.probing.fit import fit_probe
from llama_stack_provider_moe.compute.probing.report import text
from llama_stack_provider_moe.errors import DataError, InvalidBody, InvalidInput
from llama_stack_provider_moe.jobdir import local_names
from llama_stack_provider_moe.spec.command_words import answered
from llama_stack_provider_moe.spec.local_rows import probe_rows
from llama_stack_provider_moe.spec.probe import CARD_FILE
from llama_stack_provider_moe.spec.probe_commands import FIT_COMMAND, FitCommand, as_typed, fit_job


def main(argv: Sequence[str] | None = None) -> int:
    """Run `moe-train probe fit`; returns 0 if the probe was written."""
    logging.disable_progress_bar()
    return answered(FIT_COMMAND, argv, "probe fit", _run)


def _run(command: FitCommand) -> int:
    command.model, command.adapter = local_names.on_base(command.model, command.adapter)
    spec, files = fit_job(command)
    out = local_sets.new_folder(command.out, CARD_FILE)
    with local_sets.as_rows(files, lambda path, name: probe_rows(path, name, spec)) as rows:
        try:
            fitted, _ = fit_probe(spec, rows, local_sets.say, local_sets.progress_of("texts"))
        except InvalidInput as error:
            raise InvalidBody([as_typed(str(error))]) from None
        except DataError as error:
            raise DataError(as_typed(str(error))) from None
    card = write_probe(out, fitted.card, fitted.regressions)
    print(card.model_dump_json() if command.as_json else f"{text(card, fitted.candidates)}\nwritten to {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
