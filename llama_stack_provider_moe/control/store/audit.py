"""The audit trail: who submitted, cancelled, resumed, deleted, uploaded or downloaded what, and when.

It also has each webhook that the supervisor gave up, under the owner of its job, who was not told.

`state_dir/audit/audit.jsonl` has one line of JSON for each action that succeeded. It names the caller by a keyed hash
of the owner. The key, `state_dir/audit/key`, stays in the state folder, so a copy of the trail alone identifies nobody,
not even to somebody who has a list of names. It never has rows, prompts, templates or paths of the server.

Requests only queue a record. One thread writes, under a lock that all server processes of the state folder take, so
lines stay whole and one process rotates at a time. If the file can't be written, or too much waits, records are lost:
the next line that can be written says how many.
"""

import fcntl
import hashlib
import hmac
import json
import logging
import os
import queue
import secrets
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from llama_stack_provider_moe.ground.private import Privacy
from llama_stack_provider_moe.spec.server_config import ProviderConfig

type Action = Literal[
    "submit", "export", "cancel", "resume", "delete", "label", "prompt", "download", "upload dataset",
    "delete dataset", "erase feedback", "webhook given up",
]  # fmt: skip
WAITING = 10_000  # records
COMPLAINT_S = 60.0
KEY_BYTES = 32
log = logging.getLogger(__name__)


class Audit:
    """The audit trail, as one process writes it: a server or the supervisor.

    Args:
        config: the server's configuration.
    """

    def __init__(self, config: ProviderConfig) -> None:
        self._folder = config.state_dir / "audit"
        self._privacy = config.privacy
        self._limits = config.audit
        self._queue: queue.Queue[dict[str, object] | None] = queue.Queue(WAITING)
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._lost = 0
        self._complained_at = -COMPLAINT_S
        self._key: bytes | None = None

    def note(self, owner: str, action: Action, **what: str | int | None) -> None:
        """Queue a record; returns at once and raises nothing.

        Args:
            owner: the caller, as the store names owners.
            action: what the caller did.
            what: names and sizes; those that are None are left out.
        """
        if not self._limits.write:
            return
        moment = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        record: dict[str, object] = {"at": moment, "who": owner, "action": action}
        record |= {name: value for name, value in what.items() if value is not None}
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="moe-audit", daemon=True)
                self._thread.start()
        try:
            self._queue.put_nowait(record)
        except queue.Full:
            with self._lock:
                self._lost += 1

    def close(self, limit_s: float = 2.0) -> None:
        """Write what is queued, for at most `limit_s` seconds."""
        with self._lock:
            thread, self._thread = self._thread, None
        if thread is not None:
            with suppress(queue.Full):
                self._queue.put(None, timeout=limit_s)
                thread.join(limit_s)

    def _work(self) -> None:
        while (first := self._queue.get()) is not None:
            batch, is_last = [first], False
            with suppress(queue.Empty):
                while len(batch) < WAITING and not is_last:
                    more = self._queue.get_nowait()
                    is_last = more is None
                    batch += [] if more is None else [more]
            self._write_or_count(batch)
            if is_last:
                return

    def _write_or_count(self, batch: list[dict[str, object]]) -> None:
        with self._lock:
            lost, self._lost = self._lost, 0
        waiting = [{"at": batch[0]["at"], "who": None, "action": "lost", "records": lost}, *batch] if lost else batch
        done = 0  # of `waiting`
        try:
            for written in self._write(waiting):
                done = written
        except OSError as error:  # a full disk, or a folder that was deleted: requests go on
            left = len(waiting) - done
            with self._lock:
                self._lost += lost + len(batch) if done == 0 else left
                count = self._lost
            if time.monotonic() - self._complained_at >= COMPLAINT_S:
                self._complained_at = time.monotonic()
                log.warning("audit trail: %d records could not be written (%s)", count, error)

    def _write(self, records: list[dict[str, object]]) -> Iterator[int]:
        """Append records; after each part that fits into a file, give how many are written."""
        self._privacy.make_folder(self._folder)
        if self._key is None:
            self._key = _key_in(self._folder)
        key = self._key
        named = [each if each["who"] is None else {**each, "who": pseudonym(key, str(each["who"]))} for each in records]
        lines = [json.dumps(each, ensure_ascii=True).encode() + b"\n" for each in named]
        path = self._folder / "audit.jsonl"
        done = 0
        with self._privacy.appended(self._folder / "lock") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            while done < len(lines):
                room = self._limits.max_bytes - (path.stat().st_size if path.exists() else 0)
                first, size = done, 0
                while done < len(lines) and size < room:
                    size += len(lines[done])
                    done += 1
                if size:
                    _append(path, b"".join(lines[first:done]), self._privacy)
                if size >= room:
                    self._rotate(path)
                yield done

    def _rotate(self, path: Path) -> None:
        for number in range(self._limits.kept_files, 0, -1):
            old = path if number == 1 else path.with_name(f"{path.name}.{number - 1}")
            with suppress(FileNotFoundError):
                old.replace(path.with_name(f"{path.name}.{number}"))


def pseudonym(key: bytes, owner: str) -> str:
    """Return how the trail names an owner."""
    return hmac.new(key, owner.encode(), hashlib.sha256).hexdigest()[:32]


def _append(path: Path, text: bytes, privacy: Privacy) -> None:
    """Append whole lines, or nothing: what a full disk cut is removed again."""
    with open(path, "ab", buffering=0, opener=privacy.opener) as file:
        size = file.seek(0, os.SEEK_END)
        try:
            if file.write(text) != len(text):
                raise OSError("the disk is full")
        except OSError:
            file.truncate(size)
            raise


def _key_in(folder: Path) -> bytes:
    """Return the key in a folder; the first process creates it, complete at once."""
    path = folder / "key"
    if not path.exists():
        new = folder / f"key.{secrets.token_hex(8)}"
        handle = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            with open(handle, "wb") as file:
                file.write(secrets.token_bytes(KEY_BYTES))
                file.flush()
                os.fsync(file.fileno())
            with suppress(FileExistsError):  # another process was first
                os.link(new, path)
        finally:
            new.unlink()
    found = path.read_bytes()
    if len(found) != KEY_BYTES:
        raise OSError(f"{path} has {len(found)} bytes instead of {KEY_BYTES}; delete it to begin with a new key")
    return found
