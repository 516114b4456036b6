"""The surgeries by name: each checks what the config shows, then decides, on rows if it needs any."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from llama_stack_provider_moe.compute.export.shard_files import Progress
from llama_stack_provider_moe.compute.surgery import add, merge, prune, split
from llama_stack_provider_moe.compute.surgery.prepared import Decision, Prepared, Rows
from llama_stack_provider_moe.spec.surgery import Action, Surgery


class _Steps(NamedTuple):
    prepare: Callable[[Path, Surgery, str], Prepared]
    choose: Callable[[Prepared, Rows | None, Progress], Decision]


_ACTIONS: dict[Action, _Steps] = {
    "prune": _Steps(prune.prepare, prune.choose),
    "merge": _Steps(merge.prepare, merge.choose),
    "add": _Steps(add.prepare, add.choose),
    "split": _Steps(split.prepare, split.choose),
}


def prepare(folder: Path, asked: Surgery, field: str = "surgery.") -> Prepared:
    """Check everything that can be known from the config.

    Args:
        folder: of the model.
        asked: what to do.
        field: what comes before the names of the settings in errors.

    Raises:
        InvalidInput: the settings are not valid for this model.
        ModelError, LayoutError: see `resized.describe` and `resized.resize`.
    """
    return _ACTIONS[asked.action].prepare(folder, asked, field)


def choose(
    prepared: Prepared, rows: Rows | None, progress: Progress = lambda done, total: None
) -> Decision:  # fmt: skip
    """Decide what the new model is made of, and measure it where there are rows.

    Args:
        prepared: the checked surgery.
        rows: a loaded model and its rows, if any.
        progress: called with the number of passes of rows that are done and their total.

    Raises:
        InvalidInput: this can't be decided without rows.
        DataError: the rows have no tokens to measure.
    """
    return _ACTIONS[prepared.asked.action].choose(prepared, rows, progress)
