"""Run child processes with limits on their environment, their time and the output that is kept."""

import json
import os
import selectors
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama_stack_provider_moe.errors import ExportError, NoRoom
from llama_stack_provider_moe.ground import liveness

# The environment variables that a child gets: no tokens, no proxies, no settings of other tools.
_ALLOWED = (
    "PATH", "HOME", "LANG", "LC_ALL", "LC_CTYPE", "TMPDIR", "OMP_NUM_THREADS", "LD_LIBRARY_PATH", "VIRTUAL_ENV",
    "PYTHONDONTWRITEBYTECODE", "SYSTEMROOT",
)  # fmt: skip
_TAIL_BYTES = 6000
_LOOK_S = 1.0
_CHILD = Path(__file__).with_name("child.py")


@dataclass(frozen=True)
class Ended:
    """How a child process ended; `tail` is the end of its output on both streams."""

    code: int
    tail: str
    timed_out: bool

    @property
    def how(self) -> str:
        """A description for errors."""
        if self.timed_out:
            return "was stopped because it was silent for too long"
        return f"was ended by signal {-self.code}" if self.code < 0 else f"ended with exit code {self.code}"


def allowed_environment(**more: str) -> dict[str, str]:
    """Return the allowed part of this process's environment, and `more`."""
    return {name: os.environ[name] for name in _ALLOWED if name in os.environ} | more


def run_bounded(
    command: Sequence[str],
    silence_s: float,
    env: Mapping[str, str],
    cwd: Path | None = None,
    heard: Callable[[], None] = liveness.alive,
) -> Ended:
    """Run a command to its end, in this process's group, so that a signal to the group ends both.

    A command that is silent for `silence_s` is stopped. As long as it prints something, it may take any time.

    Args:
        command: The command and its arguments.
        silence_s: The longest silence in seconds.
        env: Its whole environment.
        cwd: Its working directory; by default that of this process.
        heard: Called whenever it prints something; by default this is a sign of life of the job's current stage.

    Raises:
        OSError: The command can't be started.
    """
    process = subprocess.Popen(
        command, bufsize=0, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=dict(env),
        cwd=cwd,
    )  # fmt: skip
    tail = bytearray()
    assert process.stdout is not None
    timed_out = False
    try:
        with process.stdout as stream, selectors.DefaultSelector() as selector:
            selector.register(stream, selectors.EVENT_READ)
            heard_s = time.monotonic()
            while not timed_out:
                if selector.select(_LOOK_S):
                    if not (output := os.read(stream.fileno(), 1 << 16)):
                        break
                    tail += output
                    del tail[:-_TAIL_BYTES]
                    heard_s = time.monotonic()
                    heard()
                elif process.poll() is not None:  # a grandchild holds the pipe open
                    break
                timed_out = time.monotonic() - heard_s >= silence_s
        if not timed_out:  # it may have closed its streams but still run
            process.wait(max(0.0, silence_s))
    except subprocess.TimeoutExpired:
        timed_out = True
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
    return Ended(process.returncode, tail.decode(errors="replace").strip(), timed_out)


def ask_llama(
    library: Path,
    request: Mapping[str, object],
    folder: Path,
    silence_s: float,
    heard: Callable[[], None] = liveness.alive,
) -> dict[str, Any]:
    """Send a request to `child` and return its answer.

    Args:
        library: File of libllama.
        request: The request, see `child.LlamaRequest`.
        folder: Folder for the request, the answer and further files that `child` writes.
        silence_s: See `run_bounded`.
        heard: See `run_bounded`.

    Raises:
        NoRoom: The disk is full.
        ExportError: It failed, crashed or was silent for too long; the text has the end of its output.
    """
    path, answer = folder / "request.json", folder / "answer.json"
    answer.unlink(missing_ok=True)
    path.write_text(json.dumps({"library": str(library), "threads": threads(), **request}), encoding="utf-8")
    ended = run_bounded([sys.executable, "-P", str(_CHILD), str(path)], silence_s, allowed_environment(), heard=heard)
    if ended.code == 0 and not ended.timed_out and answer.is_file():
        found: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
        return found
    raise failure(f"llama.cpp ({request['do']})", ended)


def failure(who: str, ended: Ended) -> NoRoom | ExportError:
    """Build the error for a failed child process."""
    text = f"{who} {ended.how}; its last output:\n{ended.tail[-2000:]}"
    full = any(each in ended.tail for each in ("No space left on device", "Errno 28", "Disk quota exceeded"))
    return NoRoom(f"the disk ran full: {text}") if full else ExportError(text)


def threads() -> int:
    """Return the number of threads: `OMP_NUM_THREADS`, or else the number of processors that this process may use."""
    given = os.environ.get("OMP_NUM_THREADS", "")
    return int(given) if given.isdecimal() and int(given) > 0 else len(os.sched_getaffinity(0))


def scratch(beside: Path | None = None) -> "tempfile.TemporaryDirectory[str]":
    """Create a temporary, hidden folder for requests and answers, optionally in the folder `beside`."""
    return tempfile.TemporaryDirectory(prefix=".llama.cpp-", dir=beside)
