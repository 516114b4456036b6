"""What a state folder contains and who owns it. A server changes the mode only of files that it created.

A folder that others use can't be a state folder: its mode, and names in it such as `jobs` and `models`, belong to them.
"""

import os
import re
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from llama_stack_provider_moe.errors import InvalidInput
from llama_stack_provider_moe.ground.private import Privacy

STORE_FILE = "store-id"
# Names that a server, a supervisor or a job creates in a state folder. `models` is missing because users fill it.
OURS = (
    "jobs", "staging", "deleted", "set-aside", "checkpoints", "datasets",
    "flagged",  # where the guide puts what shields flagged
    STORE_FILE, "jobs.db", "jobs.db-wal", "jobs.db-shm", "jobs.db-reserve",
    "telemetry.lock", "audit",
    "supervisor.starting", "supervisor.log", "supervisor.log.1", "forkserver.log", "forkserver.log.1",
    "nursery.log", "nursery.log.1",  # of earlier versions
)  # fmt: skip
PROBE_PREFIX = ".moe-train."  # prefix of the file that tests whether a folder is writable
# Names that may exist before the first start: models; the host's run YAML, databases, logs and uploaded files (run
# configs put them here); files that a file system keeps in its root; and our temporary files.
_EXPECTED = re.compile(
    rf"models|host-files|[^.].*\.(db|db-wal|db-shm|db-journal|log|yaml|yml)|lost\+found|\.nfs.*|"
    rf"\.({re.escape(STORE_FILE)}|jobs\.db)\..*|{re.escape(PROBE_PREFIX)}.*"
)
_SHOWN = 3


def refusal(state_dir: Path) -> InvalidInput | None:
    """Return why this folder can't be a state folder; None if it can, or does not exist yet.

    Raises:
        OSError: The folder can't be read.
    """
    if not state_dir.is_dir() or _is_marked(state_dir):
        return None
    if state_dir in _shared_places():
        why = "this one is a home folder, or a folder that everybody shares"
    elif others := _others(state_dir):
        why = f"this one contains other files ({_listed(others)})"
    else:
        return None
    return InvalidInput(
        "state_dir",
        str(state_dir),
        f"an empty or new folder for this server alone, such as {str(state_dir / 'moe')!r}, or one that such a server "
        f"has used before: {why}, and a server closes its state folder to other users",
    )


def left_open(state_dir: Path) -> str | None:
    """Return why other users can still read or write the state folder after the start; None if they can't.

    Raises:
        OSError: The folder can't be read.
    """
    if not state_dir.is_dir() or not state_dir.stat().st_mode & stat.S_IRWXO:
        return None
    shared = _shared(state_dir)
    return None if shared is None else (
        f"state_dir: {str(state_dir)!r} stays open to other users (mode {stat.S_IMODE(state_dir.stat().st_mode):o}): "
        f"{shared}; a folder for the server alone is safer"
    )  # fmt: skip


def tighten(state_dir: Path, privacy: Privacy, note: Callable[[str], None]) -> None:
    """Remove access that an earlier version gave to other users. Call it before anything is created.

    Args:
        state_dir: The state folder; it may be missing.
        privacy: The modes to set.
        note: Called with a message for each mode that can't be changed.
    """
    if not state_dir.is_dir():
        return
    if _shared(state_dir) is None:
        privacy.tighten(state_dir, note)
    if not _is_marked(state_dir):
        return  # no server has used it, so nothing in it is ours, whatever its name
    jobs = state_dir / "jobs"
    for path in (*(state_dir / name for name in OURS), *(jobs.iterdir() if jobs.is_dir() else ())):
        privacy.tighten(path, note)


def _is_marked(state_dir: Path) -> bool:
    """Whether a server has used it. Each creates `store-id`; earlier versions created a store, or these two folders."""
    marks = [[STORE_FILE], ["jobs.db"], ["jobs", "staging"]]
    return any(all(_is_ours(state_dir, name) for name in each) for each in marks)


def _is_ours(state_dir: Path, name: str) -> bool:
    """Whether this user's server created the file. In a folder that everybody can write to, the owner must match."""
    try:
        found = (state_dir / name).lstat()
    except FileNotFoundError:
        return False
    return found.st_uid == os.geteuid() or not state_dir.stat().st_mode & stat.S_IWOTH


def _others(state_dir: Path) -> list[str]:
    """Names that neither our server nor its host creates."""
    return sorted(
        each.name for each in state_dir.iterdir() if each.name not in OURS and not _EXPECTED.fullmatch(each.name)
    )


def _shared(state_dir: Path) -> str | None:
    """Return why we may not change the folder's own mode; None if we may."""
    found, me = state_dir.stat(), os.geteuid()
    if found.st_uid != me:
        return f"it belongs to another user (uid {found.st_uid})"
    others = _others(state_dir)
    if others and (found.st_mode & stat.S_IWOTH or any((state_dir / name).lstat().st_uid != me for name in others)):
        return f"others use it too ({_listed(others)})"
    return None


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(map(repr, names[:_SHOWN])) + more


def _shared_places() -> Iterator[Path]:
    for name in ("/", "/tmp", "/var/tmp", "/dev/shm", tempfile.gettempdir(), os.path.expanduser("~")):
        yield Path(name).resolve()
