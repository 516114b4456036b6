"""Graders: what gives an answer its reward. One union tagged by `type`, in OpenAI's schema where it has one.

No grader runs code of a user: a formula is parsed, a pattern is linear in time, a schema fetches nothing. Each grader
states its range, and where it runs (`place`).
"""

import math
from typing import Annotated, ClassVar, Literal, Self

from pydantic import BeforeValidator, Discriminator, Field, TypeAdapter, field_validator, model_validator

from llama_stack_provider_moe.errors import InvalidInput
from llama_stack_provider_moe.spec.formulas import MAX_CHARACTERS, Formula
from llama_stack_provider_moe.spec.grader_base import (
    GOLD,
    MOST_GRADERS,
    OUTPUT_TEXT,
    UNIT,
    VARIABLE_NAME_PATTERN,
    AnyKind,
    Place,
    Range,
)
from llama_stack_provider_moe.spec.grader_templates import Template
from llama_stack_provider_moe.spec.judged_graders import LabelModel, ScoreModel
from llama_stack_provider_moe.spec.linear_patterns import MAX_PATTERN, matcher

_METRICS = ("fuzzy_match", "bleu", "gleu", "rouge_1", "rouge_2", "rouge_3", "rouge_4", "rouge_5", "rouge_l")
_NOT_HERE = {
    "cosine": "needs a model of embeddings, which this server does not have",
    "meteor": "needs WordNet, which this package does not bring",
}


class StringCheck(AnyKind):
    """Compares two texts; 1 or 0."""

    type: Literal["string_check"] = Field(description="Compares two texts.")
    input: Template = Field(default=OUTPUT_TEXT, description="Text to check; a template.")
    reference: Template = Field(description="Text to compare with; a template, such as `{{item.answer}}`.")
    operation: Literal["eq", "ne", "like", "ilike"] = Field(
        description="Comparison. eq: equal; ne: not equal; like: the input contains the reference; ilike: the same "
        "whatever the case."
    )


class TextSimilarity(AnyKind):
    """How similar two texts are, from 0 to 1."""

    place: ClassVar[Place] = "child"

    type: Literal["text_similarity"] = Field(description="Similarity of two texts.")
    input: Template = Field(default=OUTPUT_TEXT, description="Text to check; a template.")
    reference: Template = Field(description="Text to compare with; a template.")
    evaluation_metric: Literal[
        "fuzzy_match", "bleu", "gleu", "rouge_1", "rouge_2", "rouge_3", "rouge_4", "rouge_5", "rouge_l"
    ] = Field(
        description="Metric. fuzzy_match: 1 less the edit distance by insertions and deletions, divided by both "
        "lengths; bleu, gleu: shared n-grams of words up to 4; rouge_1 to rouge_5: F1 of shared n-grams; rouge_l: F1 "
        "of the longest common subsequence of words."
    )

    @field_validator("evaluation_metric", mode="before")
    @classmethod
    def _is_here(cls, metric: object) -> object:
        why = _NOT_HERE.get(metric) if isinstance(metric, str) else None
        if why is not None:
            raise ValueError(f"{metric!r} {why}; expected one of {', '.join(_METRICS)}")
        return metric


class Regex(AnyKind):
    """Whether a pattern matches; 1 or 0."""

    place: ClassVar[Place] = "child"

    type: Literal["regex"] = Field(description="Whether a pattern matches.")
    input: Template = Field(default=OUTPUT_TEXT, description="Text to check; a template.")
    pattern: str = Field(
        min_length=1,
        max_length=MAX_PATTERN,
        description="Pattern in the syntax of Rust's regex crate: that of Python without look-around and "
        "back-references, so that its time is linear in the text.",
    )
    whole: bool = Field(default=False, description="Whether all of the text must match, rather than a part of it.")

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, pattern: str) -> str:
        try:
            matcher(pattern, "pattern")
        except InvalidInput as error:
            raise ValueError(f"{error.value!r} is not valid; expected {error.expected}") from None
        return pattern


class JsonSchema(AnyKind):
    """Whether a text is JSON that a schema describes; 1 or 0."""

    place: ClassVar[Place] = "child"

    type: Literal["json_schema"] = Field(description="Whether a text is JSON that a schema describes.")
    input: Template = Field(default=OUTPUT_TEXT, description="Text to read as JSON; a template.")
    json_schema: dict[str, object] = Field(
        description="JSON Schema (2020-12). A reference may lead to a place in it alone, and nothing is fetched. {}: "
        "any JSON."
    )
    closed: bool = Field(default=False, description="Whether an object may have no keys beside those it names.")


