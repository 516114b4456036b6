"""What graders of every type have: a name, a range, and the place where they run."""

from typing import ClassVar, Literal

from pydantic import Field

from llama_stack_provider_moe.spec.blocks import Block

GRADER_NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9 ._-]{0,63}$"
VARIABLE_NAME_PATTERN = r"^[A-Za-z_][A-Za-z0-9_]{0,63}$"
OUTPUT_TEXT = "{{sample.output_text}}"
GOLD = "{{item.gold}}"
MOST_GRADERS = 16
# Where a grader runs. here: in the process that asks, in linear time; child: in a process without torch, with limits of
# time and memory; url: at a model that the operator names; torch: in a process with torch.
Place = Literal["here", "child", "url", "torch"]
type Range = tuple[float, float]
UNIT: Range = (0.0, 1.0)


class AnyKind(Block):
    """What graders of every type have."""

    name: str = Field(pattern=GRADER_NAME_PATTERN, description="Name of the grader, which reports show.")

    place: ClassVar[Place] = "here"

    def limits(self) -> Range:
        """Return the least and the largest value that it gives."""
        return UNIT

    @property
    def runs(self) -> Place:
        """Where this one runs."""
        return self.place
