"""Run a comparison in a separate process, so that the exporting process does not hold the models.

A merge needs memory for a few rows; the comparison after it needs memory for a whole model. If there is too little, the
kernel kills the separate process, and the exporting process continues with its other exports.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Literal, NamedTuple, TypedDict, cast

from llama_stack_provider_moe.compute.export.load_check import NotRecorded, check_adapter, check_merged, check_model
from llama_stack_provider_moe.compute.export.load_figures import LoadCheck, MergedCheck
from llama_stack_provider_moe.errors import ExportError, MoeError
from llama_stack_provider_moe.ground import liveness, run

Question = Literal["adapter", "model", "merged"]
_MODULE = "llama_stack_provider_moe.compute.export.separate_process"
_ERRORS_LIMIT = 600  # characters


class _Line(TypedDict, total=False):
    """One line of JSON from the child: progress, an error, or the answer."""

    work: tuple[str, int, int | None, str]  # fields of `liveness.Work`; JSON makes a list of it
    error: str
    not_recorded: bool
    figures: dict[str, object]
    text: str


class Answer(NamedTuple):
    """The result of a comparison.

    Attributes:
        figures: the fields of a `LoadCheck` or `MergedCheck`.
        text: the same in words.
    """

    figures: dict[str, object]
    text: str


def compare(question: Question, *places: str | Path) -> Answer:
    """Run `check_adapter` (adapter, base), `check_model` (model) or `check_merged` (merged, adapter, base) elsewhere.

    Raises:
        NotRecorded: there is nothing to compare with.
        ExportError: the models differ (with figures), or the process was killed.
    """
    command = [*run.command(sys.executable, _MODULE), question, *map(str, places)]
    found: _Line = {}
    with (
        tempfile.TemporaryFile() as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, errors="replace") as child,
        liveness.stage("comparing logits") as counter,
    ):
        assert child.stdout is not None
        try:
            for line in child.stdout:
                found = _read(line)
                if "work" in found:  # progress of the child; the last line is the answer
                    counter.relay(liveness.Work(*found.pop("work")))
            code = child.wait()
        except BaseException:  # asked to stop
            child.kill()
            raise
        errors.seek(0)
        tail = errors.read().decode(errors="replace").strip()[-_ERRORS_LIMIT:]
    if code == -signal.SIGKILL:
        raise ExportError(
            "the process that loads and compares the models was killed: it needs memory for a whole model; "
            "export.load_check false skips the comparison"
        )
    if code or not found:
        raise ExportError(f"the process that compares the models ended with exit code {code}: {tail}")
    if "error" in found:
        raise (NotRecorded if found["not_recorded"] else ExportError)(found["error"])
    return Answer(found["figures"], found["text"])


def _read(line: str) -> _Line:
    """A line from the child; empty if a library printed it."""
    try:
        found = json.loads(line)
    except ValueError:
        return {}
    return cast(_Line, found) if isinstance(found, dict) else {}


def _show(work: liveness.Work) -> None:
    print(json.dumps({"work": work}), flush=True)


def main(arguments: list[str] | None = None) -> int:
    """The child process; the last line of its output is the answer."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    question, *places = sys.argv[1:] if arguments is None else arguments
    try:
        with liveness.reports_to(_show):
            if question == "adapter":
                found: LoadCheck | MergedCheck = check_adapter(*places)
            elif question == "model":
                found = check_model(*places)
            else:
                found = check_merged(*places)
        answer: _Line = {"figures": found.model_dump(mode="json"), "text": found.text()}
    except MoeError as error:
        answer = {"error": str(error), "not_recorded": isinstance(error, NotRecorded)}
    print(json.dumps(answer))
    return 0


if __name__ == "__main__":
    sys.exit(main())
