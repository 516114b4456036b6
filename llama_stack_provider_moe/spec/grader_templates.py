"""Templates of graders: `{{item.answer}}` names a column of the row, `{{sample.output_text}}` the model's answer.

A template is parsed once, and never evaluated as code. A path may lead deeper: `{{item.call.name}}`, `{{item.tags.0}}`.
"""

import re
from typing import Annotated, NamedTuple

from pydantic import AfterValidator, Field

MAX_TEMPLATE = 20_000  # characters
MAX_REFERENCES = 64
MAX_PATH = 8  # parts of a path below `item` or `sample`
SAMPLE_NAMES = ("output_text", "output_json", "output_tools")
DEEP = ("output_json", "output_tools")  # a path may lead into these
_REFERENCE = re.compile(r"\{\{([^{}]{0,256})\}\}")
_PATH = re.compile(r"\s*(item|sample)((?:\.[A-Za-z0-9_-]{1,64})+)\s*")


class Reference(NamedTuple):
    """A place in the row (`item`) or in the answer (`sample`)."""

    namespace: str
    path: tuple[str, ...]

    def __str__(self) -> str:
        return ".".join((self.namespace, *self.path))


type Parts = tuple[str | Reference, ...]


def parts_of(template: str) -> Parts:
    """Return the texts and references of a template, in order.

    Raises:
        ValueError: it has a reference that can't be read, or names nothing that an answer has.
    """
    if len(template) > MAX_TEMPLATE:
        raise ValueError(f"a template of {len(template):,} characters; expected at most {MAX_TEMPLATE:,}")
    found: list[str | Reference] = []
    at = 0
    for match in _REFERENCE.finditer(template):
        found += [template[at : match.start()], _reference(match[1])]
        at = match.end()
    found.append(template[at:])
    for text in found:
        if isinstance(text, str) and ("{{" in text or "}}" in text):
            raise ValueError(f"{text[:80]!r} has braces that do not close; expected {{{{item.NAME}}}}")
    if sum(isinstance(each, Reference) for each in found) > MAX_REFERENCES:
        raise ValueError(f"more than {MAX_REFERENCES} references; expected fewer")
    return tuple(each for each in found if each != "")


def _reference(inner: str) -> Reference:
    match = _PATH.fullmatch(inner)
    if match is None:
        raise ValueError(f"{{{{{inner[:80]}}}}} is not valid; expected {{{{item.NAME}}}} or {{{{sample.NAME}}}}")
    namespace, path = match[1], tuple(match[2][1:].split("."))
    if len(path) > MAX_PATH:
        raise ValueError(f"{{{{{inner[:80]}}}}} has more than {MAX_PATH} parts; expected fewer")
    if namespace == "sample" and (path[0] not in SAMPLE_NAMES or (len(path) > 1 and path[0] not in DEEP)):
        expected = ", ".join(f"sample.{name}" for name in SAMPLE_NAMES)
        raise ValueError(f"{{{{{inner.strip()[:80]}}}}} is not valid; expected one of {expected}")
    return Reference(namespace, path)


def _checked(template: str) -> str:
    parts_of(template)
    return template


Template = Annotated[str, Field(max_length=MAX_TEMPLATE), AfterValidator(_checked)]
