"""Checks of a local command before its process imports torch: paths, names of jobs, settings."""

import importlib.util
import os
from pathlib import Path
from urllib.parse import urlsplit

from llama_stack_provider_moe.control.cli import model_checks
from llama_stack_provider_moe.errors import InvalidInput
from llama_stack_provider_moe.ground.redaction import without_passwords
from llama_stack_provider_moe.jobdir import local_names
from llama_stack_provider_moe.shields.probe_card import read_card
from llama_stack_provider_moe.spec.ablate_commands import AnalyzeCommand, MeasureCommand, measure_job
from llama_stack_provider_moe.spec.ablation import MEASUREMENTS_FILE
from llama_stack_provider_moe.spec.local_commands import (
    EVALUATION_SETS,
    EvaluationCommand,
    GgufCommand,
    LoadCheckCommand,
    MergeCommand,
    RoutingCommand,
    UpcycleCommand,
    evaluation_settings,
    routing_job,
)
from llama_stack_provider_moe.spec.local_rows import (
    FILE_OF_ROWS,
    calibration_rows,
    evaluation_files,
    measured_rows,
    probe_rows,
    routing_rows,
    scored_rows,
)
from llama_stack_provider_moe.spec.probe import CARD_FILE
from llama_stack_provider_moe.spec.probe_commands import FitCommand, ScoreCommand, fit_job
from llama_stack_provider_moe.spec.routing import REPORT_FILE
from llama_stack_provider_moe.spec.surgery_commands import SurgeryCommand, surgery_settings

_EVALUATION_REPORT = "eval.json"


def upcycle(command: UpcycleCommand) -> None:
    """Raise InvalidInput if the command can't work."""
    source = _whole_model(command.source, "SOURCE")
    _new(command.out, "folder")
    if command.top_k > command.experts:
        raise InvalidInput("--top-k", command.top_k, f"1 to {command.experts}, the number of experts")
    model_checks.dense(source, "SOURCE")


def merge(command: MergeCommand) -> None:
    """Raise InvalidInput if the command can't work."""
    _whole_model(command.base, "BASE")
    _folder(local_names.adapter_folder(command.adapter, "ADAPTER"), "ADAPTER", "folder of an adapter or name of a job")
    _new(command.out, "folder")


def gguf(command: GgufCommand) -> None:
    """Raise InvalidInput if the command can't work."""
    command.require_one_file()
    _whole_model(command.model, "MODEL")
    _new(command.out, "file")


def load_check(command: LoadCheckCommand) -> None:
    """Raise InvalidInput if the command can't work."""
    given = local_names.job_or_artifact(command.given, "JOBFOLDER|ADAPTER")
    _folder(given, "JOBFOLDER|ADAPTER", "folder or name of a job, or of one of its artifacts")
    for name, option in ((command.base, "--base"), (command.merged, "--merged")):
        if name is not None:
            _whole_model(name, option)


def routing(command: RoutingCommand) -> None:
    """Raise InvalidInput if the command can't work."""
    model, adapter = _model_and_adapter(command.model, command.adapter)
    spec, files = routing_job(command)
    for path in files.values():
        _readable(path, "--rows")
    _without_report(command.out, REPORT_FILE)
    _contents(model, adapter)
    for path in files.values():
        routing_rows(path, spec)


def measure(command: MeasureCommand) -> None:
    """Raise InvalidInput if the command can't work."""
    model, adapter = _model_and_adapter(command.model, command.adapter)
    spec, files = measure_job(command)
    for path in files.values():
        _readable(path, "--rows")
    _without_report(command.out, MEASUREMENTS_FILE)
    _contents(model, adapter)
    for path in files.values():
        measured_rows(path, spec)


def fit_probe(command: FitCommand) -> None:
    """Raise InvalidInput if the command can't work."""
    model, adapter = _model_and_adapter(command.model, command.adapter)
    spec, files = fit_job(command)
    for path in files.values():
        _readable(path, "--rows")
    _without_report(command.out, CARD_FILE)
    _contents(model, adapter)
    for name, path in files.items():
        probe_rows(path, name, spec)


def score(command: ScoreCommand) -> None:
    """Raise InvalidInput if the command can't work."""
    read_card(local_names.probe_folder(command.probe, "PROBE"), "PROBE")
    _readable(Path(command.file), "FILE")
    scored_rows(Path(command.file))


def analyze_directions(command: AnalyzeCommand) -> None:
    """Raise InvalidInput if the command can't work."""
    path = Path(command.measurements)
    path = path / MEASUREMENTS_FILE if path.is_dir() else path
    if not path.is_file():
        raise InvalidInput("FILE", command.measurements, f"a {MEASUREMENTS_FILE} or its folder; no such file exists")


