"""Flagged conversations -> rows that a later job trains on, where the operator's configuration says that users agreed.

`flagged.jsonl` has every conversation, for probes and ablation measurements; `answered.jsonl` those that end with an
answer of the assistant, for the circuit breaker and other recipes that learn answers. Both are rows as a job takes
them: `moe-train data push FILE --name NAME`.
"""

import json
import logging
from collections.abc import Callable
from pathlib import Path

from llama_stack_provider_moe.ground.private import Privacy
from llama_stack_provider_moe.shields.messages import Conversation, Message
from llama_stack_provider_moe.spec.guard_config import FeedbackConfig

FLAGGED, ANSWERED = "flagged.jsonl", "answered.jsonl"
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
        self._told = False

    def keep(self, conversation: Conversation) -> None:
        """Append a conversation; runs in a thread. A full disk or a folder that is gone loses the row, and says so."""
        line = json.dumps({"messages": [_row(each) for each in conversation]}, ensure_ascii=False).encode() + b"\n"
        names = [FLAGGED, ANSWERED] if conversation[-1].role == "assistant" else [FLAGGED]
        try:
            Privacy().make_folder(self._config.folder)
            paths = [self._config.folder / name for name in names]
            if self._used() + len(line) * len(paths) > self._config.max_bytes:
                self._lose("full", f"feedback.max_bytes is reached in {self._config.folder}")
                return
            for path in paths:
                with Privacy().appended(path) as file:
                    file.write(line)  # one write: several server processes may share the folder
        except OSError as error:
            self._lose("failed", f"feedback.folder {self._config.folder}: {error.strerror}")
            return
        self._note("kept")

    def _used(self) -> int:
        files: list[Path] = [self._config.folder / name for name in (FLAGGED, ANSWERED)]
        return sum(file.stat().st_size for file in files if file.exists())

    def _lose(self, outcome: str, why: str) -> None:
        self._note(outcome)
        if not self._told:  # once: an attacker must not fill the log as well
            self._told = True
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
