"""What a vision tower reads for images of given sizes, by the config alone: patches, or tiles, and tokens.

Two kinds of towers are known. Those of Qwen and GLM read patches, as many as an image has after both sides were rounded
to whole tokens (`spatial_merge_size` patches each way), and its pixels brought within the processor's limits. That of
Llama 4 reads tiles: an image is put on the grid of tiles that needs the least scaling, and a small copy of all of it is
one tile more. `processor_limits` reads the limits beside a model's config; without them an image keeps its size.
"""

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from heapq import nlargest
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedConfig

from llama_stack_provider_moe.compute.planning.dry_run import NotMeasurable

_FILES = ("processor_config.json", "preprocessor_config.json")
_TILES = 16  # of an image at most, by Llama 4's processor
# Their processors count the pixels of `temporal_patch_size` copies of an image.
_PIXELS_OF_FRAMES = ("glm4v", "glm4v_moe")
_SHRINK = 0.98  # beyond what is needed, because sides are rounded


class ImageSize(NamedTuple):
    """An image's size in pixels."""

    width: int
    height: int


Rows = tuple[tuple[ImageSize, ...], ...]


@dataclass(frozen=True)
class Limits:
    """A processor's limits.

    Attributes:
        least: pixels of an image; smaller ones are enlarged.
        most: pixels of an image; larger ones are made smaller.
        tiles: of an image at most.
    """

    least: int = 1
    most: int | None = None
    tiles: int = _TILES


@dataclass(frozen=True)
class RowImages:
    """The images of rows that a job trains on.

    Attributes:
        rows: the images of each row, rows with the most pixels first; `assumed`: of every row.
        assumed: whether nobody has read the rows.
        limits: of the model's processor.
    """

    rows: Rows
    assumed: bool
    limits: Limits = Limits()

    def of(self, sequences: int) -> Rows:
        """The images of the largest micro-batch of so many rows."""
        return self.rows * sequences if self.assumed else self.rows[:sequences]


class TowerInputs(NamedTuple):
    """The inputs for the images of a micro-batch.

    Attributes:
        pixels: shape of `pixel_values`.
        grid: (frames, height, width) of each image in patches; None: the tower reads tiles.
        tokens: of each image of each row.
    """

    pixels: tuple[int, ...]
    grid: tuple[tuple[int, int, int], ...] | None
    tokens: tuple[tuple[int, ...], ...]


def assumed(images: int, size: ImageSize, limits: Limits) -> RowImages:
    """As many images of one size in each row."""
    return RowImages(((size,) * images,), True, limits)


def measured(rows: Iterable[tuple[ImageSize, ...]], sequences: int, limits: Limits) -> RowImages:
    """The images of the rows with the most pixels.

    Args:
        rows: the images of each row.
        sequences: rows of the largest micro-batch.
        limits: of the model's processor.
    """
    largest = nlargest(sequences, rows, key=lambda row: sum(size.width * size.height for size in row))
    return RowImages(tuple(largest), False, limits)


