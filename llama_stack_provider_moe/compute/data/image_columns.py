"""The column with the images of rows for the trainer, and what is checked of it before training."""

from typing import TYPE_CHECKING

from datasets import Dataset, Features, Value

from llama_stack_provider_moe.compute.data.encoding import COLUMN_OF_IMAGES
from llama_stack_provider_moe.compute.models.row_images import image_of
from llama_stack_provider_moe.compute.runtime.context import AnySession
from llama_stack_provider_moe.errors import DataError

if TYPE_CHECKING:
    from llama_stack_provider_moe.compute.models.images import Images


def with_pictures(features: Features, images: "Images | None") -> Features:
    """The columns of rows, with that of their images if some have one."""
    return features if images is None else Features({**features, COLUMN_OF_IMAGES: Value("string")})


def check_images(session: AnySession, train: Dataset, images: "Images | None") -> None:
    """Open the images of the first row that has some, and say how many rows have images.

    Args:
        session: the job's.
        train: its training rows.
        images: turns images into tokens; None: no row has one.

    Raises:
        DataError: no row has an image, or one can't be decoded.
        ModelError: the images' tokens depend on more than their sizes.
    """
    if images is None:
        return
    with_some = [index for index, text in enumerate(train[COLUMN_OF_IMAGES]) if text]
    if not with_some:
        raise DataError("data: the job has images, and no training row has one")
    row = train[with_some[0]]
    opened = [image_of(text) for text in row[COLUMN_OF_IMAGES].split()]
    images.check(opened)
    learnt = set(row["labels"] if "labels" in row else [*row["chosen_ids"], *row["rejected_ids"]])
    assert not learnt & images.ids(opened), "tokens of an image are learnt"
    session.show(f"images    in {len(with_some):,} of {len(train):,} rows to train on")
