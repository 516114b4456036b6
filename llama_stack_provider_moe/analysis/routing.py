"""A routing analysis without a server: what `moe-train analyze routing` runs.

python -m llama_stack_provider_moe.analysis.routing MODEL --set a=FILE --set b=FILE [--adapter FOLDER] ...
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from transformers.utils import logging

from llama_stack_provider_moe.analysis.routing_run import analyse, load_routed, text, write_report
from llama_stack_provider_moe.datarows import canonical
from llama_stack_provider_moe.errors import InvalidBody, InvalidInput, InvalidRows, MoeError, RowProblem
from llama_stack_provider_moe.spec import Analysis, AnalysisOptions, AnalysisTraining, RoutingAnalysisSpec
from llama_stack_provider_moe.spec.routing import REPORT_FILE


def canonical_rows(path: Path, spec: RoutingAnalysisSpec, into: Path) -> None:
    """A user's JSONL file, checked as the server would check a data set's rows."""
    answered = spec.analysis.tokens == "response"
    lines, problems = [], []
    try:
        content = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInput("--set", str(path), f"a file of rows, a JSON object a line ({error})") from None
    for number, line in enumerate(content, start=1):
        try:
            row: Any = json.loads(line)
        except ValueError as error:
            problems.append(RowProblem(number, "row", f"is no JSON ({error})"))
            continue
        found = canonical(row, number, spec.recipe, spec.data.format, answered)
        if isinstance(found, RowProblem):
            problems.append(found)
        else:
            lines.append(json.dumps(found) + "\n")
    if problems:
        raise InvalidRows(str(path), problems, len(problems), len(content))
    if len(lines) < 2:
        raise InvalidInput("--set", str(path), "a file of at least 2 rows")
    into.write_text("".join(lines), encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code is 0 when the report was written."""
    arguments = _parser().parse_args(argv)
    logging.disable_progress_bar()
    said = sys.stderr

    def say(line: str) -> None:
        print(line, file=said, flush=True)

    def tell(done: int, total: int) -> None:
        end = "\n" if done == total or not said.isatty() else "\r"
        print(f"{done} of {total} rows", file=said, end=end, flush=True)

    try:
        spec, files = _spec(arguments)
        out = Path(arguments.out)
        if (out / REPORT_FILE).exists():
            raise InvalidInput("--out", arguments.out, "a folder without a report")
        with tempfile.TemporaryDirectory() as folder:
            rows = {name: Path(folder) / f"{name}.jsonl" for name in files}
            for name, path in files.items():
                canonical_rows(path, spec, rows[name])
            report = analyse(spec, rows, load_routed(spec), say, tell)
        write_report(report, out, say)
    except MoeError as error:
        print(f"analyze routing: {error}", file=sys.stderr)
        return 2 if isinstance(error, InvalidInput) else 1
    print(report.model_dump_json() if arguments.json else f"{text(report)}\nwritten to {out / REPORT_FILE}")
    return 0


def _spec(arguments: argparse.Namespace) -> tuple[RoutingAnalysisSpec, dict[str, Path]]:
    """The same settings as a job's, so that the same values are right and wrong."""
    sets: dict[str, str] = {}
    for given in arguments.set:
        name, equals, path = given.partition("=")
        if not equals or name in sets:
            raise InvalidInput("--set", given, "NAME=FILE, each name once")
        sets[name] = path
    body = {
        "recipe": "routing_analysis",
        "model": arguments.model,
        "adapter_folder": arguments.adapter,
        "data": {"sets": sets},
        "analysis": {name: getattr(arguments, name) for name in Analysis.model_fields},
        "training": {name: getattr(arguments, name) for name in AnalysisTraining.model_fields},
        "options": {name: getattr(arguments, name) for name in AnalysisOptions.model_fields},
    }
    try:
        return RoutingAnalysisSpec.model_validate(body), {name: Path(path) for name, path in sets.items()}
    except ValidationError as error:
        told = [
            f"{'.'.join(map(str, each['loc']))}: {each['msg'].removeprefix('Value error, ')}" for each in error.errors()
        ]
        raise InvalidBody(told) from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="moe-train analyze routing",
        description="Which experts serve which prompts: two or more sets compared.",
    )
    parser.add_argument("model", help="folder of a model, or hub id")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=FILE", help="rows, JSON lines; two or more")
    parser.add_argument("--adapter", metavar="FOLDER", help="a LoRA adapter to put on the model")
    parser.add_argument("--out", default="routing", help="folder of routing.json and the charts (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="the report itself on standard output")
    # Every setting of the job's blocks, by its name, with the same default and meaning.
    for block in (Analysis, AnalysisTraining, AnalysisOptions):
        for name, field in block.model_fields.items():
            default = field.get_default()
            told = f"{field.description} (default: {default})".replace("%", "%%")
            parser.add_argument(f"--{name.replace('_', '-')}", default=default, metavar="VALUE", help=told)
    return parser


if __name__ == "__main__":
    sys.exit(main())
