"""A user's file of rows, JSON Lines or CSV, gzipped or not, checked as the server checks the rows of a data set."""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import cast

from llama_stack_provider_moe.errors import InvalidInput, InvalidRows, RowProblem
from llama_stack_provider_moe.spec import AblationMeasureSpec, MixSpec, ProbeSpec, RoutingAnalysisSpec, RowKind
from llama_stack_provider_moe.spec.ablation_jobs import LEAST_ROWS
from llama_stack_provider_moe.spec.evaluation_rows import canonical_own
from llama_stack_provider_moe.spec.local_commands import EVALUATION_SETS, EvaluationCommand
from llama_stack_provider_moe.spec.probe_commands import as_typed
from llama_stack_provider_moe.spec.row_files import FileRow, RowFile
from llama_stack_provider_moe.spec.rows import canonical, conversation

FILE_OF_ROWS = "a file of rows, JSON Lines or CSV"
_PIECE_BYTES = 256 << 10

_Form = Callable[[object, int], Mapping[str, object] | RowProblem]


def evaluation_rows(path: Path, option: str, kind: RowKind, answered: bool) -> list[str]:
    """Return the canonical rows of one set of an evaluation, each as a line of JSON.

    Args:
        path: the file.
        option: of the command line that names it, for errors.
        kind: of the rows.
        answered: whether each must end with the assistant's turn.

    Raises:
        InvalidInput: the file can't be read, or is empty.
        InvalidRows: rows are not valid.
    """
    if kind == "scenario" or kind == "judged":
        return _lines(path, option, 1, lambda row, number: canonical_own(row, number, kind))
    return _lines(path, option, 1, lambda row, number: conversation(row, number, "auto", answered))


def evaluation_files(command: EvaluationCommand) -> dict[str, list[str]]:
    """Return the canonical rows of each set that the command names; see `evaluation_rows`."""
    return {
        name: evaluation_rows(Path(getattr(command, name)), f"--{name}", kind, answered=name == "retain")
        for name, kind in EVALUATION_SETS.items()
        if getattr(command, name) is not None
    }


def routing_rows(path: Path, spec: RoutingAnalysisSpec) -> list[str]:
    """Return the canonical rows of one set of a routing analysis, each as a line of JSON.

    Raises:
        InvalidInput: the file can't be read, or has too few rows.
        InvalidRows: rows are not valid.
    """
    answered = spec.analysis.tokens == "response"
    return _lines(path, "--rows", 2, lambda row, number: conversation(row, number, spec.data.format, answered))


def measured_rows(path: Path, spec: AblationMeasureSpec) -> list[str]:
    """Return the canonical rows of one set of `moe-train ablate measure`, each as a line of JSON.

    Raises:
        InvalidInput: the file can't be read, or has too few rows.
        InvalidRows: rows are not valid.
    """
    return _lines(path, "--rows", LEAST_ROWS, lambda row, number: conversation(row, number, spec.data.format, False))


def probe_rows(path: Path, name: str, spec: ProbeSpec) -> list[str]:
    """Return the canonical rows of one set of `moe-train probe fit`, each as a line of JSON.

    Args:
        path: the file.
        name: of the set.
        spec: the job that fits the same.

    Raises:
        InvalidInput: the file can't be read, or has too few rows for the job.
        InvalidRows: rows are not valid.
    """
    (source,) = (each for each in spec.row_sources() if each.part == f"set-{name}")
    rows = _lines(path, "--rows", 1, lambda row, number: conversation(row, number, source.format, False))
    if len(rows) < source.least:
        raise InvalidInput("--rows", f"{name}={path}", f"{as_typed(source.why_least)}; this file has {len(rows)}")
    return rows


def scored_rows(path: Path) -> list[str]:
    """Return the canonical rows of a file to score, each as a line of JSON.

    Raises:
        InvalidInput: the file can't be read, or is empty.
        InvalidRows: rows are not valid.
    """
    return _lines(path, "FILE", 1, lambda row, number: conversation(row, number, "auto", False))


def domain_rows(spec: MixSpec) -> dict[str, list[str]]:
    """Name of a branch -> the canonical rows of the file in its `dataset_id`, each as a line of JSON.

    Raises:
        InvalidInput: a file can't be read, or is empty.
        InvalidRows: rows are not valid.
    """
    return {
        spec.branches[at].name: _lines(
            Path(str(spec.branches[at].dataset_id)),
            f"branches.{at}.dataset_id",
            1,
            lambda row, number: conversation(row, number, spec.options.format, False),
        )
        for at in spec.kept
        if spec.branches[at].dataset_id is not None
    }


def calibration_rows(path: Path, option: str) -> list[str]:
    """Return the canonical rows that decide a surgery, each as a line of JSON.

    Raises:
        InvalidInput: the file can't be read, or is empty.
        InvalidRows: rows are not valid.
    """
    return _lines(path, option, 1, lambda row, number: canonical(row, number, "surgery", "auto", answered=False))


def graded_rows(path: Path) -> list[str]:
    """Return the rows of a file of answers to grade as they are, each as a line of JSON.

    Raises:
        InvalidInput: the file can't be read, or is empty.
        InvalidRows: lines are not rows.
    """
    return _lines(path, "--data", 1, lambda row, _: cast("Mapping[str, object]", row))


def _lines(path: Path, option: str, least: int, form: _Form) -> list[str]:
    file = RowFile(str(path), "csv" if path.name.lower().removesuffix(".gz").endswith(".csv") else "jsonl")
    found: list[str] = []
    problems: list[RowProblem] = []
    count = 0
    try:
        for row in _rows(path, option, file):
            made = form(row.content, row.number)
            if isinstance(made, RowProblem):
                count += 1
                problems = [*problems, made][: InvalidRows.SHOWN]
            else:
                found.append(json.dumps(made) + "\n")
    except InvalidRows as bad:
        both = sorted([*problems, *bad.problems], key=lambda problem: problem.row)
        raise InvalidRows(str(path), both, count + bad.count, bad.total_rows) from None
    except InvalidInput as bad:
        raise InvalidInput(option, str(path), bad.expected) from None
    if count:
        raise InvalidRows(str(path), problems, count, file.rows)
    if len(found) < least:
        raise InvalidInput(option, str(path), f"a file of at least {least} rows")
    return found


def _rows(path: Path, option: str, file: RowFile) -> Iterator[FileRow]:
    try:
        with path.open("rb") as opened:
            while piece := opened.read(_PIECE_BYTES):
                yield from file.feed(piece)
    except OSError as error:
        raise InvalidInput(option, str(path), f"{FILE_OF_ROWS} ({error.strerror})") from None
    yield from file.finish()
