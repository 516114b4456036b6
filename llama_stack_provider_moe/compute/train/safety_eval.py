"""A job's `eval` block: evaluate the model in memory before its first step and after its last one.

The first figures are kept in `before.json`, so that a job whose process was lost compares with the same figures.
"""

import time
from pathlib import Path

from peft import PeftModel
from pydantic import Field
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llama_stack_provider_moe.compute.ablation import measurements
from llama_stack_provider_moe.compute.ablation.run_time import Removal, removal, require_same_model
from llama_stack_provider_moe.compute.evaluation import report as reports
from llama_stack_provider_moe.compute.evaluation import shift
from llama_stack_provider_moe.compute.evaluation.generate import Limits, LocalModel, ends_of, evaluating
from llama_stack_provider_moe.compute.evaluation.judges import opened_judge
from llama_stack_provider_moe.compute.evaluation.report import EvaluationReport, JudgeAgreement, Measurement
from llama_stack_provider_moe.compute.evaluation.suite import REPORT_FILE, Material, Suite, check_masked
from llama_stack_provider_moe.compute.models.loader import DTYPES
from llama_stack_provider_moe.compute.moe.layout import ExpertLayout
from llama_stack_provider_moe.compute.runtime.context import AnySession, Session, Stopped
from llama_stack_provider_moe.compute.train.checkpoints import describe, publish, remove
from llama_stack_provider_moe.errors import TrainingError
from llama_stack_provider_moe.ground import liveness
from llama_stack_provider_moe.jobdir.events import Assessed, Saved
from llama_stack_provider_moe.jobdir.folder import Artifact, write_atomic
from llama_stack_provider_moe.jobdir.reading import read_as
from llama_stack_provider_moe.spec import AblationSpec, Block, ranges

PRINTED_EVERY_S = 15.0
_ABOVE = "eval.ablated."


class GateFailed(TrainingError):
    """A limit of `eval.fail_if` was exceeded. All of the job's results are kept."""


class _Kept(Block):
    judge: str
    agreement: list[JudgeAgreement]
    states: dict[str, Measurement]
    skipped: list[str] = Field(default_factory=list)


class Assessment:
    """The evaluation of one job.

    Args:
        session: the job's, whose spec has an `eval` block.
        model: untrained, with its adapter if there is one.
        tokenizer: the model's.
        layout: of its experts; None for a dense model.

    Raises:
        ModelError: the job masks experts, and the model is dense.
        InvalidInput: the job masks experts that the model does not have, or takes out directions that don't fit it.
    """

    def __init__(
        self,
        session: AnySession | Session[AblationSpec],
        model: PreTrainedModel | PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        layout: ExpertLayout | None,
    ) -> None:
        spec = session.spec
        assert spec.eval is not None
        self._compares = isinstance(spec, AblationSpec)
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
        self._printed_s = 0.0
        self._counter: liveness.Counter | None = None  # of the running measurement
        check_masked(self._settings, model, layout)
        if masked := self._settings.masked():
            origin = self._settings.masked_from
            experts = "; ".join(f"layer {layer}: {', '.join(ranges(masked[layer]))}" for layer in sorted(masked))
            source = "" if origin is None else f" (with those of {origin.analysis})"
            session.say(f"eval: measures a second time without experts of {experts}{source}")
        self._suite.removal = self._removal()

    def _removal(self) -> Removal | None:
        asked, spec, session = self._settings.ablated, self._session.spec, self._session
        if asked is None:
            return None
        field = f"{_ABOVE}measurements"
        found = measurements.read(measurements.of_job(session.folder, asked.measurements), field)
        adapter = None if isinstance(spec, AblationSpec) else spec.adapter
        start = None if adapter is None else adapter.init_from
        require_same_model(found.provenance, spec.model, None if start is None else Path(start), field)
        blocks = ", ".join(ranges(asked.edits()))
        session.say(f"eval: measures again with the directions of {asked.measurements} taken out of blocks {blocks}")
        return removal(self._model, asked, found, _ABOVE)

    def before(self) -> Assessed:
        """Measure the untrained model, unless an earlier start of the job did, and return the figures."""
        if self._session.folder.before.is_file():
            kept = read_as(_Kept, self._session.folder.before.read_bytes())
            return self._event(self._suite.conclude(kept.states, kept.judge, kept.agreement))
        kept = self._measure()
        write_atomic(self._session.folder.before, kept)
        return self._report(self._suite.conclude(kept.states, kept.judge, kept.agreement))

    def after(self, epoch: int, step: int) -> tuple[Artifact, EvaluationReport, Assessed]:
        """Measure the trained model, compare, and write the report as an artifact."""
        self._state, self._step = "after", step
        early = read_as(_Kept, self._session.folder.before.read_bytes())
        late = self._measure()
        report = self._suite.conclude({**early.states, **late.states}, late.judge, late.agreement)
        event = self._report(report)
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
        with evaluating(self._model), liveness.stage(f"eval {self._state}", unit="rows") as self._counter:
            subject = LocalModel(self._model, self._tokenizer, limits, self._ends, autocast, self._progress)
            with opened_judge(settings, spec.training.dtype, self._model.device, spec.options.max_length) as judge:
                states = self._suite.measure_states(subject, judge, self._state, self._model, self._layout)
                if self._compares:
                    self._compare(subject, states)
                return _Kept(
                    judge=judge.name,
                    agreement=self._suite.agreement(judge),
                    states=states,
                    skipped=self._suite.skipped,
                )

    def _compare(self, subject: LocalModel, states: dict[str, Measurement]) -> None:
        """Before: keep what the edited model is compared with. After: add the comparison."""
        retained = self._suite.material.conversations("retain")
        if not retained:
            return
        kept = self._session.folder.before_states
        if self._state == "before":
            shift.record(subject, retained, self._model, self._layout, kept)
        else:
            found = shift.compare(subject, retained, self._model, self._layout, kept)
            states["after"] = states["after"].model_copy(update=dict(found))

    def _progress(self, name: str, done: int, total: int) -> None:
        # A request to stop ends an evaluation at once: before training there is nothing to save, and after it all is.
        if self._session.stop.requested:
            raise Stopped(self._step)
        if self._counter is not None:
            self._counter.at(done, total, f"eval {self._state}: {name}")
        if done == total or time.monotonic() - self._printed_s >= PRINTED_EVERY_S:
            self._printed_s = time.monotonic()
            print(f"eval {self._state}: {name}, {done} of {total} rows", flush=True)

    def _report(self, report: EvaluationReport) -> Assessed:
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
    """Check the limits of `eval.fail_if`. Call this last, when everything is saved.

    Raises:
        GateFailed: a limit was exceeded; the text has the figures.
    """
    if report.exceeded:
        raise GateFailed(reports.reason(report.exceeded))
