"""A probe without a server: the code of `moe-train probe fit`.

$ moe-train probe fit MODEL --rows target=FILE --rows baseline=FILE [--adapter FOLDER] ...
"""

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from transformers.utils import logging

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
    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    def progress(done: int, total: int) -> None:
        end = "\n" if done == total or not sys.stderr.isatty() else "\r"
        print(f"{done} of {total} texts", file=sys.stderr, end=end, flush=True)

    command.model, command.adapter = local_names.on_base(command.model, command.adapter)
    spec, files = fit_job(command)
    out = Path(command.out)
    if (out / CARD_FILE).exists():
        raise InvalidInput("--out", command.out, f"a folder without {CARD_FILE}")
    with tempfile.TemporaryDirectory() as folder:
        rows = {name: Path(folder) / f"{name}.jsonl" for name in files}
        for name, path in files.items():
            rows[name].write_text("".join(probe_rows(path, name, spec)), encoding="utf-8")
        try:
            fitted, _ = fit_probe(spec, rows, say, progress)
        except InvalidInput as error:
            raise InvalidBody([as_typed(str(error))]) from None
        except DataError as error:
            raise DataError(as_typed(str(error))) from None
    card = write_probe(out, fitted.card, fitted.regressions)
    print(card.model_dump_json() if command.as_json else f"{text(card, fitted.candidates)}\nwritten to {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
