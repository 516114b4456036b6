"""Who else reads a job's files: shields of a server, which may be another server than the one that knows the job.

JOB/readers/<id>.json    a reader: {"who", "what", "state_dir", "machine"}

A reader counts until its owner takes it back (`register` with other paths), or until the reader's own state folder is
gone from the machine that it was on. Whoever deletes a job asks `of` first.
"""

import hashlib
import json
import os
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from pydantic import ValidationError

from llama_stack_provider_moe.ground.small_files import read_small
from llama_stack_provider_moe.jobdir.folder import JobFolder, write_atomic
from llama_stack_provider_moe.jobdir.reading import read_as
from llama_stack_provider_moe.spec.blocks import Block

FOLDER = "readers"
LISTED = "reads.json"  # in the reader's state folder: the job folders that it is registered in
_MODE = 0o600


class Reader(Block):
    """A reader of a job's files.

    Attributes:
        who: for the owner of the job; no path of the server.
        what: settings of the reader that name files of the job.
        state_dir: of the reader.
        machine: that `state_dir` is on.
    """

    who: str
    what: list[str]
    state_dir: str
    machine: str

    def __str__(self) -> str:
        return f"{self.who} ({', '.join(self.what)})"


class Registered(NamedTuple):
    """What `register` did.

    Attributes:
        jobs: the folders of the jobs whose files are read.
        problems: why a job could still be deleted, each a sentence.
    """

    jobs: list[Path]
    problems: list[str]


def job_of(path: Path) -> Path | None:
    """Return the folder of the job that a file or folder belongs to; None if it belongs to none."""
    real = path.resolve()
    for each in (real, *real.parents):
        if each.parent.name == "jobs" and JobFolder(each).spec.is_file():
            return each
    return None


def register(state_dir: Path, who: str, paths: Mapping[str, Sequence[Path]]) -> Registered:
    """Say that these files are read from now on, and no others that were read before.

    Args:
        state_dir: of the reader.
        who: the reader, for the owners of jobs.
        paths: setting of the reader -> files or folders that it reads because of it.

    Raises:
        OSError: `state_dir` can't be written.
    """
    wanted: dict[Path, list[str]] = {}
    for setting, read in paths.items():
        for job in dict.fromkeys(filter(None, map(job_of, read))):
            wanted.setdefault(job, []).append(setting)
    name = f"{hashlib.sha256(str(state_dir).encode()).hexdigest()[:16]}.json"
    listed = state_dir / LISTED
    for old in _listed(listed):
        if old not in wanted:
            (old / FOLDER / name).unlink(missing_ok=True)
    problems = []
    for job, what in wanted.items():
        reader = Reader(who=who, what=what, state_dir=str(state_dir), machine=socket.gethostname())
        try:
            (job / FOLDER).mkdir(mode=0o700, exist_ok=True)
            write_atomic(job / FOLDER / name, reader, _MODE)
        except OSError as error:
            problems.append(f"{', '.join(what)}: job {job.name!r} can be deleted although its files are read: "
                            f"{error.strerror}")  # fmt: skip
    if wanted or listed.exists():
        state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_atomic(listed, json.dumps(sorted(map(str, wanted))), _MODE)
    return Registered(list(wanted), problems)


def of(job: Path) -> list[Reader]:
    """Return who reads files of a job, by its folder."""
    found = []
    for path in sorted((job / FOLDER).glob("*.json")) if (job / FOLDER).is_dir() else ():
        try:
            reader = read_as(Reader, read_small(path))
        except (OSError, ValidationError):
            reader = Reader(who="somebody", what=[f"{FOLDER}/{path.name} can't be read"], state_dir="", machine="")
        is_gone = reader.machine == socket.gethostname() and not os.path.isdir(reader.state_dir)
        if not is_gone:
            found.append(reader)
    return found


def _listed(path: Path) -> list[Path]:
    try:
        return [Path(each) for each in json.loads(read_small(path)) if isinstance(each, str)]
    except (OSError, ValueError, TypeError):
        return []
