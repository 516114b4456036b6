"""Shared by the tests of the command line: `moe-train` in this process, and its result."""

import contextlib
import io
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

from llama_stack_provider_moe.control.cli import commands

MOE_TRAIN = [
    sys.executable,
    "-c",
    "import sys; from llama_stack_provider_moe.control.cli import main; sys.exit(main())",
]


class Done(NamedTuple):
    """The result of a command."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        return json.loads(self.out)

    @property
    def lines(self) -> list[Any]:
        return [json.loads(line) for line in self.out.splitlines()]

    @property
    def error(self) -> Any:
        return json.loads(self.err)["error"]


def moe_train(*words: str) -> Done:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = commands.main(list(words))
        except SystemExit as left:
            code = int(left.code or 0)
    return Done(code, out.getvalue(), err.getvalue())


def template_at(folder: Path) -> Path:
    """A job template."""
    path = folder / "job.json"
    path.write_text(json.dumps({"recipe": "sft", "model": "plan/completes", "data": {"dataset_id": "rows"}}))
    return path
