"""A job's block `eval`: the model in memory is measured before its first step and after its last one.

What was measured before is kept in `before.json`, so that a job whose process was lost compares with the same figures.
"""

import time

from peft import PeftModel
from pydantic import Field
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llama_stack_provider_moe.errors import TrainingError
from llama_stack_provider_moe.evaluation import report as reports
from llama_stack_provider_moe.evaluation.generate import Limits, LocalModel, ends_of, evaluating
from llama_stack_provider_moe.evaluation.loading import opened_judge
from llama_stack_provider_moe.evaluation.report import EvaluationReport, JudgeAgreement, Measurement
from llama_stack_provider_moe.evaluation.suite import REPORT_FILE, Material, Suite, check_masked
from llama_stack_provider_moe.experts.layout import ExpertLayout
from llama_stack_provider_moe.jobs.events import Assessed, Saved
from llama_stack_provider_moe.jobs.folder import Artifact, write_atomic
from llama_stack_provider_moe.spec import Block, ranges
from llama_stack_provider_moe.training.checkpoints import describe, publish, remove
from llama_stack_provider_moe.training.loader import DTYPES
from llama_stack_provider_moe.training.session import AnySession, Stopped

TOLD_EVERY_S = 15.0


class GateFailed(TrainingError):
    """A limit of `eval.fail_if` was exceeded; everything that the job made is kept."""


class _Kept(Block):
    judge: str
    agreement: list[JudgeAgreement]
    states: dict[str, Measurement]
    skipped: list[str] = Field(default_factory=list)


class Assessment:
    """The evaluation of one job.

    Args:
        session: of the job, whose spec has an `eval`.
        model: that trains, with its adapter where there is one; untrained so far.
        tokenizer: its own.
        layout: of its experts, None on a dense model.

    Raises:
        ModelError: experts are to be masked of a dense model.
        InvalidInput: experts that it does not have.
    """

    def __init__(
        self,
        session: AnySession,
        model: PreTrainedModel | PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        layout: ExpertLayout | None,
    ) -> None:
        spec = session.spec
        assert spec.eval is not None
        self._session = session
        self._settings = spec.eval
        self._model = model
        self._tokenizer = tokenizer
        self._layout = layout
        self._ends = ends_of(model)
        paths = {
            source.part.removeprefix("eval-"): session.folder.rows(source.part) for source in spec.evaluation_sources()
        }
        material = Material.read(self._settings, paths)
        self._suite = Suite(spec.model, self._settings, material, spec.options.seed)
        self._state = "before"
        self._step = 0
        self._told_s = 0.0
        check_masked(self._settings, model, layout)
        if masked := self._settings.masked():
            origin = self._settings.masked_from
            told = "; ".join(f"layer {layer}: {', '.join(ranges(masked[layer]))}" for layer in sorted(masked))
            source = "" if origin is None else f" (with those of {origin.analysis})"
            session.say(f"eval: measured once more without experts of {told}{source}")

    def before(self) -> Assessed:
        """Measure the untrained model, unless an earlier start of the job has done so; what was found."""
        if self._session.folder.before.is_file():
            kept = _Kept.model_validate_json(self._session.folder.before.read_bytes())
            return self._event(self._suite.conclude(kept.states, kept.judge, kept.agreement))
        kept = self._measure()
        write_atomic(self._session.folder.before, kept)
        return self._tell(self._suite.conclude(kept.states, kept.judge, kept.agreement))

    def after(self, epoch: int, step: int) -> tuple[Artifact, EvaluationReport, Assessed]:
        """Measure the trained model, compare, and write the artifact."""
        self._state, self._step = "after", step
        early = _Kept.model_validate_json(self._session.folder.before.read_bytes())
        late = self._measure()
        report = self._suite.conclude({**early.states, **late.states}, late.judge, late.agreement)
        event = self._tell(report)
        folder = self._session.folder.evaluation
        written = folder.with_name(f".{folder.name}.writing")
        remove(written)
        written.mkdir(parents=True)
        write_atomic(written / REPORT_FILE, report)
        publish(written, folder, step)
        artifact = describe(self._session.job_uuid, "evaluation", folder, epoch, step)
        self._session.events.append(Saved(artifact=artifact.model_dump(mode="json")))
        return artifact, report, event

    def _measure(self) -> _Kept:
        spec, settings = self._session.spec, self._settings
        limits = Limits(settings.batch_size, settings.max_new_tokens, spec.options.max_length)
        autocast = None if spec.training.dtype == "fp32" else DTYPES[spec.training.dtype]
        with evaluating(self._model):
            subject = LocalModel(self._model, self._tokenizer, limits, self._ends, autocast, self._progress)
            with opened_judge(settings, spec.training.dtype, self._model.device, spec.options.max_length) as judge:
                states = self._suite.measure_states(subject, judge, self._state, self._model, self._layout)
                return _Kept(
                    judge=judge.name,
                    agreement=self._suite.agreement(judge),
                    states=states,
                    skipped=self._suite.skipped,
                )

    def _progress(self, name: str, done: int, total: int) -> None:
        # An evaluation is given up at once: before training nothing is worth saving, after it everything is saved.
        if self._session.stop.requested:
            raise Stopped(self._step)
        if done == total or time.monotonic() - self._told_s >= TOLD_EVERY_S:
            self._told_s = time.monotonic()
            print(f"eval {self._state}: {name}, {done} of {total} rows", flush=True)

    def _tell(self, report: EvaluationReport) -> Assessed:
        event = self._event(report)
        self._session.events.append(event)
        print(reports.text(report), flush=True)
        return event

    def _event(self, report: EvaluationReport) -> Assessed:
        return Assessed(
            step=self._step,
            measured={state: _dumped(found) for state, found in report.measured.items()},
            differences={pair: _dumped(found) for pair, found in report.differences.items()},
            exceeded=[verdict.name for verdict in report.exceeded],
        )


def _dumped(found: dict[str, reports.Figure]) -> dict[str, dict[str, float]]:
    return {name: figure.model_dump() for name, figure in found.items()}


def require_gate(report: EvaluationReport) -> None:
    """Raise where a limit was exceeded; to be called last, when all else is done.

    Raises:
        GateFailed: with the figures that were compared.
    """
    if report.exceeded:
        raise GateFailed(reports.reason(report.exceeded))
