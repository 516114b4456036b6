"""An evaluation without a job: what `moe-train eval` runs.

python -m llama_stack_provider_moe.evaluation.command MODEL [--adapter FOLDER] --refuse FILE --retain FILE ...
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

import torch
from peft import PeftModel
from pydantic import ValidationError
from transformers import PreTrainedModel
from transformers.utils import logging

from llama_stack_provider_moe.datarows import canonical
from llama_stack_provider_moe.errors import InvalidBody, InvalidInput, InvalidRows, ModelError, MoeError, RowProblem
from llama_stack_provider_moe.evaluation import report as reports
from llama_stack_provider_moe.evaluation.generate import Limits, LocalModel, ends_of, evaluating
from llama_stack_provider_moe.evaluation.judges import QUESTION, Judge
from llama_stack_provider_moe.evaluation.loading import opened_judge
from llama_stack_provider_moe.evaluation.report import EvaluationReport, Measurement
from llama_stack_provider_moe.evaluation.served import Endpoint, ServedJudge, ServedModel
from llama_stack_provider_moe.evaluation.suite import REPORT_FILE, Material, Suite, check_masked
from llama_stack_provider_moe.experts.layout import ExpertLayout, find_layout
from llama_stack_provider_moe.experts.steering import restore_biases
from llama_stack_provider_moe.spec import DType, Gate, RefusalJudge, RowKind, SafetyEvaluation
from llama_stack_provider_moe.spec.evaluation_rows import canonical_own
from llama_stack_provider_moe.spec.routing import made_for, masks_of, read_report
from llama_stack_provider_moe.training.loader import DTYPES, load_beside, pick_device

SETS: dict[str, RowKind] = {
    "refuse": "conversation", "safe": "conversation", "retain": "conversation", "scenarios": "scenario",
    "labelled": "judged",
}  # fmt: skip
KEY_VARIABLE = "MOE_EVAL_API_KEY"
EXCEEDED = 1


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code is 0 when all was measured and every limit kept, 1 when not, 2 for a mistake in the settings."""
    arguments = _parser().parse_args(argv)
    logging.disable_progress_bar()
    try:
        settings = _settings(arguments)
        out = Path(arguments.out)
        if (out / REPORT_FILE).exists():
            raise InvalidInput("--out", arguments.out, f"a folder without {REPORT_FILE}")
        with tempfile.TemporaryDirectory() as folder:
            paths = {}
            for name, kind in SETS.items():
                if getattr(arguments, name) is not None:
                    paths[name] = Path(folder) / f"{name}.jsonl"
                    canonical_rows(Path(getattr(arguments, name)), f"--{name}", kind, name == "retain", paths[name])
            material = Material.read(settings, paths)
        suite = Suite(arguments.model, settings, material, arguments.seed)
        report = _of_server(arguments, suite) if arguments.url else _in_memory(arguments, suite)
        out.mkdir(parents=True, exist_ok=True)
        (out / REPORT_FILE).write_text(report.model_dump_json(indent=2), encoding="utf-8")
    except MoeError as error:
        print(f"eval: {error}", file=sys.stderr)
        return 2 if isinstance(error, InvalidInput) else 1
    print(report.model_dump_json() if arguments.json else f"{reports.text(report)}\nwritten to {out / REPORT_FILE}")
    if report.exceeded:
        print(f"eval: {reports.reason(report.exceeded)}", file=sys.stderr)
        return EXCEEDED
    return 0


