"""A profile of rows -> text for a user: counts, histograms, and rows with the learnt tokens in colour."""

from collections.abc import Iterable, Mapping

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from llama_stack_provider_moe.control.cli.screen import text
from llama_stack_provider_moe.jobdir.output import printable
from llama_stack_provider_moe.spec.data_profile import (
    DataProfile,
    Lengths,
    Repeat,
    RowReason,
    ShownRow,
    TokenFigures,
)
from llama_stack_provider_moe.spec.row_sources import PAIRED

_BAR = 40  # characters of the longest bar
_LISTED = 5
_NAMES = 12  # of columns
_LEARNT = "bold green"
IGNORED = -100


def shown(profile: DataProfile, too_few: str | None = None) -> RenderableType:
    """Render the profile; it ends with what a job would do with these rows.

    Args:
        profile: of the rows.
        too_few: what a job would expect, if it would refuse so few rows.
    """
    parts: list[RenderableType] = [_facts(profile)]
    if profile.tokens is None:
        parts += _histogram("characters of a row", profile.characters)
    else:
        parts += [Text(""), _tokens(profile.tokens)]
        parts += _histogram("tokens of a sequence", profile.tokens.lengths)
    for index, row in enumerate(profile.shown):
        which = ("", ", chosen", ", rejected")[1 + index % 2 if profile.recipe in PAIRED else 0]
        parts += [Text(""), text(f"row {row.row}{which}, {_learnt(row)}:"), _colored(row)]
    return Group(*parts, Text(""), text(_verdict(profile, too_few)))


def _facts(profile: DataProfile) -> Table:
    facts = [
        ("rows", ": ".join(filter(None, [f"{profile.rows:,}", _counted(profile.formats, profile.rows)]))),
        ("columns read", _counted(profile.columns_read, profile.rows)),
        ("columns not read", _counted(profile.columns_not_read, profile.rows)),
        ("found", _counted(profile.notes, profile.rows)),
        *_listed("not valid", profile.refused, _reasons(profile.refused_rows)),
        *_listed("repeated", profile.duplicates, _repeats(profile.duplicate_rows)),
    ]
    if profile.held_out_rows is not None:
        facts.append(("held-out rows", f"{profile.held_out_rows:,}"))
        facts += _listed("of them also here", profile.overlap or 0, _repeats(profile.overlap_rows))
    if profile.characters is not None:
        facts.append(("characters", _spread(profile.characters)))
    return _grid(facts)


def _tokens(found: TokenFigures) -> Table:
    facts = [("", line) for line in found.plan]
    facts[0] = ("learnt", facts[0][1])
    if found.counts:
        facts.append(("rendered", ", ".join(f"{name}: {count:,}" for name, count in found.counts.items())))
    if found.lengths is not None:
        facts.append(("tokens", _spread(found.lengths)))
    facts.append(("cut", f"{found.cut:,} sequences longer than max_length {found.max_length:,}"))
    facts += _listed("left out", found.dropped, _reasons(found.dropped_rows))
    facts += _listed("refused", found.refused, _reasons(found.refused_rows))
    if found.beyond_positions:
        with_answer = f" with an answer of {found.answer:,} tokens" if found.answer else ""
        more = " ..." if len(found.beyond_rows) < found.beyond_positions else ""
        rows = f"row {', '.join(map(str, found.beyond_rows))}{more}"
        told = f"{found.beyond_positions:,} sequences{with_answer} beyond the model's {found.positions:,} positions"
        facts.append(("too long", f"{told}: {rows}"))
    what, learnt = "sequences", f"{found.learnt:,} of them learnt"
    if found.answer:  # the model writes answers, and learns from these
        what, learnt = "answers", "and the model learns from the answers that it writes"
    facts += [
        ("held out", f"{found.held_out:,} rows (options.validation_split)"),
        ("an epoch", f"{found.sequences:,} {'prompts' if found.answer else what}, {found.tokens:,} tokens, {learnt}"),
        ("steps", f"{found.steps:,} of {found.rows_a_step:,} {what} each on one process"),
    ]
    return _grid(facts)


def _grid(facts: Iterable[tuple[str, str]]) -> Table:
    grid = Table.grid(padding=(0, 2))
    for name, value in facts:
        if value:
            grid.add_row(name, text(value))
    return grid


def _listed(name: str, count: int, lines: list[str]) -> list[tuple[str, str]]:
    if not count:
        return []
    more = [f"and {count - _LISTED:,} more"] if count > _LISTED else []
    return [(name, f"{count:,}"), *(("", line) for line in [*lines[:_LISTED], *more])]


def _reasons(rows: Iterable[RowReason]) -> list[str]:
    return [f"row {each.row}: {each.reason}" for each in rows]


def _repeats(rows: Iterable[Repeat]) -> list[str]:
    return [f"row {each.row} is the same as row {each.same_as}" for each in rows]


def _counted(counts: Mapping[str, int], rows: int) -> str:
    ordered = sorted(counts, key=lambda name: (-counts[name], name))
    named = [name if counts[name] == rows else f"{name} ({counts[name]:,})" for name in ordered[:_NAMES]]
    more = len(ordered) - _NAMES
    return ", ".join(named) + (f" and {more:,} more" if more > 0 else "")


def _spread(lengths: Lengths) -> str:
    return (
        f"{lengths.total:,}; of a row {lengths.smallest:,} to {lengths.largest:,}, median {lengths.median:,}, "
        f"95% up to {lengths.p95:,}"
    )


def _histogram(title: str, lengths: Lengths | None) -> list[RenderableType]:
    if lengths is None:
        return []
    longest = max(bucket.rows for bucket in lengths.histogram)
    grid = Table.grid(padding=(0, 1))
    grid.add_column(justify="right")
    for bucket in lengths.histogram:
        bar = "#" * max(1, round(_BAR * bucket.rows / longest))
        grid.add_row(f"{bucket.least:,}-{bucket.most:,}", text(bar), f"{bucket.rows:,}")
    return [Text(""), text(title), grid]


def _learnt(row: ShownRow) -> str:
    count = sum(label != IGNORED for label in row.labels[1:])  # the first is never predicted
    return f"{len(row.ids):,} tokens, {count:,} learnt (in colour; in brackets where there is none)"


def _colored(row: ShownRow) -> Text:
    """The row's text; learnt runs are green on a terminal, and always in brackets, for pipes and files."""
    found = Text()
    was = False
    for piece, label in zip(row.pieces, row.labels, strict=True):
        is_learnt = label != IGNORED
        if is_learnt != was:
            found.append("[[" if is_learnt else "]]", style="dim")
        found.append(printable(piece), style=_LEARNT if is_learnt else "")
        was = is_learnt
    if was:
        found.append("]]", style="dim")
    return found


def _verdict(profile: DataProfile, too_few: str | None) -> str:
    if profile.refused:
        return f"a job would refuse these rows: {profile.refused:,} of {profile.rows:,} are not valid"
    if too_few:
        return f"a job would refuse so few rows; expected {too_few}"
    if profile.tokens is None:
        return "a job would take these rows; --model counts tokens and checks its chat template"
    if profile.tokens.refused:
        return f"a job would fail: {profile.tokens.refused:,} of {profile.rows:,} rows are refused, see above"
    if profile.tokens.drops_too_many():
        share = f"{profile.tokens.dropped:,} of {profile.tokens.rows:,} rows"
        return f"a job would fail: {share} are left out; options.max_dropped allows {profile.tokens.max_dropped:.0%}"
    return "a job would take these rows"
