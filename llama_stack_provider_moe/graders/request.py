"""Rewards and answers as one JSON object: what a process with torch reads, and answers with a `GradeReport`."""

from collections.abc import Sequence
from typing import Any

from pydantic import Field

from llama_stack_provider_moe.graders.samples import Sample
from llama_stack_provider_moe.spec.blocks import Block, DType
from llama_stack_provider_moe.spec.graders_config import JudgeConfig
from llama_stack_provider_moe.spec.rewards import Grading, Rewards


class Answered(Block):
    """A row and the answer to it."""

    item: dict[str, Any]
    output_text: str
    tokens: int | None = None
    truncated: bool = False
    tool_calls: list[Any] | None = None

    def sample(self) -> Sample:
        """Return it as graders take it."""
        return Sample(self.item, self.output_text, self.tokens, self.truncated, self.tool_calls)


class GradeRequest(Block):
    """Rewards, and answers to grade."""

    reward: Rewards
    grading: Grading = Field(default_factory=Grading)
    judges: dict[str, JudgeConfig] = Field(default_factory=dict)
    dtype: DType = "fp32"
    answers: list[Answered]


def answered(samples: Sequence[Sample]) -> list[Answered]:
    """Return answers as a request has them."""
    return [
        Answered(
            item=dict(each.item), output_text=each.output_text, tokens=each.tokens, truncated=each.truncated,
            tool_calls=None if each.tool_calls is None else list(each.tool_calls),
        )
        for each in samples
    ]  # fmt: skip