def canonical_rows(path: Path, option: str, kind: RowKind, answered: bool, into: Path) -> None:
    """A user's JSONL file, checked as the server would check a data set's rows."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInput(option, str(path), f"a file of rows, a JSON object a line ({error})") from None
    found: list[str] = []
    problems = []
    for number, line in enumerate(lines, start=1):
        try:
            row: Any = json.loads(line)
        except ValueError as error:
            problems.append(RowProblem(number, "row", f"is no JSON ({error})"))
            continue
        if kind in ("scenario", "judged"):
            made: dict[str, Any] | RowProblem = canonical_own(row, number, kind)
        else:
            made = canonical(row, number, "sft", "auto", answered)
        if isinstance(made, RowProblem):
            problems.append(made)
        else:
            found.append(json.dumps(made) + "\n")
    if problems:
        raise InvalidRows(str(path), problems, len(problems), len(lines))
    if not found:
        raise InvalidInput(option, str(path), "a file with rows; this one is empty")
    into.write_text("".join(found), encoding="utf-8")


def _in_memory(arguments: argparse.Namespace, suite: Suite) -> EvaluationReport:
    settings, dtype = suite.settings, arguments.dtype
    device = pick_device(dtype)
    model, tokenizer = load_beside(arguments.model, dtype, device, arguments.chat_template)
    layout, ends = find_layout(model), ends_of(model)
    subject_model = model if arguments.adapter is None else _adapted(model, arguments.adapter, layout)
    check_masked(settings, subject_model, layout)
    limits = Limits(settings.batch_size, settings.max_new_tokens, arguments.max_length)
    autocast = None if dtype == "fp32" else DTYPES[dtype]  # as in a job
    states: dict[str, Measurement] = {}
    with evaluating(subject_model), _judge(arguments, settings, device) as judge:
        for state in ("before", "after") if isinstance(subject_model, PeftModel) else ("before",):
            subject = LocalModel(subject_model, tokenizer, limits, ends, autocast, _teller(state))
            if state == "before" and isinstance(subject_model, PeftModel):
                with subject_model.disable_adapter():
                    states |= suite.measure_states(subject, judge, state, subject_model, layout)
            else:
                states |= suite.measure_states(subject, judge, state, subject_model, layout)
        return suite.conclude(states, judge.name, suite.agreement(judge))


def _adapted(model: PreTrainedModel, folder: str, layout: ExpertLayout | None) -> PeftModel:
    try:
        adapted: PeftModel = PeftModel.from_pretrained(model, folder).eval()
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: tensors of other shapes
        raise ModelError(f"--adapter: {folder!r} is no adapter of this model: {error}") from error
    if layout is not None:
        restore_biases(Path(folder), adapted, layout)
    return adapted


def _of_server(arguments: argparse.Namespace, suite: Suite) -> EvaluationReport:
    if suite.settings.masked_experts or arguments.adapter:
        raise InvalidInput("--url", arguments.url, "neither masked experts nor --adapter beside it: a server's model "
                           "can't be changed from here")  # fmt: skip
    endpoint = Endpoint(arguments.url, arguments.model, os.environ.get(KEY_VARIABLE), arguments.timeout)
    try:
        subject = ServedModel(endpoint, suite.settings.max_new_tokens, _teller("before"))
        with _judge(arguments, suite.settings, pick_device(arguments.dtype)) as judge:
            states = {"before": suite.measure(subject, judge)}
            return suite.conclude(states, judge.name, suite.agreement(judge))
    finally:
        endpoint.close()


@contextmanager
def _judge(arguments: argparse.Namespace, settings: SafetyEvaluation, device: torch.device) -> Iterator[Judge]:
    if arguments.judge_url is None:
        with opened_judge(settings, arguments.dtype, device, arguments.max_length) as judge:
            yield judge
        return
    assert settings.judge.model is not None, "it was checked"
    key = os.environ.get(KEY_VARIABLE)
    endpoint = Endpoint(arguments.judge_url, settings.judge.model, key, arguments.timeout)
    try:
        yield ServedJudge(endpoint, QUESTION)
    finally:
        endpoint.close()


def _teller(state: str) -> Callable[[str, int, int], None]:
    def tell(name: str, done: int, total: int) -> None:
        end = "\n" if done == total or not sys.stderr.isatty() else "\r"
        print(f"eval {state}: {name}, {done} of {total} rows", file=sys.stderr, end=end, flush=True)

    return tell


def _settings(arguments: argparse.Namespace) -> SafetyEvaluation:
    """The same settings as a job's, so that the same values are right and wrong."""
    masked: dict[str, str] = {}
    for given in arguments.mask:
        layer, colon, experts = given.partition(":")
        if not colon or layer in masked:
            raise InvalidInput("--mask", given, "LAYER:EXPERTS such as 3:0-3,7, each layer once")
        masked[layer] = experts
    masked_from = None
    if arguments.mask_from is not None:
        found, masked_from = _of_analysis(arguments)
        for layer, experts in found.items():
            masked[layer] = f"{masked[layer]},{experts}" if layer in masked else experts
    limits: dict[str, str] = {}
    for given in arguments.fail_if:
        name, equals, limit = given.partition("=")
        if not equals or name not in Gate.model_fields:
            raise InvalidInput("--fail-if", given, f"NAME=LIMIT with a name of {', '.join(Gate.model_fields)}")
        limits[name] = limit
    if arguments.judge_url and arguments.judge_model is None:
        raise InvalidInput("--judge-url", arguments.judge_url, "--judge-model, the server's name of it, beside it")
    if limits and arguments.adapter is None:
        raise InvalidInput("--fail-if", limits, "--adapter beside it: without one there is nothing to compare with")
    plain = ("max_rows", "max_new_tokens", "batch_size", "resamples", "examples")
    body = {
        **{f"{name}_dataset_id": getattr(arguments, name) for name in SETS if name != "labelled"},
        **{name: getattr(arguments, name) for name in plain},
        "judge": {
            "kind": "keyword" if arguments.judge_model is None else "model",
            "model": arguments.judge_model,
            "labelled_dataset_id": arguments.labelled,
        },
        "masked_experts": masked,
        "masked_from": masked_from,
        "tasks": arguments.task,
        "fail_if": limits,
    }
    try:
        return SafetyEvaluation.model_validate(body)
    except ValidationError as error:
        told = [
            f"{'.'.join(map(str, each['loc']))}: {each['msg'].removeprefix('Value error, ')}".removeprefix(": ")
            for each in error.errors()
        ]
        raise InvalidBody(told) from None