class ToolCall(AnyKind):
    """Whether an answer makes the calls that the row expects; 1 or 0, or the share of them."""

    type: Literal["tool_call"] = Field(description="Whether an answer makes the tool calls that the row expects.")
    expected: str = Field(
        default="expected_calls",
        pattern=VARIABLE_NAME_PATTERN,
        description="Column of the row with the call or a list of calls, each `{name, arguments}`, or JSON text of "
        "them, as in a cell of CSV; null or an empty list: no call.",
    )
    arguments: Literal["equal", "include", "any"] = Field(
        default="equal",
        description="Arguments of a call. equal: those of the expected call; include: at least those; any: they are "
        "not compared.",
    )
    partial: bool = Field(
        default=False,
        description="Give the share of calls that are right, of the expected or of the made ones, whichever are more; "
        "false: 1 if all are, else 0.",
    )


class Math(AnyKind):
    """Whether two expressions are equal in mathematics; 1 or 0."""

    place: ClassVar[Place] = "child"

    type: Literal["math"] = Field(description="Whether the answer's result equals the reference, by math-verify.")
    input: Template = Field(default=OUTPUT_TEXT, description="Text whose last result is compared; a template.")
    reference: Template = Field(default=GOLD, description="Right result, as LaTeX or a number; a template.")
    precision: int = Field(default=6, ge=0, le=15, description="Decimals to which numbers are rounded.")


class Length(AnyKind):
    """Whether an answer has a length in a range; 1, or less beside it."""

    type: Literal["length"] = Field(description="Whether an answer has a length in a range.")
    input: Template = Field(default=OUTPUT_TEXT, description="Text to measure, for `unit` words and characters.")
    unit: Literal["words", "characters", "tokens"] = Field(
        default="words", description="What is counted; tokens are those of the answer as the model wrote it."
    )
    least: int = Field(default=1, ge=0, le=1_000_000, description="Least length.")
    most: int | None = Field(default=None, ge=0, le=1_000_000, description="Largest length; left out: no limit.")
    margin: int = Field(
        default=0,
        ge=0,
        le=1_000_000,
        description="Length beside the range over which the reward falls from 1 to 0, in a line; 0: it is 0 at once.",
    )

    @model_validator(mode="after")
    def _can_be_met(self) -> Self:
        if self.most is not None and self.most < self.least:
            raise ValueError(f"most: {self.most} is not valid; expected at least `least`, which is {self.least}")
        if self.most is None and self.least == 0:
            raise ValueError("least: 0 has no effect without `most`; expected at least 1, or also `most`")
        if self.unit == "tokens" and self.input != OUTPUT_TEXT:
            raise ValueError("input: has no effect with unit 'tokens', which are those of the answer")
        return self


class Repetition(AnyKind):
    """The share of an answer's n-grams that are not repeated, from 0 to 1."""

    type: Literal["repetition"] = Field(description="Share of an answer's n-grams of words that are not repeated.")
    input: Template = Field(default=OUTPUT_TEXT, description="Text to check; a template.")
    ngram: int = Field(default=4, ge=1, le=20, description="Words of an n-gram.")


class Refusal(AnyKind):
    """Whether an answer is a refusal, or a real answer; 1 or 0.

    An empty answer, one that refuses and then helps, one in another language than its prompt, and one that speaks to
    the judge are neither.
    """

    type: Literal["refusal"] = Field(description="Whether an answer is a refusal, or a real answer.")
    expect: Literal["refusal", "answer"] = Field(description="What gives 1.")
    judge: Literal["keyword", "model"] = Field(
        default="keyword",
        description="Judge. keyword: phrases of refusal in some languages; model: a model that is asked yes or no, "
        "after the checks for what is neither.",
    )
    model: str | None = Field(
        default=None,
        min_length=1,
        max_length=1024,
        description="Model that judges, for judge model: a whole model, named as in `model` of a job.",
    )
    least_words: int = Field(default=3, ge=1, le=1000, description="Fewest words of a real answer or a refusal.")
    longest_refusal: int = Field(
        default=120, ge=1, le=10_000, description="Most words of a refusal; a longer one goes on with something else."
    )

    @property
    def runs(self) -> Place:
        """Where this one runs."""
        return "torch" if self.judge == "model" else "here"

    @model_validator(mode="after")
    def _only_a_model_judge_has_a_model(self) -> Self:
        if (self.judge == "model") != (self.model is not None):
            raise ValueError("model: is needed by judge 'model', and used only by it")
        return self


