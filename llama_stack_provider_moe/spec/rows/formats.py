"""The table of row formats: the columns by which each is recognised, those that it reads, and what reads them.

| Name | Columns | `data_format` |
|---|---|---|
| messages | messages, or Llama Stack's dialog | dialog |
| prompt_completion | prompt, completion | instruct; dialog too if one is a list |
| llama_stack | chat_completion_input, expected_answer; or dialog | instruct; dialog |
| sharegpt | conversations; for DPO chosen and rejected too | dialog |
| alpaca | instruction, input, output, history; for DPO chosen and rejected instead of output | instruct |
| hh_rlhf | chosen, rejected, prompt: transcripts | both |
| text | text | both |
| preference | prompt, chosen, rejected | instruct for texts, dialog for lists; both where a row has both |
| openai_preference | input, preferred_output, non_preferred_output | dialog |

Every format with messages also reads `system`, `tools`, `parallel_tool_calls` and `chat_template_kwargs`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, Literal

from llama_stack_provider_moe.spec import RowFormat
from llama_stack_provider_moe.spec.rows import chat_formats, preferences
from llama_stack_provider_moe.spec.rows.messages import CanonicalRow
from llama_stack_provider_moe.spec.rows.values import Source

Kind = Literal["instruct", "dialog"]
Columns = Mapping[str, object]
BESIDE: Final = ("system", "tools", "parallel_tool_calls", "chat_template_kwargs")
BOTH: Final[tuple[Kind, ...]] = ("instruct", "dialog")


@dataclass(frozen=True)
class Format:
    """One format.

    Attributes:
        names: its names in `data.format`; the first one is reported.
        columns: the columns that it reads, the one that a row must have first.
        fits: whether a row's columns are of this format.
        read: makes the canonical row.
        kinds: the API's `data_format` that such rows have.
        kinds_of: columns whose values add to that: instruct for a text, dialog for a list.
        beside: columns that it reads if a row has them.
        optional: columns among `columns` that a row need not have.
        auto: whether it is recognised without being named.
    """

    names: tuple[RowFormat, ...]
    columns: tuple[str, ...]
    fits: Callable[[Columns], bool]
    read: Callable[[Source], CanonicalRow]
    kinds: tuple[Kind, ...] = ()
    kinds_of: tuple[str, ...] = ()
    beside: tuple[str, ...] = BESIDE
    optional: tuple[str, ...] = ()
    auto: bool = True

    @property
    def usual(self) -> tuple[Kind, ...]:
        """The values of `data_format` that its rows may have."""
        return BOTH if self.kinds_of else self.kinds

    def kinds_in(self, row: Columns) -> tuple[Kind, ...]:
        """The values of `data_format` that this row may have."""
        if not self.kinds_of:
            return self.kinds
        found: list[Kind] = [*self.kinds]
        for column in self.kinds_of:
            if column in row:
                found.append("instruct" if isinstance(row[column], str) else "dialog")
        return tuple(found)


def _has(column: str) -> Callable[[Columns], bool]:
    return lambda row: column in row


def _has_answers(row: Columns) -> bool:
    return "chosen" in row or "rejected" in row


def _is_hh(row: Columns) -> bool:
    begins = row.get("prompt", row.get("chosen"))
    return _has_answers(row) and chat_formats.is_transcript(begins)


CHATS: Final = (
    Format(("messages",), ("messages",), _has("messages"), lambda source: chat_formats.of_messages(source, "messages"),
           ("dialog",)),
    Format(("llama_stack", "messages"), ("dialog",), _has("dialog"),
           lambda source: chat_formats.of_messages(source, "dialog"), ("dialog",)),
    Format(("sharegpt",), ("conversations",), _has("conversations"),
           lambda source: chat_formats.of_messages(source, "conversations"), ("dialog",)),
    Format(("alpaca",), ("instruction", "input", "output", "history"), _has("instruction"), chat_formats.of_alpaca,
           ("instruct",), optional=("input", "history")),
    Format(("llama_stack",), ("chat_completion_input", "expected_answer"), _has("chat_completion_input"),
           chat_formats.of_llama_stack,
           ("instruct",)),
    Format(("prompt_completion",), ("prompt", "completion"), _has("prompt"),
           chat_formats.of_prompt_completion, ("instruct",),
           ("prompt", "completion")),
    Format(("hh_rlhf",), ("chosen",), _has("chosen"), chat_formats.of_transcript, BOTH, auto=False),
    Format(("text",), ("text",), _has("text"), chat_formats.of_text, BOTH, beside=()),
)  # fmt: skip
# Columns of conversations that a row without an answer does not have.
ANSWERS: Final = ("output", "expected_answer", "completion")
PREFERENCES: Final = (
    Format(("hh_rlhf",), ("chosen", "rejected", "prompt"), _is_hh, preferences.of_transcripts, BOTH,
           optional=("prompt",)),
    Format(("preference",), ("prompt", "chosen", "rejected"),
           lambda row: _has_answers(row) and not _is_hh(row)
           and ("prompt" in row or not ("instruction" in row or "conversations" in row)),
           preferences.of_answers, (), ("prompt", "chosen", "rejected"), optional=("prompt",)),
    Format(("alpaca",), ("instruction", "chosen", "rejected", "input", "history"),
           lambda row: _has_answers(row) and "instruction" in row, preferences.of_alpaca_pair, ("instruct",),
           optional=("input", "history")),
    Format(("sharegpt",), ("conversations", "chosen", "rejected"),
           lambda row: _has_answers(row) and "conversations" in row, preferences.of_sharegpt_pair, ("dialog",)),
    Format(("openai_preference",), ("input", "preferred_output", "non_preferred_output"),
           lambda row: "preferred_output" in row or "non_preferred_output" in row, preferences.of_openai, ("dialog",),
           beside=("system",)),
)  # fmt: skip
