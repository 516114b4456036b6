"""The frame of a command that measures data sets in files here: rows as a job has them, and progress on stderr."""

import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from llama_stack_provider_moe.errors import InvalidInput


def say(line: str) -> None:
    """Print a line to stderr, beside the result on stdout."""
    print(line, file=sys.stderr, flush=True)


def progress_of(what: str) -> Callable[[int, int], None]:
    """Return what prints how many of `what` are done: on one line of a terminal, else on a line each."""

    def progress(done: int, total: int) -> None:
        end = "\n" if done == total or not sys.stderr.isatty() else "\r"
        print(f"{done} of {total} {what}", file=sys.stderr, end=end, flush=True)

    return progress


def new_folder(out: str, result: str) -> Path:
    """Return the folder of `--out`, which must not have the file `result` yet.

    Raises:
        InvalidInput: it has.
    """
    folder = Path(out)
    if (folder / result).exists():
        raise InvalidInput("--out", out, f"a folder without {result}")
    return folder


@contextmanager
def as_rows(files: Mapping[str, Path], rows_of: Callable[[Path, str], Iterable[str]]) -> Iterator[dict[str, Path]]:
    """Write each set's rows as a job would have them, until the block ends: name -> file.

    Args:
        files: name of a set -> the user's file.
        rows_of: returns the lines of rows of such a file and set.
    """
    with tempfile.TemporaryDirectory() as folder:
        rows = {name: Path(folder) / f"{name}.jsonl" for name in files}
        for name, path in files.items():
            rows[name].write_text("".join(rows_of(path, name)), encoding="utf-8")
        yield rows
