"""The images that a plan counts on: those of a job's rows once they are there, before that an assumption."""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from transformers import PreTrainedConfig

from llama_stack_provider_moe.compute.models.row_images import images_of
from llama_stack_provider_moe.compute.planning.tower_inputs import (
    ImageSize,
    Limits,
    RowImages,
    assumed,
    measured,
    processor_limits,
)
from llama_stack_provider_moe.errors import InvalidInput
from llama_stack_provider_moe.ground.hub_cache import cached_model
from llama_stack_provider_moe.jobdir.folder import JobFolder
from llama_stack_provider_moe.spec import TrainingSpec
from llama_stack_provider_moe.spec.expected_images import IMAGE_SIZE, sides_of
from llama_stack_provider_moe.spec.image_limits import require_trainable_images


def image_size(text: str) -> ImageSize:
    """`1024x768` as a size.

    Raises:
        InvalidInput: it is none.
    """
    return ImageSize(*sides_of(text))


_USUAL_SIZE = image_size(IMAGE_SIZE)


@dataclass(frozen=True)
class ExpectedImages:
    """The images to count on in rows that are not there.

    Attributes:
        each: images in each row; None: one, where it can be.
        size: of each.
    """

    each: int | None = None
    size: ImageSize = _USUAL_SIZE

    def of(self, config: PreTrainedConfig, place: str) -> RowImages | None:
        """The images of rows for a model; None: none.

        Args:
            config: the model's.
            place: of the config; the processor's files may be beside it.

        Raises:
            InvalidInput: images were asked for, and the model sees none.
        """
        if "vision_config" not in config.sub_configs:
            if self.each:
                raise InvalidInput("--images", self.each, "0, because this model has no vision tower")
            return None
        return None if self.each == 0 else assumed(self.each or 1, self.size, _limits(place))

    def of_job(self, spec: TrainingSpec, config: PreTrainedConfig, place: str) -> tuple[RowImages | None, str | None]:
        """The same for a job, and if a model that sees images gets none, a line about it.

        Raises:
            InvalidInput: images were asked for, and the job or its model can't train on them.
        """
        found = self.of(config, place)
        if found is None:
            return None, "rows without images: it does not run" if "vision_config" in config.sub_configs else None
        try:
            require_trainable_images(spec)
        except InvalidInput as error:
            if self.each:
                raise
            return None, f"rows without images: it does not run. With images, {error}"
        return found, None


USUAL_IMAGES = ExpectedImages()


def images_of_rows(spec: TrainingSpec, folder: JobFolder) -> RowImages | None:
    """The images of a job's rows; None: they have none."""
    if not folder.images.is_dir() or not any(folder.images.iterdir()):
        return None
    rows = chain.from_iterable(map(_sizes, sorted(folder.data.glob("*.jsonl"))))
    largest = measured(rows, spec.training.batch_size, _limits(spec.model))
    return largest if any(largest.rows) else None


def _sizes(rows: Path) -> Iterator[tuple[ImageSize, ...]]:
    with rows.open("rb") as lines:
        for line in lines:
            if b'"sha256"' not in line:
                continue
            row = json.loads(line)
            messages = row.get("messages", row.get("prompt"))
            assert isinstance(messages, list), "only conversations have images"
            yield tuple(ImageSize(image.width, image.height) for image in images_of(messages))


def _limits(place: str) -> Limits:
    path = Path(place)
    folder = path if path.is_dir() else path.parent if path.is_file() else cached_model(place, os.environ)
    return Limits() if folder is None else processor_limits(folder)