def _of_analysis(arguments: argparse.Namespace) -> tuple[dict[str, str], dict[str, Any]]:
    """The experts that a routing analysis found for `--mask-set`, as a job takes them, and where they are from."""
    path, name, top = Path(arguments.mask_from), arguments.mask_set, arguments.mask_top
    if name is None:
        raise InvalidInput("--mask-from", str(path), "--mask-set beside it, the set whose experts are masked")
    if top < 1:
        raise InvalidInput("--mask-top", top, ">= 1")
    report = read_report(path, "--mask-from")
    try:
        found = masks_of(report, name, top, "--mask-from")
    except InvalidInput as error:
        raise InvalidInput("--mask-set", name, error.expected) from None
    return found, made_for(report, f"{path.name}, set {name}, top {top}").model_dump()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="moe-train eval",
        description="Refusals, over-refusals, perplexity, tool calls of a model; with --adapter without it and with.",
    )
    told = SafetyEvaluation.model_fields
    parser.add_argument("model", help="folder of a model, or hub id; with --url the server's name of it")
    parser.add_argument("--adapter", metavar="FOLDER", help="a LoRA adapter: before is the model without it")
    for name in SETS:
        parser.add_argument(f"--{name}", metavar="FILE", help=_about(name))
    parser.add_argument("--url", help="of an OpenAI-compatible server, with /v1; its key in MOE_EVAL_API_KEY")
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds for one answer (default: %(default)s)")
    parser.add_argument("--judge-model", metavar="MODEL", help="folder or hub id; left out: the keyword judge")
    parser.add_argument("--judge-url", help="server of the judge's model; its key in MOE_EVAL_API_KEY")
    parser.add_argument("--mask", action="append", default=[], metavar="LAYER:EXPERTS", help="as 3:0-3,7; repeatable")
    parser.add_argument("--mask-from", metavar="FILE", help="a routing analysis (routing.json): mask what it found")
    parser.add_argument("--mask-set", metavar="NAME", help="with --mask-from: the set whose experts they are")
    parser.add_argument("--mask-top", type=int, default=10, help="with --mask-from: at most so many, none that chance "
                        "explains (default: %(default)s)")  # fmt: skip
    parser.add_argument("--task", action="append", default=[], help="of lm-eval; repeatable")
    parser.add_argument("--fail-if", action="append", default=[], metavar="NAME=LIMIT",
                        help=f"exit code 1 beyond it; {', '.join(Gate.model_fields)}")  # fmt: skip
    for name in ("max_rows", "max_new_tokens", "batch_size", "resamples", "examples"):
        meaning = f"{told[name].description} (default: %(default)s)".replace("95%.", "95%%.")
        parser.add_argument(f"--{name.replace('_', '-')}", default=told[name].get_default(), help=meaning)
    parser.add_argument("--max-length", type=int, default=1024, help="tokens of a prompt (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=42, help="of the resampling (default: %(default)s)")
    parser.add_argument("--dtype", choices=get_args(DType), default="bf16", help="(default: %(default)s)")
    parser.add_argument("--chat-template", choices=["chatml", "plain"], help="left out: the model's own")
    parser.add_argument("--out", default="evaluation", help=f"folder of {REPORT_FILE} (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="the report itself on standard output")
    return parser


def _about(name: str) -> str:
    fields = (RefusalJudge if name == "labelled" else SafetyEvaluation).model_fields
    return str(fields[f"{name}_dataset_id"].description).replace("%", "%%")


if __name__ == "__main__":
    sys.exit(main())
