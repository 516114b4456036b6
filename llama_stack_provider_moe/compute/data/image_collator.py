"""Batches of rows with images. This module needs neither Pillow nor torchvision; what opens the images does."""

from typing import TYPE_CHECKING, Any

from llama_stack_provider_moe.compute.data.encoding import COLUMN_OF_IMAGES
from llama_stack_provider_moe.compute.models.row_images import image_of

if TYPE_CHECKING:
    from llama_stack_provider_moe.compute.models.images import Images


class ImageCollator:
    """A collator that adds to a batch what the model needs of its rows' images; a batch without images stays as it is.

    Args:
        collate: of the rows without images.
        images: opens the images.
        repeats: how often the rows are in the batch: 2 for pairs, all chosen answers and then all rejected ones.
    """

    def __init__(self, collate: Any, images: "Images", repeats: int = 1) -> None:
        self._collate = collate
        self._images = images
        self._repeats = repeats

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        named = [image_of(text) for row in rows for text in row[COLUMN_OF_IMAGES].split()]
        batch = dict(
            self._collate([{name: value for name, value in row.items() if name != COLUMN_OF_IMAGES} for row in rows])
        )
        if not named:
            return batch
        return {**batch, **self._images.inputs(named * self._repeats, batch["input_ids"])}
