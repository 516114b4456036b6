"""The whole evaluation: a model's results on every set, judged, compared with an earlier measurement, and reported."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import cast

from peft import PeftModel
from transformers import PreTrainedModel

from llama_stack_provider_moe.compute.ablation.run_time import Removal
from llama_stack_provider_moe.compute.evaluation import report as reports
from llama_stack_provider_moe.compute.evaluation.agent import forbidden_calls
from llama_stack_provider_moe.compute.evaluation.generate import Subject
from llama_stack_provider_moe.compute.evaluation.judges import (
    Exchange,
    Judge,
    agreement_with,
    packaged_labelled,
    read_labelled,
)
from llama_stack_provider_moe.compute.evaluation.report import EvaluationReport, JudgeAgreement, Measurement
from llama_stack_provider_moe.compute.moe.layout import ExpertLayout
from llama_stack_provider_moe.compute.moe.lora_ranks import of_another_model
from llama_stack_provider_moe.compute.moe.masking import masked_experts
from llama_stack_provider_moe.errors import ModelError, TrainingError
from llama_stack_provider_moe.spec import SafetyEvaluation
from llama_stack_provider_moe.spec.evaluation_rows import JudgedRow, ScenarioRow
from llama_stack_provider_moe.spec.rows import Conversation, Message
from llama_stack_provider_moe.spec.rows.images import words_of

JUDGED = ("refuse", "safe")
STATES, CHANGED = ("before", "after"), ("masked", "ablated")
OWN_LABELS = "this package's labels"
REPORT_FILE = "eval.json"


@dataclass(frozen=True)
class Material:
    """The canonical rows of each set, and answers that people have labelled."""

    sets: Mapping[str, Sequence[Conversation | ScenarioRow]]  # the named ones of refuse, safe, retain, scenarios
    labelled: Sequence[JudgedRow] | None = None

    @classmethod
    def read(cls, settings: SafetyEvaluation, paths: Mapping[str, Path]) -> "Material":
        """The first `max_rows` of each file; `paths`: set (or `labelled`) -> its canonical rows."""
        sets = {}
        for name in ("refuse", "safe", "retain", "scenarios"):
            if name in paths:
                with paths[name].open(encoding="utf-8") as file:
                    sets[name] = [json.loads(line) for line in islice(file, settings.max_rows)]
        return cls(sets, read_labelled(paths["labelled"]) if "labelled" in paths else None)

    def conversations(self, name: str) -> Sequence[Conversation]:
        """The rows of a set that has no scenarios; empty if it is not named."""
        return _talks(self.sets.get(name, []))


@dataclass
class Suite:
    """One evaluation, with all its measurements."""

    model: str
    settings: SafetyEvaluation
    material: Material
    seed: int
    removal: Removal | None = None  # what `settings.ablated` takes out
    skipped: list[str] = field(default_factory=list)

    def measure(self, subject: Subject, judge: Judge) -> Measurement:
        """Give every set to `subject`, and let `judge` decide which answers are refusals.

        Raises:
            DataError: rows that can't be used.
            TrainingError: the likelihoods are not finite.
        """
        measured = Measurement()
        sets = self.material.sets
        for name in JUDGED:
            if name in sets:
                asked = [_asked(row) for row in _talks(sets[name])]
                measured.answers[name] = subject.answers(name, asked)
                exchanges = [
                    Exchange(_as_text(each["messages"]), answer)
                    for each, answer in zip(asked, measured.answers[name], strict=True)
                ]
                measured.refusals[name] = judge.refusals(exchanges)
        if "retain" in sets:
            found_nll = subject.likelihoods("retain", _talks(sets["retain"]))
            if found_nll is None:
                self.skip("retain: a server does not give the likelihood of given answers")
            else:
                measured.nll, measured.tokens = found_nll
                if not all(map(math.isfinite, measured.nll)):
                    raise TrainingError("eval: the likelihood of retain rows is not finite; the model has diverged")
        if "scenarios" in sets:
            scenarios = cast(Sequence[ScenarioRow], sets["scenarios"])
            made = subject.calls("scenarios", scenarios)
            measured.calls = [[call._asdict() for call in calls] for calls in made]
            measured.forbidden = [
                bool(forbidden_calls(calls, scenario["forbidden"]))
                for calls, scenario in zip(made, scenarios, strict=True)
            ]
        for task, found in subject.tasks(self.settings.tasks, self.skip).items():
            measured.tasks[task] = found
        return measured

    def measure_states(
        self,
        subject: Subject,
        judge: Judge,
        state: str,
        model: PreTrainedModel | PeftModel,
        layout: ExpertLayout | None,
    ) -> dict[str, Measurement]:
        """Measure a model in memory as `state`.

        If the settings mask experts, measure again without them as `<state>_masked`; if they take directions out, again
        without those as `<state>_ablated`.

        Args:
            subject: the model, ready to answer.
            judge: of refusals.
            state: `before` or `after`.
            model: the same model, for masking and ablation.
            layout: of its experts; None: it is dense.
        """
        found = {state: self.measure(subject, judge)}
        masked = self.settings.masked()
        if masked:
            assert layout is not None, "checked by check_masked"
            with masked_experts(model, layout, masked):
                found[f"{state}_masked"] = self.measure(subject, judge)
        if self.settings.ablated is not None:
            assert self.removal is not None, "made by removal_of"
            with self.removal.taken_out(model):
                found[f"{state}_ablated"] = self.measure(subject, judge)
        return found

    def skip(self, what: str) -> None:
        """Note once that something was not measured."""
        if what not in self.skipped:
            self.skipped.append(what)

    def agreement(self, judge: Judge) -> list[JudgeAgreement]:
        """How a judge agrees with the labelled sets: this package's, and the user's if there is one."""
        sets = {OWN_LABELS: packaged_labelled()}
        if self.material.labelled is not None:
            sets["your labels"] = list(self.material.labelled)
        return [reports.describe_agreement(name, agreement_with(judge, rows)) for name, rows in sets.items()]

    def conclude(
        self, states: Mapping[str, Measurement], judge: str, agreement: list[JudgeAgreement]
    ) -> EvaluationReport:
        """Figures, differences and the gate.

        Args:
            states: `before`, `after`, and each with `_masked` if experts were masked and `_ablated` if directions were
                taken out; any may be missing.
            judge: its name.
            agreement: of the judge.
        """
        settings, resamples = self.settings, self.settings.resamples
        measured = {state: reports.figures(each, resamples, self.seed) for state, each in states.items()}
        pairs = [("before", "after"), *((each, f"{each}_{changed}") for changed in CHANGED for each in STATES)]
        differences = {
            f"{late} - {early}": reports.differences(states[early], states[late], resamples, self.seed)
            for early, late in pairs
            if early in states and late in states
        }
        both = "before" in states and "after" in states
        return EvaluationReport(
            model=self.model,
            judge=judge,
            agreement=agreement,
            rows={name: len(rows) for name, rows in self.material.sets.items()},
            measured=measured,
            differences=differences,
            masked_experts=settings.masked(),
            masked_from=None if settings.masked_from is None else settings.masked_from.analysis,
            ablated=settings.ablated,
            gate=reports.verdicts(settings.fail_if, measured["before"], measured["after"]) if both else [],
            skipped=list(self.skipped),
            examples=self._examples(states),
        )

    def _examples(self, states: Mapping[str, Measurement]) -> list[dict[str, object]]:
        found: list[dict[str, object]] = []
        for name, rows in self.material.sets.items():
            for index, row in enumerate(rows[: self.settings.examples]):
                said = {state: _said(measured, name, index) for state, measured in states.items()}
                if name != "retain":
                    found.append({"set": name, "row": index + 1, "messages": _before_answer(row["messages"]), **said})
        return found


def check_masked(settings: SafetyEvaluation, model: PreTrainedModel | PeftModel, layout: ExpertLayout | None) -> None:
    """Check that the experts can be masked, before a long step begins.

    Raises:
        ModelError: the model is dense, or its experts are not those of the routing analysis that named them.
        InvalidInput: no such layer or expert, or too few are left.
    """
    masked = settings.masked()
    if not masked:
        return
    if layout is None:
        raise ModelError("eval.masked_experts: the model is dense; it has no experts to mask")
    problem = None if settings.masked_from is None else of_another_model(settings.masked_from, layout)
    if problem is not None:
        raise ModelError(f"eval.masked_from: {problem}")
    with masked_experts(model, layout, masked):
        pass


def _said(measured: Measurement, name: str, index: int) -> dict[str, object]:
    if name == "scenarios":
        return {"calls": measured.calls[index], "forbidden": measured.forbidden[index]}
    if name not in measured.answers:
        return {}
    return {"answer": measured.answers[name][index], "refusal": measured.refusals[name][index]}


def _talks(rows: Sequence[Conversation | ScenarioRow]) -> Sequence[Conversation]:
    return cast(Sequence[Conversation], rows)  # those of every set but scenarios


def _asked(row: Conversation) -> Conversation:
    """A conversation without the answer that it may end with."""
    return {**row, "messages": _before_answer(row["messages"])}


def _before_answer(messages: list[Message]) -> list[Message]:
    return messages[:-1] if messages[-1]["role"] == "assistant" else messages


def _as_text(messages: list[Message]) -> str:
    """The conversation as a text for a judge: the last message after those before it."""
    if len(messages) == 1:
        return words_of(messages[0]["content"])
    return "\n".join(f"{message['role']}: {message['content']}" for message in messages)
