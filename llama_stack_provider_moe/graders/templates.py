"""The text of a template for one answer."""

import json
from collections.abc import Mapping

from llama_stack_provider_moe.graders.samples import MAX_ANSWER, BadAnswer, GradeFailed, Sample
from llama_stack_provider_moe.spec.grader_templates import Reference, parts_of


class Text:
    """A template, parsed once.

    Args:
        template: as written; the spec has checked it.
    """

    def __init__(self, template: str) -> None:
        self._parts = parts_of(template)

    def of(self, sample: Sample) -> str:
        """Return the text for an answer.

        Raises:
            GradeFailed: the row lacks a column that the template names, or the text is too long.
            BadAnswer: the answer lacks what the template names.
        """
        found = "".join(each if isinstance(each, str) else _text(value_at(each, sample)) for each in self._parts)
        if len(found) > MAX_ANSWER:
            raise GradeFailed("too_large", f"a text of {len(found):,} characters; expected at most {MAX_ANSWER:,}")
        return found


def value_at(reference: Reference, sample: Sample) -> object:
    """Return the value that a reference names.

    Raises:
        GradeFailed: the row has no such column.
        BadAnswer: the answer has no such part.
    """
    if reference.namespace == "item":
        try:
            return _below(sample.item, reference.path)
        except LookupError:
            columns = ", ".join(map(str, list(sample.item)[:16])) or "none"
            raise GradeFailed("unknown_name", f"{{{{{reference}}}}}: the row has no such column; it has {columns}") \
                from None  # fmt: skip
    first, *rest = reference.path
    if first == "output_text":
        return sample.output_text
    value = sample.output_json if first == "output_json" else [
        {"type": "function", "function": {"name": call.name, "arguments": call.arguments}} for call in sample.calls
    ]  # fmt: skip
    try:
        return _below(value, rest)
    except LookupError:
        raise BadAnswer(f"{{{{{reference}}}}}: the answer has no such part") from None


def _below(value: object, path: "tuple[str, ...] | list[str]") -> object:
    for part in path:
        if isinstance(value, Mapping):
            value = value[part]
        elif isinstance(value, list | tuple) and part.isdecimal():
            value = value[int(part)]
        else:
            raise LookupError(part)
    return value


def _text(value: object) -> str:
    if isinstance(value, str):
        return value
    try:
        return json.dumps(value, ensure_ascii=False, default=str)
    except (ValueError, RecursionError):
        raise GradeFailed("too_large", "a value of the row is nested too deeply") from None
