"""A grader's spec -> a grader that is ready, and what can be known to be wrong with it before."""

import importlib.util
import json
from collections.abc import Callable, Sequence

from llama_stack_provider_moe.errors import InvalidInput
from llama_stack_provider_moe.graders import bounded
from llama_stack_provider_moe.graders.bench import Bench, Task
from llama_stack_provider_moe.graders.here import Here, graded, score_of
from llama_stack_provider_moe.graders.judges import SERVER, Judged, Judges, judge_named
from llama_stack_provider_moe.graders.samples import (
    Failure,
    Grades,
    Outcome,
    Sample,
)
from llama_stack_provider_moe.graders.templates import Text
from llama_stack_provider_moe.spec.formulas import Formula
from llama_stack_provider_moe.spec.graders import (
    AnyGrader,
    JsonSchema,
    Math,
    Multi,
    PlainGrader,
    Regex,
    TextSimilarity,
    inside,
)
from llama_stack_provider_moe.spec.judged_graders import LabelModel, ScoreModel

EXTRA = "llama-stack-provider-moe[graders]"
type OpenTorch = Callable[[PlainGrader], Grades]


def check(grader: AnyGrader, judges: Judges, field: str = "grader", judges_at: str = SERVER) -> None:
    """Check what the spec alone does not: schemas, judges and libraries.

    Args:
        grader: the spec.
        judges: that the operator names.
        field: the caller's name for the grader.
        judges_at: the place that names judges, for errors.

    Raises:
        InvalidInput: a schema is not valid, or a judge or a library is missing.
    """
    for each in inside(grader):
        if isinstance(each, JsonSchema):
            bounded.checked_schema(each.json_schema, each.closed, f"{field}.json_schema")
        if isinstance(each, ScoreModel | LabelModel):
            judge_named(each.model, judges, f"{field}.model", judges_at)
        for library in _libraries(each):
            if importlib.util.find_spec(library) is None:
                raise InvalidInput(f"{field}.type", each.type, f"a grader that this environment can run; this one "
                                   f"needs {library}: pip install '{EXTRA}'")  # fmt: skip


def _libraries(grader: PlainGrader) -> Sequence[str]:
    match grader:
        case Math():
            return ("math_verify",)
        case TextSimilarity(evaluation_metric="bleu" | "gleu"):
            return ("nltk",)
        case TextSimilarity(evaluation_metric="fuzzy_match" | "rouge_l"):
            return ("rapidfuzz",)
        case _:
            return ()


def open_grader(grader: AnyGrader, bench: Bench, judges: Judges, open_torch: OpenTorch | None = None) -> Grades:
    """Return a grader that is ready.

    Args:
        grader: the spec.
        bench: processes for graders that need one; it stays its caller's.
        judges: that the operator names.
        open_torch: opens graders that need torch; None: they are refused.

    Raises:
        InvalidInput: see `check`; or the grader needs torch, and there is none.
    """
    check(grader, judges)
    if isinstance(grader, Multi):
        return _Multi(grader, bench, judges, open_torch)
    if isinstance(grader, ScoreModel | LabelModel):
        return Judged(grader, judge_named(grader.model, judges, "model"), bench.limits)
    score = score_of(grader)
    if score is not None:
        return Here(score, grader.limits()[0])
    task = _task_of(grader, bench.limits.deadline_s)
    if task is not None:
        return _InChild(task, bench, grader.limits()[0])
    if open_torch is None:
        raise InvalidInput("type", grader.type, "a grader that needs no torch")
    return open_torch(grader)


type _TaskOf = Callable[[Sample], Task]


def _task_of(grader: PlainGrader, deadline_s: float) -> _TaskOf | None:
    """What a process has to do for an answer; None: nothing, because the grader is of another kind."""
    match grader:
        case Regex():
            text = Text(grader.input)
            return lambda sample: _task("regex", pattern=grader.pattern, whole=grader.whole, text=text.of(sample))
        case JsonSchema():
            text, schema = Text(grader.input), json.dumps(grader.json_schema)
            return lambda sample: _task("json_schema", schema=schema, closed=grader.closed, text=text.of(sample))
        case TextSimilarity():
            text, reference = Text(grader.input), Text(grader.reference)
            return lambda sample: _task(
                "similarity", metric=grader.evaluation_metric, text=text.of(sample), reference=reference.of(sample)
            )
        case Math():
            text, reference = Text(grader.input), Text(grader.reference)
            return lambda sample: _task(
                "math", text=text.of(sample), reference=reference.of(sample), precision=grader.precision,
                limit_s=deadline_s / 4,
            )  # fmt: skip
        case _:
            return None


def _task(name: str, **given: object) -> Task:
    return {"do": name, "with": given}


class _InChild:
    """A grader that a process of the bench runs."""

    def __init__(self, task_of: _TaskOf, bench: Bench, least: float) -> None:
        self._task_of, self._bench, self._least = task_of, bench, least

    def grade(self, samples: Sequence[Sample]) -> list[Outcome]:
        """See `Grades`."""
        tasks: list[Task] = []

        def noted(sample: Sample) -> float:
            tasks.append(self._task_of(sample))
            return 0.0

        made = [graded(noted, sample, self._least) for sample in samples]
        values = iter(self._bench.run(tasks))
        found = []
        for outcome in made:
            if outcome.failure is None and not outcome.bad_answer:
                value = next(values)
                outcome = Outcome(None, value) if isinstance(value, Failure) else Outcome(value)
            found.append(outcome)
        return found

    def close(self) -> None:
        """See `Grades`."""


class _Multi:
    """A formula of several graders' values."""

    def __init__(self, grader: Multi, bench: Bench, judges: Judges, open_torch: OpenTorch | None) -> None:
        self._formula = Formula(grader.calculate_output)
        self._graders: dict[str, Grades] = {}
        try:
            for name, each in grader.graders.items():
                self._graders[name] = open_grader(each, bench, judges, open_torch)
        except BaseException:
            self.close()
            raise

    def grade(self, samples: Sequence[Sample]) -> list[Outcome]:
        """See `Grades`."""
        by_name = {name: grader.grade(samples) for name, grader in self._graders.items()}
        return [self._together({name: found[at] for name, found in by_name.items()}) for at in range(len(samples))]

    def close(self) -> None:
        """See `Grades`."""
        for grader in self._graders.values():
            grader.close()

    def _together(self, outcomes: dict[str, Outcome]) -> Outcome:
        parts = {name: outcome.value for name, outcome in outcomes.items()}
        tokens = sum(outcome.tokens for outcome in outcomes.values())
        is_bad = any(outcome.bad_answer for outcome in outcomes.values())
        for name, outcome in outcomes.items():
            if outcome.failure is not None:
                failure = Failure(outcome.failure.code, f"{name}: {outcome.failure.message}")
                return Outcome(None, failure, is_bad, parts, tokens)
        scores = {name: value for name, value in parts.items() if value is not None}
        try:
            return Outcome(self._formula.value(scores), None, is_bad, parts, tokens)
        except ArithmeticError as error:
            return Outcome(None, Failure("formula", f"the formula has no value: {error}"), is_bad, parts, tokens)
