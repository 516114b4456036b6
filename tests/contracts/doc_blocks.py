"""Fenced blocks and inline commands of Markdown pages, for the tests of the documentation.

A block that a test must not check has a reason on the line before its fence:

    <!-- unchecked: another program's configuration -->
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
SITE = sorted((ROOT / "docs").rglob("*.md"))
TOP_LEVEL = sorted(ROOT.glob("*.md"))
SHELL = ("sh", "bash", "shell", "console")
LANGUAGES = {*SHELL, "", "text", "python", "json", "jsonl", "yaml", "toml", "ini", "dockerfile", "diff"}
_FENCE = re.compile(r"^(?P<indent> *)(?P<fence>```+|~~~+)(?P<info>.*)$")
_UNCHECKED = re.compile(r"<!-- unchecked: (?P<reason>\S.*?) -->")
_SPAN = re.compile(r"(?<!`)`((?:moe-train|make) [^`\n]+)`(?!`)")


class Block(NamedTuple):
    """One fenced block.

    Attributes:
        page: the file.
        line: of its opening fence, from 1.
        language: first word after the fence.
        text: what stands between the fences.
        unchecked: why no test may check it, or None.
    """

    page: Path
    line: int
    language: str
    text: str
    unchecked: str | None

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT) if self.page.is_relative_to(ROOT) else self.page.name}:{self.line}"


def blocks_of(page: Path) -> Iterator[Block]:
    """Every fenced block of a page."""
    lines = page.read_text(encoding="utf-8").splitlines()
    number = 0
    while number < len(lines):
        opening = _FENCE.match(lines[number])
        if opening is None:
            number += 1
            continue
        start, indent = number, len(opening["indent"])
        number += 1
        while number < len(lines) and lines[number].strip() != opening["fence"]:
            number += 1
        if number == len(lines):
            raise AssertionError(f"{page}:{start + 1}: the fence has no end")
        before = next((line for line in reversed(lines[:start]) if line.strip()), "")
        excuse = _UNCHECKED.fullmatch(before.strip())
        language = opening["info"].strip().split(" ")[0]
        text = "\n".join(line[indent:] for line in lines[start + 1 : number])
        yield Block(page, start + 1, language, text, excuse["reason"] if excuse else None)
        number += 1


def prose_of(page: Path) -> str:
    """The page without its fenced blocks."""
    text = page.read_text(encoding="utf-8")
    return re.sub(r"^ *(```+|~~~+).*?^ *\1 *$", "", text, flags=re.MULTILINE | re.DOTALL)


def commands_in_prose(page: Path) -> list[str]:
    """Inline code that begins with `moe-train ` or `make `."""
    return _SPAN.findall(prose_of(page))


def shell_lines(block: Block) -> Iterator[str]:
    """The commands of a shell block, continued lines joined; of a transcript, those behind `$`."""
    joined = block.text.replace("\\\n", " ")
    is_transcript = any(line.startswith("$ ") for line in joined.splitlines())
    for line in joined.splitlines():
        if is_transcript and not line.startswith("$ "):
            continue
        yield line.removeprefix("$ ")