def surgery(command: SurgeryCommand) -> None:
    """Raise InvalidInput if the command can't work."""
    settings = surgery_settings(command)
    model = _whole_model(command.model, "MODEL")
    if not command.dry_run and os.path.lexists(command.out):
        raise InvalidInput("--out", command.out, "a folder that does not exist yet")
    files = {"--rows": settings.rows, "--general-rows": settings.general_rows}
    for option, path in files.items():
        if path is not None:
            _readable(Path(path), option)
    model_checks.contents(model, "MODEL")
    if settings.surgery.add is not None and settings.surgery.add.mlp_from is not None:
        model_checks.contents(_whole_model(settings.surgery.add.mlp_from, "--mlp-from"), "--mlp-from")
    for option, path in files.items():
        if path is not None:
            calibration_rows(Path(path), option)


def evaluate(command: EvaluationCommand) -> None:
    """Raise InvalidInput if the command can't work."""
    if not command.task and all(getattr(command, name) is None for name in EVALUATION_SETS):
        measured = ", ".join(f"--{name}" for name in EVALUATION_SETS if name != "labelled")
        raise InvalidInput.missing("--retain", f"something to measure: at least one of {measured}, --task")
    settings = evaluation_settings(command)
    if settings.ablated is not None:
        local_names.measurements_file(settings.ablated.measurements, "--ablate-from")
    _tasks(command)
    for name in EVALUATION_SETS:
        file = getattr(command, name)
        if file is not None:
            _readable(Path(file), f"--{name}")
    model, adapter = (None, None) if command.url is not None else _model_and_adapter(command.model, command.adapter)
    judge = None
    if command.judge_model is not None and command.judge_url is None:
        judge = _whole_model(command.judge_model, "--judge-model")
    _without_report(command.out, _EVALUATION_REPORT)
    _servers(command)
    if model is not None:
        _contents(model, adapter)
    if judge is not None:
        model_checks.contents(judge, "--judge-model")
    evaluation_files(command)


def _tasks(command: EvaluationCommand) -> None:
    """Check that lm-eval can run here: the user asked for its tasks, so a report without them would be a surprise."""
    if not command.task:
        return
    named = ", ".join(command.task)
    if command.url is not None:
        expected = "no --url with it: run lm-eval itself against the server (its model local-chat-completions)"
        raise InvalidInput("--task", named, expected)
    if importlib.util.find_spec("lm_eval") is None:
        raise InvalidInput("--task", named, "an environment with lm-eval, which this one lacks: pip install "
                           "'llama-stack-provider-moe[eval]'")  # fmt: skip


def _servers(command: EvaluationCommand) -> None:
    for url, option in ((command.url, "--url"), (command.judge_url, "--judge-url")):
        if url is None:
            continue
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            expected = "an http or https URL, such as http://127.0.0.1:8000/v1"
            raise InvalidInput(option, without_passwords(url), expected)
    if command.url is not None and (command.adapter or command.mask or command.mask_from or command.ablate):
        raise InvalidInput("--url", without_passwords(command.url), "no --adapter, --mask, --mask-from and --ablate "
                           "with it: the model on a server can't be changed from here")  # fmt: skip


def _model_and_adapter(model: str, adapter: str | None) -> tuple[str, str | None]:
    found, its_adapter = local_names.on_base(model, adapter)
    model_checks.model(found, "MODEL")
    if adapter is not None and its_adapter is not None:
        _folder(its_adapter, "--adapter", "folder of an adapter or name of a job")
    return found, its_adapter


def _contents(model: str, adapter: str | None) -> None:
    model_checks.contents(model, "MODEL")
    if adapter is not None:
        model_checks.adapter(adapter, "--adapter")


def _whole_model(name: str, option: str) -> str:
    found = local_names.whole_model(name, option)
    model_checks.model(found, option)
    return found


def _folder(name: str, option: str, what: str) -> None:
    if not Path(name).is_dir():
        raise InvalidInput(option, name, f"the {what}; no such folder exists")


def _new(out: str, kind: str) -> None:
    if os.path.lexists(out):
        raise InvalidInput("OUT", out, f"a {kind} that does not exist yet")


def _without_report(folder: str, report: str) -> None:
    if (Path(folder) / report).exists():
        raise InvalidInput("--out", folder, f"a folder without {report}")


def _readable(path: Path, option: str) -> None:
    try:
        with path.open("rb"):
            pass
    except OSError as error:
        raise InvalidInput(option, str(path), f"{FILE_OF_ROWS} ({error.strerror})") from None
