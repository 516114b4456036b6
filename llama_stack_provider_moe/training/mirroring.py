"""A job's copies in a mirror, as its training process makes them: beside training, which waits for none of them.

What can't be copied is tried again with the next checkpoint and at the job's end; it never ends the job, which has all
of it on its own disk.
"""

import os
import threading
from pathlib import Path

from llama_stack_provider_moe.config import MIRROR_VARIABLE
from llama_stack_provider_moe.errors import CheckpointError
from llama_stack_provider_moe.jobs.folder import Artifact
from llama_stack_provider_moe.jobs.mirrors import Mirror
from llama_stack_provider_moe.spec import JobSpec
from llama_stack_provider_moe.training.session import AnySession, Session

# What a job that is asked to stop waits for its last copy; supervisor.cancel_grace_s is 60 by default.
STOP_S = 30.0
_CHECKPOINTS = "checkpoints"


class Mirroring[S: JobSpec]:
    """Copies what a job publishes, and forgets what it prunes. Without a mirror (`mirror.url`) it does nothing.

    Args:
        session: of the job.
    """

    def __init__(self, session: Session[S]) -> None:
        self._session = session
        # One process of a job writes.
        self._base = os.environ.get(MIRROR_VARIABLE, "") if session.peers.leads else ""
        self._mirror: Mirror | None = None
        self._due: dict[str, Path | None] = {}  # name there -> folder here; None: to be forgotten
        self._told: set[str] = set()  # failures, each said once
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def keep(self, artifact: Artifact) -> None:
        """Have what was published copied."""
        path = Path(artifact.path)
        kind = _CHECKPOINTS if artifact.kind == "checkpoint" else "artifacts"
        self._want(f"{kind}/{path.name}", path)

    def forget(self, checkpoint: Path) -> None:
        """Have the copy of a pruned checkpoint removed."""
        self._want(f"{_CHECKPOINTS}/{checkpoint.name}", None)

    def finish(self, limit_s: float | None = None) -> None:
        """Wait until all is copied, or can't be for now; no longer than `limit_s`."""
        thread = self._thread
        if thread is not None:
            thread.join(limit_s)
            if thread.is_alive():
                self._session.say(f"stops before {', '.join(self._due)} could be copied to mirror.url", "warning")
                return
        if self._due:
            self._work()

    def _want(self, name: str, folder: Path | None) -> None:
        if not self._base:
            return
        with self._lock:
            self._due.pop(name, None)  # to the end of the line
            self._due[name] = folder
            if self._thread is None:
                # A job that is killed meanwhile leaves what is not listed there.
                self._thread = threading.Thread(target=self._work, name="mirror", daemon=True)
                self._thread.start()

    def _work(self) -> None:
        """One attempt at each thing that is due."""
        tried: set[tuple[str, Path | None]] = set()
        while True:
            with self._lock:
                left = next((item for item in self._due.items() if item not in tried), None)
                if left is None:
                    self._thread = None  # whoever comes now starts another
                    return
            tried.add(left)
            if self._done(*left):
                with self._lock:
                    if self._due.get(left[0], Path()) == left[1]:  # not asked for anew meanwhile
                        del self._due[left[0]]

    def _done(self, name: str, folder: Path | None) -> bool:
        try:
            if self._mirror is None:
                self._mirror = Mirror.of(self._session.folder, self._base)
            if folder is None:
                self._mirror.remove(name)
            elif sent := self._mirror.put(folder, name):
                self._session.show(f"{name} copied to {self._mirror.url} ({sent:,} bytes)")
        except (OSError, ValueError) as error:
            if folder is not None and not folder.is_dir():
                return True  # pruned while it waited or was read; that its copy is to go is due already
            if str(error) not in self._told:
                self._told.add(str(error))
                self._session.say(f"{name} can't be copied to mirror.url for now: {error}", "warning")
            return False
        return True


def bring_back(session: AnySession) -> int:
    """Fetch the checkpoints that are in the mirror and not in this machine's folder; how many."""
    base, fetched = os.environ.get(MIRROR_VARIABLE), 0
    if not base:
        return 0
    home = session.folder.checkpoints(session.spec)
    try:
        mirror = Mirror.of(session.folder, base)
        session.show(f"checkpoints and artifacts are copied to {mirror.url}")
        names = [name for name in mirror.names() if name.startswith(f"{_CHECKPOINTS}/")]
    except (OSError, ValueError) as error:
        session.say(f"mirror.url can't be reached for now: {error}", "warning")
        return 0
    for name in names:
        try:
            if mirror.fetch(name, home / name.partition("/")[2]):
                fetched += 1
                session.say(f"{name} fetched from {mirror.url}")
        except (OSError, ValueError) as error:
            session.say(f"{name} can't be fetched: {error}", "warning")
    return fetched


def require_here(session: AnySession, checkpoint: Path) -> None:
    """See to it that a checkpoint that rank 0 goes on from is there for this process, maybe on another machine.

    Raises:
        CheckpointError: it is not, and no mirror has it.
    """
    if not checkpoint.is_dir():
        bring_back(session)
    if not checkpoint.is_dir():
        raise CheckpointError(
            f"{checkpoint} is not there for process {session.peers.rank}: a job's machines share its folders, or have "
            "a mirror.url"
        )
