"""Copy a job's files to a mirror while it trains; training does not wait for the copies.

A copy that fails is tried again with the next checkpoint and at the job's end. It never fails the job, which has all
files on its own disk.
"""

import os
import threading
from pathlib import Path

from llama_stack_provider_moe.compute.runtime.context import AnySession, Session
from llama_stack_provider_moe.errors import CheckpointError
from llama_stack_provider_moe.ground import liveness
from llama_stack_provider_moe.jobdir.attempt import require_current
from llama_stack_provider_moe.jobdir.folder import Artifact
from llama_stack_provider_moe.jobdir.mirror import Mirror
from llama_stack_provider_moe.spec import JobSpec
from llama_stack_provider_moe.spec.server_config import MIRROR_VARIABLE

# How long a job that is asked to stop waits for its last copy; supervisor.cancel_grace_s is 60 by default.
STOP_S = 30.0
_CHECKPOINTS = "checkpoints"


class Mirroring[S: JobSpec]:
    """Copies what a job publishes, and removes the copies of what it prunes. Does nothing without `mirror.url`.

    Args:
        session: the job's session.
    """

    def __init__(self, session: Session[S]) -> None:
        self._session = session
        # Only one process of a job writes to the mirror.
        self._base = os.environ.get(MIRROR_VARIABLE, "") if session.peers.leads else ""
        self._mirror: Mirror | None = None
        self._due: dict[str, Path | None] = {}  # name in the mirror -> local folder; None: remove the copy
        self._counter: liveness.Counter | None = None
        self._reported: set[str] = set()  # failures; each is reported once
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def keep(self, artifact: Artifact) -> None:
        """Request a copy of a published artifact."""
        path = Path(artifact.path)
        kind = _CHECKPOINTS if artifact.kind == "checkpoint" else "artifacts"
        self._want(f"{kind}/{path.name}", path)

    def forget(self, checkpoint: Path) -> None:
        """Request that the copy of a pruned checkpoint is removed."""
        self._want(f"{_CHECKPOINTS}/{checkpoint.name}", None)

    def finish(self, limit_s: float | None = None) -> None:
        """Wait until everything is copied or has failed, for at most `limit_s` seconds."""
        if not self._due:
            return
        with liveness.stage("copying to the mirror", unit="bytes") as self._counter:
            self._finish(limit_s)
        self._counter = None

    def _finish(self, limit_s: float | None) -> None:
        thread = self._thread
        if thread is not None:
            thread.join(limit_s)
            if thread.is_alive():
                self._session.say(f"the job stops before it copied {', '.join(self._due)} to mirror.url", "warning")
                return
        if self._due:
            self._work()

    def _count(self, sent_bytes: int) -> None:
        """Count sent bytes: a sign of life, but only while the job waits for the copies."""
        if self._counter is not None:
            self._counter.advance(sent_bytes)

    def _want(self, name: str, folder: Path | None) -> None:
        if not self._base:
            return
        with self._lock:
            self._due.pop(name, None)  # so that it goes to the end of the queue
            self._due[name] = folder
            if self._thread is None:
                # A daemon: if the job is killed during a copy, the mirror does not list that copy.
                self._thread = threading.Thread(target=self._work, name="mirror", daemon=True)
                self._thread.start()

    def _work(self) -> None:
        """Try each due item once."""
        tried: set[tuple[str, Path | None]] = set()
        while True:
            with self._lock:
                left = next((item for item in self._due.items() if item not in tried), None)
                if left is None:
                    self._thread = None  # the next request starts another thread
                    return
            tried.add(left)
            if self._done(*left):
                with self._lock:
                    if self._due.get(left[0], Path()) == left[1]:  # there was no new request for it meanwhile
                        del self._due[left[0]]

    def _done(self, name: str, folder: Path | None) -> bool:
        require_current()
        try:
            if self._mirror is None:
                self._mirror = Mirror.of(self._session.folder, self._base)
            if folder is None:
                self._mirror.remove(name)
            elif sent := self._mirror.put(folder, name, self._count):
                self._session.show(f"{name} copied to {self._mirror.url} ({sent:,} bytes)")
        except (OSError, ValueError) as error:
            if folder is not None and not folder.is_dir():
                return True  # it was pruned meanwhile, and the removal of its copy is already requested
            if str(error) not in self._reported:
                self._reported.add(str(error))
                self._session.say(f"{name} can't be copied to mirror.url for now: {error}", "warning")
            return False
        return True


def bring_back(session: AnySession) -> int:
    """Fetch the checkpoints that are in the mirror but not on this machine; returns how many."""
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
    """Make sure that this process, which may run on another machine, has the checkpoint that rank 0 resumes from.

    Raises:
        CheckpointError: it does not, and no mirror has the checkpoint.
    """
    if not checkpoint.is_dir():
        bring_back(session)
    if not checkpoint.is_dir():
        raise CheckpointError(
            f"process {session.peers.rank} does not find {checkpoint}; expected machines that share the job's folders, "
            "or a mirror.url"
        )