class RewardModel(AnyKind):
    """The score of a sequence classifier for the conversation with the answer."""

    place: ClassVar[Place] = "torch"

    type: Literal["reward_model"] = Field(description="Score of a sequence classifier of one label.")
    model: str = Field(min_length=1, max_length=1024, description="Reward model, named as in `model` of a job.")
    scale: Literal["sigmoid", "raw"] = Field(
        default="sigmoid", description="Value. sigmoid: from 0 to 1; raw: the logit, any number."
    )
    max_length: int = Field(default=2048, ge=8, le=1 << 20, description="Most tokens; a longer row has no reward.")
    batch_size: int = Field(default=8, ge=1, le=4096, description="Conversations in one pass.")

    def limits(self) -> Range:
        """Return the least and the largest value that it gives."""
        return UNIT if self.scale == "sigmoid" else (-math.inf, math.inf)


class Monitor(AnyKind):
    """The probability that a probe gives the conversation with the answer, or 1 less it."""

    place: ClassVar[Place] = "torch"

    type: Literal["monitor"] = Field(description="Probability of a probe, as a shield's monitor gives it.")
    probe: str = Field(min_length=1, max_length=1024, description="Folder of a probe, or job that fitted it.")
    expect: Literal["absent", "present"] = Field(
        default="absent", description="What is good. absent: 1 less the probability; present: the probability."
    )
    batch_size: int = Field(default=8, ge=1, le=4096, description="Texts in one pass.")


type PlainGrader = (
    StringCheck | TextSimilarity | Regex | JsonSchema | ToolCall | Math | Length | Repetition | Refusal | RewardModel
    | Monitor | ScoreModel | LabelModel
)  # fmt: skip


def _no_python(given: object) -> object:
    if isinstance(given, dict) and given.get("type") == "python":
        raise ValueError("type: 'python' is not valid, because this server runs no code of users; expected another "
                         "grader, such as string_check, regex, math or multi")  # fmt: skip
    return given


_TaggedPlain = Annotated[
    StringCheck | TextSimilarity | Regex | JsonSchema | ToolCall | Math | Length | Repetition | Refusal | RewardModel
    | Monitor | ScoreModel | LabelModel,
    Discriminator("type"),
    BeforeValidator(_no_python),
]  # fmt: skip


class Multi(AnyKind):
    """A formula of several graders' values."""

    type: Literal["multi"] = Field(description="Formula of several graders' values.")
    graders: dict[Annotated[str, Field(pattern=VARIABLE_NAME_PATTERN)], _TaggedPlain] = Field(
        min_length=1, max_length=MOST_GRADERS, description="Graders by the name that the formula has for them."
    )
    calculate_output: str = Field(
        min_length=1,
        max_length=MAX_CHARACTERS,
        description="Formula of names in `graders` and numbers with + - * /, min, max, abs, floor, ceil, exp, log and "
        "sqrt.",
    )

    def limits(self) -> Range:
        """Return the least and the largest value that it gives."""
        return Formula(self.calculate_output).range({name: each.limits() for name, each in self.graders.items()})

    @property
    def runs(self) -> Place:
        """Where this one runs: where the graders in it need the most."""
        order: tuple[Place, ...] = ("here", "child", "url", "torch")
        return max((grader.runs for grader in self.graders.values()), key=order.index)

    @model_validator(mode="after")
    def _names_its_graders(self) -> Self:
        try:
            names = Formula(self.calculate_output).names
        except ValueError as error:
            raise ValueError(f"calculate_output: {error}") from None
        for name in sorted(names - set(self.graders)):
            raise ValueError(f"calculate_output: there is no grader {name!r}; expected {', '.join(self.graders)}")
        for name in sorted(set(self.graders) - names):
            raise ValueError(f"graders.{name}: has no effect, because calculate_output does not name it")
        return self


type AnyGrader = PlainGrader | Multi
Grader = Annotated[
    StringCheck | TextSimilarity | Regex | JsonSchema | ToolCall | Math | Length | Repetition | Refusal | RewardModel
    | Monitor | ScoreModel | LabelModel | Multi,
    Discriminator("type"),
    BeforeValidator(_no_python),
]  # fmt: skip
GRADER: TypeAdapter[AnyGrader] = TypeAdapter(Grader)
GRADER_TYPES = frozenset(
    str(kind.model_fields["type"].annotation.__args__[0])  # type: ignore[union-attr]  # each is a Literal
    for kind in (StringCheck, TextSimilarity, Regex, JsonSchema, ToolCall, Math, Length, Repetition, Refusal,
                 RewardModel, Monitor, ScoreModel, LabelModel, Multi)
)  # fmt: skip


def inside(grader: AnyGrader) -> list[PlainGrader]:
    """Return the graders that compute something: those in a `multi`, or the grader itself."""
    return list(grader.graders.values()) if isinstance(grader, Multi) else [grader]
