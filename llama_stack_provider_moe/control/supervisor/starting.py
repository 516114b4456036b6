"""Start a supervisor. Each server does it when it finds that none is alive."""

import fcntl
import subprocess
import sys
import threading
from contextlib import suppress

from llama_stack_provider_moe.control.store.store import JobStore, LiveSupervisor
from llama_stack_provider_moe.control.supervisor.processes import ProcessName
from llama_stack_provider_moe.spec.server_config import ProviderConfig

LOG_LIMIT_BYTES = 5 << 20
_MODULE = f"{__package__}.supervisor"  # not imported: servers import this module when they start


def has_ended(holder: LiveSupervisor) -> bool:
    """Return whether the process that holds the lease is known to have ended."""
    name = ProcessName.parse(holder.id)
    return name is not None and name.has_ended()


def ensure_supervisor(config: ProviderConfig, store: JobStore) -> bool:
    """Start a supervisor unless one is alive or starting. Call it after you insert a job.

    Several servers and threads may call it at once. A lock file allows one start at a time. If two supervisors
    start anyway, the one that does not get the lease ends. The new process is detached: it outlives the server, and its
    output goes to `supervisor.log` in the state folder.

    Returns:
        Whether a supervisor was started.
    """
    holder = store.live_supervisor()
    if not config.supervisor.start or (holder is not None and not has_ended(holder)):
        return False
    config.privacy.make_folder(config.state_dir)
    with config.privacy.appended(config.state_dir / "supervisor.starting") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            # The other supervisor takes the lease before it releases the lock, and then sees the new job.
            return False
        _start(config, lock.fileno())
    return True


def _start(config: ProviderConfig, lock: int) -> None:
    path = config.state_dir / "supervisor.log"
    if path.exists() and path.stat().st_size > LOG_LIMIT_BYTES:
        path.replace(path.with_suffix(".log.1"))
    with config.privacy.appended(path) as output:
        process = subprocess.Popen(
            [sys.executable, "-m", _MODULE, str(lock)],
            bufsize=0,
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            pass_fds=(lock,),  # the lock is released when this server and the supervisor have both closed it
        )
    assert process.stdin is not None
    with suppress(BrokenPipeError), process.stdin:  # the supervisor died; supervisor.log says why
        process.stdin.write(config.model_dump_json().encode())
    # A sleeping thread reaps the process. Otherwise a long-lived server would collect zombies.
    threading.Thread(target=process.wait, name="moe-supervisor", daemon=True).start()
