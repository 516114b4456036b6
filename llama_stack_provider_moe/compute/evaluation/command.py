"""An evaluation without a job: the code of `moe-train eval`.

$ moe-train eval MODEL [--adapter FOLDER] --refuse FILE --retain FILE ...
"""

import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import PeftModel
from transformers import PreTrainedModel
from transformers.utils import logging

from llama_stack_provider_moe.compute.ablation.measurements import read
from llama_stack_provider_moe.compute.ablation.run_time import Removal, removal, require_same_model
from llama_stack_provider_moe.compute.evaluation import report as reports
from llama_stack_provider_moe.compute.evaluation.generate import Limits, LocalModel, ends_of, evaluating
from llama_stack_provider_moe.compute.evaluation.judges import QUESTION, Judge, opened_judge
from llama_stack_provider_moe.compute.evaluation.report import EvaluationReport, Measurement
from llama_stack_provider_moe.compute.evaluation.served import Endpoint, ServedJudge, ServedModel
from llama_stack_provider_moe.compute.evaluation.suite import REPORT_FILE, Material, Suite, check_masked
from llama_stack_provider_moe.compute.models.loader import DTYPES, load_for_inference, pick_device
from llama_stack_provider_moe.compute.models.rope import as_shipped, extend_for
from llama_stack_provider_moe.compute.moe.derive import find_layout
from llama_stack_provider_moe.compute.moe.layout import ExpertLayout
from llama_stack_provider_moe.compute.moe.steering import restore_biases
from llama_stack_provider_moe.errors import InvalidInput, ModelError
from llama_stack_provider_moe.jobdir import local_names
from llama_stack_provider_moe.spec import SafetyEvaluation
from llama_stack_provider_moe.spec.command_words import answered
from llama_stack_provider_moe.spec.local_commands import EVALUATION_COMMAND, EvaluationCommand, evaluation_settings
from llama_stack_provider_moe.spec.local_rows import evaluation_files

KEY_VARIABLE = "MOE_EVAL_API_KEY"
EXCEEDED = 1


def main(argv: Sequence[str] | None = None) -> int:
    """Run `moe-train eval`.

    Returns:
        0 if every task was measured and no limit was exceeded, 1 if a limit was exceeded, a task has no score or
        something failed, 2 for a mistake in the command line.
    """
    logging.disable_progress_bar()
    return answered(EVALUATION_COMMAND, argv, "eval", _run)


def _run(arguments: EvaluationCommand) -> int:
    if arguments.url is None:
        arguments.model, arguments.adapter = local_names.on_base(arguments.model, arguments.adapter)
    if arguments.judge_model is not None and arguments.judge_url is None:
        arguments.judge_model = local_names.whole_model(arguments.judge_model, "--judge-model")
    settings = evaluation_settings(arguments)
    out = Path(arguments.out)
    if (out / REPORT_FILE).exists():
        raise InvalidInput("--out", arguments.out, f"a folder without {REPORT_FILE}")
    with tempfile.TemporaryDirectory() as folder:
        paths = {}
        for name, rows in evaluation_files(arguments).items():
            paths[name] = Path(folder) / f"{name}.jsonl"
            paths[name].write_text("".join(rows), encoding="utf-8")
        material = Material.read(settings, paths)
    suite = Suite(arguments.model, settings, material, arguments.seed)
    report = _of_server(arguments, arguments.url, suite) if arguments.url else _in_memory(arguments, suite)
    out.mkdir(parents=True, exist_ok=True)
    (out / REPORT_FILE).write_text(report.model_dump_json(indent=2), encoding="utf-8")
    print(report.model_dump_json() if arguments.as_json else f"{reports.text(report)}\nwritten to {out / REPORT_FILE}")
    if report.exceeded:
        print(f"eval: {reports.reason(report.exceeded)}", file=sys.stderr)
        return EXCEEDED
    if unmeasured := report.without_score(arguments.task):
        print(f"eval: --task: no score of {', '.join(unmeasured)}; the report says why", file=sys.stderr)
        return EXCEEDED
    return 0


