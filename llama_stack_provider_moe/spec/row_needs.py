"""`RowNeeds`: what graders read of each row of a job, so that a row without it is a problem before the job begins."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from llama_stack_provider_moe.errors import RowProblem, shorten
from llama_stack_provider_moe.spec.grader_templates import Reference, parts_of
from llama_stack_provider_moe.spec.graders import PlainGrader, ToolCall, inside
from llama_stack_provider_moe.spec.judged_graders import LabelModel, ScoreModel
from llama_stack_provider_moe.spec.rewards import PROMPT_CLASSES, Grading, PromptClass, Reward, are_by_class

GOLD, CALLS = "gold", "expected_calls"  # columns that a row's own answer gives (`spec.rows.prompts`)
_OF_THE_ANSWER = {
    GOLD: "; it is the text of the assistant's turn at the row's end, or a column of that name",
    CALLS: "; it has the tool calls of the assistant's turn at the row's end, or is a column of that name, where [] "
    "means no call",
}


class Read(NamedTuple):
    """A place in the row that a grader reads.

    Attributes:
        path: the column, and names and indices in it.
        grader: its name.
        prompts: class of the rows that it grades; None: all.
    """

    path: tuple[str, ...]
    grader: str
    prompts: PromptClass | None


class RowNeeds(NamedTuple):
    """What each row must have.

    Attributes:
        class_column: with a prompt's class; None: rows need none.
        read: what graders read.
    """

    class_column: str | None
    read: tuple[Read, ...]

    @classmethod
    def of(cls, rewards: Sequence[Reward], grading: Grading) -> "RowNeeds":
        """What the graders of a job read."""
        read = {
            Read(path, reward.grader.name, reward.prompts): None
            for reward in rewards
            for grader in inside(reward.grader)
            for path in paths_of(grader)
        }
        return cls(grading.class_column if are_by_class(list(rewards)) else None, tuple(read))

    def note(self, item: Mapping[str, object]) -> str | None:
        """Return what reports call the class of a row without a problem; None: rows need none."""
        return None if self.class_column is None else noted(str(item[self.class_column]))

    def problem(self, item: Mapping[str, object], number: int) -> RowProblem | None:
        """Return the first thing that a row lacks.

        Args:
            item: the row's columns, as graders get them.
            number: of the row, from 1.
        """
        prompt_class = None if self.class_column is None else item.get(self.class_column)
        if self.class_column is not None and prompt_class not in PROMPT_CLASSES:
            told = "is missing" if prompt_class is None else f"is {shorten(prompt_class)}"
            expected = " or ".join(map(repr, PROMPT_CLASSES))
            return RowProblem(number, self.class_column, f"{told}; expected {expected} in each row "
                              "(`grading.class_column`), because rewards are for classes of prompts")  # fmt: skip
        for read in self.read:
            if read.prompts in (None, prompt_class) and not _has(item, read.path):
                column, *deeper = read.path
                told = "is missing" if column not in item else f"has no {'.'.join(deeper)!r} in it"
                why = f"grader {read.grader!r} reads {{{{item.{'.'.join(read.path)}}}}}"
                if read.prompts is not None:
                    why += f" of each row of class {read.prompts!r}"
                return RowProblem(number, column, f"{told}; {why}{_OF_THE_ANSWER.get(column, '')}")
        return None


def noted(prompt_class: str) -> str:
    """Return what reports of rows call a class of prompts."""
    return f"class {prompt_class}"


def paths_of(grader: PlainGrader) -> list[tuple[str, ...]]:
    """Return the places in a row that a grader reads."""
    if isinstance(grader, ToolCall):
        return [(grader.expected,)]
    if isinstance(grader, ScoreModel | LabelModel):
        templates = [message.content for message in grader.input]
    else:
        templates = [getattr(grader, name) for name in ("input", "reference") if hasattr(grader, name)]
    parts = [part for template in templates for part in parts_of(template)]
    return [part.path for part in parts if isinstance(part, Reference) and part.namespace == "item"]


def _has(value: object, path: tuple[str, ...]) -> bool:
    for part in path:
        if isinstance(value, Mapping) and part in value:
            value = value[part]
        elif isinstance(value, list | tuple) and part.isdecimal() and int(part) < len(value):
            value = value[int(part)]
        else:
            return False
    return True
