"""`moe-train grade`: graders on answers in a file, before any training."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Annotated, cast

import typer
from rich.console import Group, RenderableType

from llama_stack_provider_moe.control.cli import local
from llama_stack_provider_moe.control.cli.act import answer, end
from llama_stack_provider_moe.control.cli.exits import Exit
from llama_stack_provider_moe.control.cli.job_file import read_value
from llama_stack_provider_moe.control.cli.options import Json
from llama_stack_provider_moe.control.cli.screen import Screen, table, text
from llama_stack_provider_moe.errors import InvalidInput
from llama_stack_provider_moe.graders.document import GradeReport, report_of, sample_of
from llama_stack_provider_moe.graders.opening import check
from llama_stack_provider_moe.graders.panel import panel_of
from llama_stack_provider_moe.graders.request import GradeRequest, answered
from llama_stack_provider_moe.ground import run
from llama_stack_provider_moe.jobdir import local_names
from llama_stack_provider_moe.spec.blocks import Block
from llama_stack_provider_moe.spec.graders import Grader, Monitor, Refusal, RewardModel, inside
from llama_stack_provider_moe.spec.graders_config import GradersConfig, JudgeConfig
from llama_stack_provider_moe.spec.local_rows import graded_rows
from llama_stack_provider_moe.spec.rewards import Grading, Reward, Rewards
from llama_stack_provider_moe.spec.validation_errors import validated

MODULE = "llama_stack_provider_moe.compute.grading.command"
_ROWS_SHOWN = 8
_WHAT = "a grader, an object with `reward` (and `grading`) as a job has it, a list of rewards, or a job"


class _Lone(Block):
    grader: Grader


class _File(Block):
    reward: Rewards
    grading: Grading = Grading()


def grade(
    file: Annotated[
        str, typer.Argument(metavar="FILE", help="JSON or YAML: a grader, the `reward` of a job, or a job.")
    ],
    data: Annotated[Path, typer.Option("--data", metavar="ROWS", help="JSON Lines or CSV: rows with their answers.")],
    column: Annotated[
        str | None,
        typer.Option(
            "--answer", metavar="COLUMN", help="Column with the answer; default: output_text, or the last turn."
        ),
    ] = None,
    judges: Annotated[
        Path | None,
        typer.Option("--judges", metavar="FILE", help="YAML with `judges`, as in a server's `graders`, to ask models."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Try graders on answers in a file. Exit code 1 if a grader gave some answer no value."""

    def act(screen: Screen) -> Exit:
        asked = _request(file, data, column, judges)
        document = _graded(asked)
        answer(screen, document, _shown)
        return Exit.FAILED if any(each["failed"] for each in document["graders"]) else Exit.OK

    end(as_json, act)


def _request(file: str, data: Path, column: str | None, judges: Path | None) -> GradeRequest:
    content = read_value(file, _WHAT)
    alone = isinstance(content, dict) and "type" in content
    if isinstance(content, dict) and "recipe" in content:  # a job file
        content = {name: content[name] for name in ("reward", "grading") if name in content}
    if alone:
        read = _File(reward=[Reward(grader=validated(_Lone, {"grader": content}).grader)])
    else:
        read = validated(_File, {"reward": content} if isinstance(content, list) else content)
    named = {} if judges is None else _judges(judges)
    for number, reward in enumerate(read.reward):
        field = "grader" if alone else f"reward.{number}.grader"
        _resolve(reward, field)
        check(reward.grader, named, field, "`--judges FILE`" if judges is None else f"--judges {judges}")
    samples = [sample_of(json.loads(line), number, column) for number, line in enumerate(graded_rows(data), start=1)]
    return GradeRequest(reward=read.reward, grading=read.grading, judges=named, answers=answered(samples))


def _judges(file: Path) -> dict[str, JudgeConfig]:
    return validated(GradersConfig, read_value(str(file), "an object with judges", "--judges")).judges


def _resolve(reward: Reward, field: str) -> None:
    """Replace names of jobs by folders."""
    for each in inside(reward.grader):
        if isinstance(each, RewardModel) or (isinstance(each, Refusal) and each.model is not None):
            each.model = local_names.whole_model(str(each.model), f"{field}.model")
        if isinstance(each, Monitor):
            each.probe = str(local_names.probe_folder(each.probe, f"{field}.probe"))


def _graded(asked: GradeRequest) -> GradeReport:
    if not any(each.grader.runs == "torch" for each in asked.reward):
        with panel_of(asked.reward, asked.grading, asked.judges) as panel:
            graded = panel.grade([each.sample() for each in asked.answers], limits_failures=False)
        return report_of(asked.reward, graded)
    local.require_training_environment()
    command = run.command(sys.executable, MODULE)
    done = subprocess.run(command, check=False, capture_output=True, input=asked.model_dump_json().encode())
    said = done.stderr.decode(errors="replace").strip()
    if done.returncode != 0:
        raise InvalidInput("FILE", said[-2000:] or f"exit code {done.returncode}", "graders that can run here")
    return cast(GradeReport, json.loads(done.stdout.splitlines()[-1]))


def _shown(document: GradeReport) -> RenderableType:
    rows = [
        (each["name"], each["type"], f"{each['weight']:g}", each["prompts"] or "all", str(each["graded"]),
         _number(each["mean"]), _number(each["least"]), _number(each["largest"]), _number(each["spread"]),
         ", ".join(f"{count} {code}" for code, count in each["failed"].items()) or "none")
        for each in document["graders"]
    ]  # fmt: skip
    head = ("GRADER", "TYPE", "WEIGHT", "PROMPTS", "GRADED", "MEAN", "LEAST", "LARGEST", "SPREAD", "FAILED")
    lines = [f"{document['rows']} answers; mean of the sums: {_number(document['mean_total'])}"]
    for each in document["graders"]:
        if each["bad_answers"]:
            lines.append(f"{each['name']}: {each['bad_answers']} answers lack what it reads, and got its least value")
        if each["spread"] == 0 and each["graded"] > 1:
            lines.append(f"{each['name']}: warning: every answer got the same, so nothing can be learnt from it here")
    failed = [each for each in document["results"] if each["failures"]]
    for row in failed[:_ROWS_SHOWN]:
        lines += [f"row {row['row']}: {name}: {why['message']}" for name, why in row["failures"].items()]
    if len(failed) > _ROWS_SHOWN:
        lines.append(f"and {len(failed) - _ROWS_SHOWN} more rows")
    return Group(table(head, rows), *map(text, lines))


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def register(moe_train: typer.Typer) -> None:
    """Add `grade` to `moe-train`."""
    moe_train.command(name="grade")(grade)
