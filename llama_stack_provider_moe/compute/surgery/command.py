"""Surgery without a server: what `moe-train experts prune`, `merge`, `add` and `split` have in common."""

import tempfile
from pathlib import Path

from transformers.utils import logging

from llama_stack_provider_moe.compute.data.local_sets import progress_of, say
from llama_stack_provider_moe.compute.models.upcycle import model_folder
from llama_stack_provider_moe.compute.surgery.actions import choose, prepare
from llama_stack_provider_moe.compute.surgery.prepared import OF_COMMAND, Decision, Prepared, make
from llama_stack_provider_moe.compute.surgery.report import text
from llama_stack_provider_moe.compute.surgery.rows import load_rows
from llama_stack_provider_moe.errors import InvalidBody, LayoutError, ModelError
from llama_stack_provider_moe.jobdir import local_names
from llama_stack_provider_moe.spec.local_rows import calibration_rows
from llama_stack_provider_moe.spec.surgery import Surgery
from llama_stack_provider_moe.spec.surgery_commands import SurgeryCommand, SurgerySettings, as_typed, surgery_settings


def run(command: SurgeryCommand) -> int:
    """Choose, measure where there are rows, and write OUT unless it is a dry run."""
    logging.disable_progress_bar()
    settings = surgery_settings(command)
    folder = model_folder(local_names.whole_model(command.model, "MODEL"), "MODEL")
    try:
        prepared = prepare(folder, _with_donor(settings.surgery), field=OF_COMMAND)
        decision = _decided(prepared, settings)
        report = make(prepared, decision, command.model, None if command.dry_run else Path(command.out), say)
    except (ModelError, LayoutError) as error:  # MODEL is not one for this command: a mistake, as other values are
        raise InvalidBody([as_typed(str(error))]) from None
    print(report.model_dump_json() if command.as_json else text(report))
    return 0


def _with_donor(asked: Surgery) -> Surgery:
    """The same settings, where a job's name in --mlp-from is the folder of its model."""
    if asked.add is None or asked.add.mlp_from is None:
        return asked
    found = local_names.whole_model(asked.add.mlp_from, "--mlp-from")
    return asked.model_copy(update={"add": asked.add.model_copy(update={"mlp_from": found})})


def _decided(prepared: Prepared, settings: SurgerySettings) -> Decision:
    """The model is in memory only until the decision is made."""
    if settings.rows is None:
        return choose(prepared, None)
    with tempfile.TemporaryDirectory() as beside:
        files = {}
        for option, given in (("--rows", settings.rows), ("--general-rows", settings.general_rows)):
            if given is not None:
                files[given] = Path(beside) / f"{option.strip('-')}.jsonl"
                files[given].write_text("".join(calibration_rows(Path(given), option)), encoding="utf-8")
        rows = load_rows(str(prepared.before.folder), files, settings.training, settings.options, say)
        return choose(prepared, rows, progress_of("passes of rows"))
