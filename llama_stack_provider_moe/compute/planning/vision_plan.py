"""What the images of a micro-batch are expected to take: which images, how many tokens, and the tower's memory."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial

from llama_stack_provider_moe.compute.moe.layout import without_adapters
from llama_stack_provider_moe.compute.planning.dry_run import NotMeasurable, Rehearsal
from llama_stack_provider_moe.compute.planning.tower_inputs import ImageSize, RowImages, Rows, tower_inputs, within
from llama_stack_provider_moe.compute.planning.tower_memory import (
    TowerMemory,
    TowerOperations,
    tower_memory,
    tower_operations,
)
from llama_stack_provider_moe.ground.counting import number_of
from llama_stack_provider_moe.spec import TrainingRecipe
from llama_stack_provider_moe.spec.row_sources import PAIRED


@dataclass(frozen=True)
class VisionPlan:
    """The images of a micro-batch, and what they take.

    Attributes:
        images: in it, each counted once.
        basis: where their number and sizes are from.
        tokens: that stand for the images of a row, at most; 0: not known.
        towers: without and with checkpointing; None: it can't be estimated.
        operations: counts those of the micro-batch's images, which a plan without a time does not need; None: likewise.
        unknown: why it can't.
        checkpointing: which of both the job has.
    """

    images: int
    basis: str
    tokens: int = 0
    towers: tuple[TowerMemory, TowerMemory] | None = None
    operations: Callable[[], TowerOperations] | None = None
    unknown: str | None = None
    checkpointing: bool = False

    def of(self, checkpointing: bool) -> "VisionPlan":
        """The plan of a job with or without checkpointing."""
        return replace(self, checkpointing=checkpointing)

    @property
    def tower(self) -> TowerMemory | None:
        """What the job's tower takes."""
        return None if self.towers is None else self.towers[self.checkpointing]

    def text(self) -> str:
        """The plan for a person."""
        if self.tower is None:
            return f"{self.basis}; not in the figures: {self.unknown}"
        return (f"{self.basis}, up to {self.tokens:,} tokens a row; {number_of(self.images, 'image')} in a micro-batch "
                f"take {self.tower.peak / 1e9:.2f} GB at most")  # fmt: skip

    def as_json(self) -> dict[str, object]:
        """The plan for JSON, in bytes."""
        tower = self.tower
        return {
            "images": self.images,
            "basis": self.basis,
            "tokens_a_row": self.tokens,
            "bytes": None if tower is None else tower.peak,
            "tower": None if tower is None else asdict(tower),
            "text": self.text(),
        }


def vision_plan(
    rehearsal: Rehearsal, images: RowImages, recipe: TrainingRecipe, sequences: int, length: int
) -> VisionPlan:
    """Measure the tower on the largest images that a micro-batch may have.

    Args:
        rehearsal: the model, ready to be measured.
        images: of the rows.
        recipe: that trains; one of pairs shows each image twice.
        sequences: of the micro-batch (pairs, where the recipe trains on these).
        length: tokens of each.
    """
    config = without_adapters(rehearsal.model).config
    asked = images.of(sequences)
    try:
        rows = within(config, asked, images.limits, length)
        # Images that were made smaller to fit are as small as they have to be.
        limits = images.limits if rows == asked else replace(images.limits, least=1)
        basis, count = _basis(images, asked, rows), sum(map(len, rows))
        if not count:
            return VisionPlan(0, basis, unknown=f"no image has as few tokens as options.max_length {length:,}")
        given = tower_inputs(config, rows * 2 if recipe in PAIRED else rows, limits)
        plain = tower_memory(rehearsal, given, length, checkpointing=False)
        towers = plain, tower_memory(rehearsal, given, length, checkpointing=True)
        operations = partial(tower_operations, rehearsal, given, length)
    except NotMeasurable as error:
        return VisionPlan(sum(map(len, asked)), _basis(images, asked, asked), unknown=str(error))
    return VisionPlan(count, basis, max(map(sum, given.tokens)), towers, operations)


def _basis(images: RowImages, asked: Rows, rows: Rows) -> str:
    if not images.assumed:
        return "of the rows with the largest images"
    size = _sizes(asked)
    smaller = "" if rows == asked or not any(rows) else f" (here {_sizes(rows)}, to fit options.max_length)"
    return f"assumed: {number_of(len(asked[0]), 'image')} of {size} pixels in each row{smaller}"


def _sizes(rows: Rows) -> str:
    size: ImageSize = rows[0][0]
    return f"{size.width:,} x {size.height:,}"