def _in_memory(arguments: EvaluationCommand, suite: Suite) -> EvaluationReport:
    settings, dtype = suite.settings, arguments.dtype
    device = pick_device(dtype)
    model, tokenizer = load_for_inference(arguments.model, dtype, device, arguments.chat_template)
    layout, ends = find_layout(model), ends_of(model)
    subject_model = model if arguments.adapter is None else _adapted(model, arguments.adapter, layout)
    check_masked(settings, subject_model, layout)
    suite.removal = _removal(settings, arguments, subject_model)
    limits = Limits(settings.batch_size, settings.max_new_tokens, arguments.max_length)
    autocast = None if dtype == "fp32" else DTYPES[dtype]  # as in a job
    states: dict[str, Measurement] = {}
    with evaluating(subject_model), _judge(arguments, settings, device) as judge:
        for state in ("before", "after") if isinstance(subject_model, PeftModel) else ("before",):
            subject = LocalModel(subject_model, tokenizer, limits, ends, autocast, _progress(state))
            if state == "before" and isinstance(subject_model, PeftModel):
                with subject_model.disable_adapter(), as_shipped(subject_model):
                    states |= suite.measure_states(subject, judge, state, subject_model, layout)
            else:
                states |= suite.measure_states(subject, judge, state, subject_model, layout)
        return suite.conclude(states, judge.name, suite.agreement(judge))


def _removal(
    settings: SafetyEvaluation, arguments: EvaluationCommand, model: PreTrainedModel | PeftModel
) -> Removal | None:
    if settings.ablated is None:
        return None
    field = "--ablate-from"
    found = read(local_names.measurements_file(settings.ablated.measurements, field), field)
    adapter = None if arguments.adapter is None else Path(arguments.adapter)
    require_same_model(found.provenance, arguments.model, adapter, field)
    return removal(model, settings.ablated, found, "ablated.")


def _adapted(model: PreTrainedModel, folder: str, layout: ExpertLayout | None) -> PeftModel:
    extend_for(model, Path(folder))
    try:
        adapted: PeftModel = PeftModel.from_pretrained(model, folder).eval()
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: tensors of other shapes
        raise ModelError(f"--adapter: {folder!r} is not an adapter of this model: {error}") from error
    if layout is not None:
        restore_biases(Path(folder), adapted, layout)
    return adapted


def _of_server(arguments: EvaluationCommand, url: str, suite: Suite) -> EvaluationReport:
    if suite.settings.masked_experts or suite.settings.ablated or arguments.adapter:
        raise InvalidInput("--url", url, "no masked experts, no --ablate and no --adapter with it: the model on a "
                           "server can't be changed from here")  # fmt: skip
    endpoint = Endpoint(url, arguments.model, os.environ.get(KEY_VARIABLE), arguments.timeout)
    try:
        subject = ServedModel(endpoint, suite.settings.max_new_tokens, _progress("before"))
        with _judge(arguments, suite.settings, pick_device(arguments.dtype)) as judge:
            states = {"before": suite.measure(subject, judge)}
            return suite.conclude(states, judge.name, suite.agreement(judge))
    finally:
        endpoint.close()


@contextmanager
def _judge(arguments: EvaluationCommand, settings: SafetyEvaluation, device: torch.device) -> Iterator[Judge]:
    if arguments.judge_url is None:
        with opened_judge(settings, arguments.dtype, device, arguments.max_length) as judge:
            yield judge
        return
    assert settings.judge.model is not None, "checked by evaluation_settings"
    key = os.environ.get(KEY_VARIABLE)
    endpoint = Endpoint(arguments.judge_url, settings.judge.model, key, arguments.timeout)
    try:
        yield ServedJudge(endpoint, QUESTION)
    finally:
        endpoint.close()


def _progress(state: str) -> Callable[[str, int, int], None]:
    def progress(name: str, done: int, total: int) -> None:
        end = "\n" if done == total or not sys.stderr.isatty() else "\r"
        print(f"eval {state}: {name}, {done} of {total} rows", file=sys.stderr, end=end, flush=True)

    return progress


if __name__ == "__main__":
    sys.exit(main())
