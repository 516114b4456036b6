"""Children that are bounded: their environment, their time, and how much of what they say is kept."""

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from llama_stack_provider_moe.errors import ExportError, NoRoom

# What a child is told of this process' environment: no tokens, no proxies, no settings of other tools.
_ALLOWED = (
    "PATH", "HOME", "LANG", "LC_ALL", "LC_CTYPE", "TMPDIR", "OMP_NUM_THREADS", "LD_LIBRARY_PATH", "VIRTUAL_ENV",
    "PYTHONDONTWRITEBYTECODE", "SYSTEMROOT",
)  # fmt: skip
_TAIL_BYTES = 6000
_CHILD = Path(__file__).with_name("child.py")


@dataclass(frozen=True)
class Ended:
    """How a child ended; `tail` is the end of what it said on both streams."""

    code: int
    tail: str
    timed_out: bool

    @property
    def how(self) -> str:
        """For an error's text."""
        if self.timed_out:
            return "was stopped, for it took too long"
        return f"was ended by signal {-self.code}" if self.code < 0 else f"ended with exit code {self.code}"


def allowed_environment(**more: str) -> dict[str, str]:
    """The allowed part of this process' environment, and `more`."""
    return {name: os.environ[name] for name in _ALLOWED if name in os.environ} | more


def run_bounded(command: Sequence[str], timeout_s: float, env: Mapping[str, str], cwd: Path | None = None) -> Ended:
    """Run a command to its end, in this process' own group, so that what ends the one ends the other.

    Raises:
        OSError: it can't be started.
    """
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=dict(env), cwd=cwd
    )
    tail = bytearray()
    assert process.stdout is not None
    reader = threading.Thread(target=_keep_tail, args=(process.stdout, tail), daemon=True)
    reader.start()
    timed_out = False
    try:
        process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        timed_out = True
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        reader.join(timeout=10)  # a grandchild may hold the pipe open
    return Ended(process.returncode, tail.decode(errors="replace").strip(), timed_out)


def ask_llama(library: Path, request: Mapping[str, Any], folder: Path, timeout_s: float) -> dict[str, Any]:
    """What `child` answers to a request; it may leave files in `folder`.

    Raises:
        NoRoom: the disk ran full.
        ExportError: it failed, crashed or took too long; with the end of what it said.
    """
    path, answer = folder / "request.json", folder / "answer.json"
    answer.unlink(missing_ok=True)
    path.write_text(json.dumps({"library": str(library), "threads": threads(), **request}), encoding="utf-8")
    ended = run_bounded([sys.executable, "-P", str(_CHILD), str(path)], timeout_s, allowed_environment())
    if ended.code == 0 and not ended.timed_out and answer.is_file():
        found: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
        return found
    raise failure(f"llama.cpp ({request['do']})", ended)


def failure(who: str, ended: Ended) -> NoRoom | ExportError:
    """The error for a child that failed."""
    text = f"{who} {ended.how}; it said last:\n{ended.tail[-2000:]}"
    full = any(each in ended.tail for each in ("No space left on device", "Errno 28", "Disk quota exceeded"))
    return NoRoom(f"the disk ran full: {text}") if full else ExportError(text)


def threads() -> int:
    """As many as `OMP_NUM_THREADS` says, else as this process may run on."""
    given = os.environ.get("OMP_NUM_THREADS", "")
    return int(given) if given.isdecimal() and int(given) > 0 else len(os.sched_getaffinity(0))


def scratch(beside: Path | None = None) -> "tempfile.TemporaryDirectory[str]":
    """A folder for requests and answers; hidden, where it lies beside something."""
    return tempfile.TemporaryDirectory(prefix=".llama.cpp-", dir=beside)


def _keep_tail(stream: IO[bytes], tail: bytearray) -> None:
    while chunk := os.read(stream.fileno(), 1 << 16):
        tail += chunk
        del tail[:-_TAIL_BYTES]
    stream.close()
