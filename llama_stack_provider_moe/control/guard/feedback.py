"""Flagged conversations -> rows that a later job trains on, where the operator's configuration says that users agreed.

Each user has a file of their own (`control.store.feedback_files`). The post-training provider makes data sets of them.
"""

import json
import logging
import time
from collections.abc import Callable
from datetime import UTC, datetime

from llama_stack_provider_moe.control.store import feedback_files
from llama_stack_provider_moe.shields.messages import Conversation, Message
from llama_stack_provider_moe.spec.feedback_config import FeedbackConfig

LOOK_S = 10.0  # how often the size of all files is looked at; in between, what this process appends is added
log = logging.getLogger(__name__)


class Feedback:
    """The files of one configuration.

    Args:
        config: where, and how much.
        note: called with `kept`, `full` or `failed`.
    """

    def __init__(self, config: FeedbackConfig, note: Callable[[str], None]) -> None:
        self._config = config
        self._note = note
        self._told: set[str] = set()
        self._used_bytes = 0
        self._looked_at: float | None = None

    def keep(self, owner: str, shield_id: str, conversation: Conversation) -> None:
        """Append a conversation to its owner's file; runs in a thread.

        What does not fit is lost, and so is what a full disk or a folder that is gone does not take: it is counted.
        """
        row = {"at": datetime.now(UTC).isoformat(timespec="seconds"), "shield": shield_id,
               "messages": [_row(each) for each in conversation]}  # fmt: skip
        line = json.dumps(row, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"
        folder = self._config.folder
        try:
            if self._used() + len(line) > self._config.max_bytes:
                self._lose("full", f"feedback.max_bytes is reached in {folder}")
            elif feedback_files.append(folder, owner, line, self._config.max_bytes_of_owner) == "full":
                self._lose("full", f"feedback.max_bytes_of_owner is reached in {folder}")
            else:
                self._used_bytes += len(line)
                self._note("kept")
        except OSError as error:
            self._lose("failed", f"feedback.folder {folder}: {error.strerror}")

    def _used(self) -> int:
        now = time.monotonic()
        if self._looked_at is None or now - self._looked_at > LOOK_S:
            self._looked_at = now
            self._used_bytes = feedback_files.used_bytes(self._config.folder)
        return self._used_bytes

    def _lose(self, outcome: str, why: str) -> None:
        self._note(outcome)
        if why not in self._told:  # once: an attacker must not fill the log as well
            self._told.add(why)
            log.warning("%s; flagged conversations are lost from now on", why)


def _row(message: Message) -> dict[str, object]:
    row: dict[str, object] = {"role": "system" if message.role == "developer" else message.role,
                              "content": message.text}  # fmt: skip
    calls = [call for call in message.tool_calls if call.name is not None and call.kind == "function"]
    if calls:
        row["tool_calls"] = [
            {"type": "function", "function": {"name": call.name, "arguments": call.arguments or "{}"}} for call in calls
        ]
    return row
