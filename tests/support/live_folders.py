"""What lies in a folder that a running process changes: a path found may be gone when it is looked at."""

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path


def everything(folder: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """Give the folder and all below it with their `lstat`, but what goes away meanwhile."""
    with suppress(FileNotFoundError):
        yield folder, folder.lstat()
    for parent, folders, files in os.walk(folder):  # which overlooks folders that are gone
        for name in (*folders, *files):
            path = Path(parent, name)
            with suppress(FileNotFoundError):
                yield path, path.lstat()


def contents(folder: Path) -> Iterator[tuple[Path, bytes]]:
    """Give every file below a folder with its bytes, but those that go away meanwhile."""
    for path, _ in everything(folder):
        if path.is_file():
            with suppress(FileNotFoundError):
                yield path, path.read_bytes()