def processor_limits(folder: Path) -> Limits:
    """The limits in the processor's files of a model's folder; none where there are no such files."""
    found: dict[str, Any] = {}
    for name in _FILES:
        try:
            said = json.loads((folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):  # the job's start says what is wrong with it
            continue
        if isinstance(said, dict):
            found |= said.get("image_processor", said)
    size = found.get("size") or {}
    least, most = size.get("shortest_edge", found.get("min_pixels")), size.get("longest_edge", found.get("max_pixels"))
    return Limits(int(least or 1), None if most is None else int(most), int(found.get("max_patches") or _TILES))


def tower_inputs(config: PreTrainedConfig, rows: Rows, limits: Limits) -> TowerInputs:
    """The inputs for the images of rows.

    Args:
        config: of the whole model.
        rows: their images.
        limits: of its processor.

    Raises:
        NotMeasurable: the tower is of another kind.
    """
    vision = config.vision_config.to_dict()
    if "spatial_merge_size" in vision:
        merge = int(vision["spatial_merge_size"])
        grids = [[_grid(vision, config.model_type, size, limits) for size in row] for row in rows]
        every = tuple((1, height, width) for row in grids for height, width in row)
        patch = int(vision["patch_size"])
        width = int(vision["in_channels"]) * int(vision.get("temporal_patch_size", 1)) * patch * patch
        tokens = tuple(tuple(height * width // merge**2 for height, width in row) for row in grids)
        return TowerInputs((sum(height * width for _, height, width in every), width), every, tokens)
    if "pixel_shuffle_ratio" in vision:
        side = int(vision["image_size"])
        tiles = [[_tiles(side, size, limits.tiles) for size in row] for row in rows]
        each = int((side // int(vision["patch_size"])) ** 2 * float(vision["pixel_shuffle_ratio"]) ** 2)
        shape = (sum(map(sum, tiles)), int(vision["num_channels"]), side, side)
        return TowerInputs(shape, None, tuple(tuple(each * count for count in row) for row in tiles))
    raise NotMeasurable(f"what a vision tower of {config.model_type} reads of an image is not known")


def within(config: PreTrainedConfig, rows: Rows, limits: Limits, length: int) -> Rows:
    """The rows with images so small, if need be, that their tokens leave room for a text in `length` tokens."""
    return tuple(_within(config, row, limits, length) for row in rows)


def _within(config: PreTrainedConfig, row: tuple[ImageSize, ...], limits: Limits, length: int) -> tuple[ImageSize, ...]:
    free = Limits(1, limits.most, limits.tiles)
    while row:
        [tokens] = tower_inputs(config, (row,), limits).tokens
        room = length - len(row) - 1  # a token of text beside each
        if sum(tokens) <= room:
            return row
        scale = _SHRINK * math.sqrt(max(room, 0) / sum(tokens))
        smaller = tuple(ImageSize(max(1, int(width * scale)), max(1, int(height * scale))) for width, height in row)
        if smaller == row or min(map(min, smaller)) <= 1:  # no image is that small
            row = row[:-1]
            continue
        row, limits = smaller, free
    return row


def _grid(vision: dict[str, Any], model_type: str, size: ImageSize, limits: Limits) -> tuple[int, int]:
    """Patches of an image: (height, width)."""
    patch, merge = int(vision["patch_size"]), int(vision["spatial_merge_size"])
    factor, frames = patch * merge, int(vision.get("temporal_patch_size", 1)) if model_type in _PIXELS_OF_FRAMES else 1
    width, height = size
    if frames > 1 and min(size) < factor:
        enlarged = max(factor / height, factor / width)
        width, height = int(width * enlarged), int(height * enlarged)
    sides = [round(side / factor) * factor for side in (height, width)]
    pixels = frames * sides[0] * sides[1]
    if limits.most is not None and pixels > limits.most:
        smaller = math.sqrt(frames * height * width / limits.most)
        sides = [max(factor, math.floor(side / smaller / factor) * factor) for side in (height, width)]
    elif pixels < limits.least:
        larger = math.sqrt(limits.least / (frames * height * width))
        sides = [math.ceil(side * larger / factor) * factor for side in (height, width)]
    return max(factor, sides[0]) // patch, max(factor, sides[1]) // patch


def _tiles(side: int, size: ImageSize, most: int) -> int:
    """Tiles of an image, with the copy of all of it."""

    def scaled(grid: tuple[int, int]) -> float:
        return min(grid[0] * side / size.height, grid[1] * side / size.width)

    grids = list(_divisions(most))
    scales = [scaled(grid) for grid in grids]
    larger = [scale for scale in scales if scale >= 1]
    wanted = min(larger) if larger else max(scales)
    tiles = min(grid[0] * grid[1] for grid, scale in zip(grids, scales, strict=True) if scale == wanted)
    return tiles + (tiles > 1)


def _divisions(most: int) -> Iterator[tuple[int, int]]:
    for tiles in range(1, most + 1):
        yield from ((high, tiles // high) for high in range(1, tiles + 1) if tiles % high == 0)
