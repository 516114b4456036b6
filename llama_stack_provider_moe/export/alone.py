"""A comparison in a process of its own: the models that it loads are not held by whoever exports.

A merge needs the memory of some rows; the comparison after it that of a whole model. Where that is not to be had the
kernel kills this process, and not the one that has other things to export.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal, NamedTuple

from llama_stack_provider_moe.errors import ExportError, MoeError
from llama_stack_provider_moe.export.load_check import NotRecorded, check_adapter, check_merged, check_model

Question = Literal["adapter", "model", "merged"]
_SAID_LIMIT = 600  # characters


class Answer(NamedTuple):
    """What was found.

    Attributes:
        figures: of `LoadCheck` or `MergedCheck`.
        text: the same for a person.
    """

    figures: dict[str, Any]
    text: str


def compare(question: Question, *places: str | Path) -> Answer:
    """`check_adapter` (adapter, base), `check_model` (model) or `check_merged` (merged, adapter, base), elsewhere.

    Raises:
        NotRecorded: there is nothing to compare with.
        ExportError: they differ, with the figures; or the process was killed.
    """
    command = [sys.executable, "-m", __name__, question, *map(str, places)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, errors="replace")
    lines = done.stdout.splitlines()
    if done.returncode == -signal.SIGKILL:
        raise ExportError(
            "the process that loads the models to compare them was killed: memory for a whole model is needed; "
            "export.load_check false exports without"
        )
    if done.returncode or not lines:
        said = done.stderr.strip()[-_SAID_LIMIT:]
        raise ExportError(f"the process that compares ended with exit code {done.returncode}: {said}")
    found = json.loads(lines[-1])
    if "error" in found:
        raise (NotRecorded if found["not_recorded"] else ExportError)(found["error"])
    return Answer(found["figures"], found["text"])


def main(arguments: list[str]) -> int:
    """The other side; its last line of output is the answer."""
    question, *places = arguments
    try:
        if question == "adapter":
            found: Any = check_adapter(*places)
        elif question == "model":
            found = check_model(*places)
        else:
            found = check_merged(*places)
        answer = {"figures": found.model_dump(mode="json"), "text": found.text()}
    except MoeError as error:
        answer = {"error": str(error), "not_recorded": isinstance(error, NotRecorded)}
    print(json.dumps(answer))
    return 0


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main(sys.argv[1:]))
