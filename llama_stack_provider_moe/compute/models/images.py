"""Images of rows: the tokens that stand for them, and the tensors that the model sees.

The family's own processor (transformers' `AutoProcessor`) decides both. The number of tokens follows from an image's
size alone, so rows are measured without opening a file: the processor is asked once for each size, with a blank image.
Files are opened when a batch is made, in the processes that make batches.
"""

import hashlib
import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image as Pillow
from PIL import ImageChops, UnidentifiedImageError
from torch import Tensor

from llama_stack_provider_moe.compute.models.row_images import Image, Unseen
from llama_stack_provider_moe.errors import DataError, ModelError
from llama_stack_provider_moe.jobdir.folder import JobFolder

TYPES = "mm_token_type_ids"  # (rows, tokens): 1 on tokens of images
_OF_TEXT = ("input_ids", "attention_mask", "token_type_ids", "text_replacement_offsets", TYPES)
_SIZES = 2048  # of images that are remembered
_FORMATS = {"png": "PNG", "jpeg": "JPEG", "webp": "WEBP"}


@dataclass
class Images:
    """Turns images into tokens and tensors. It can be pickled.

    Attributes:
        processor: the family's.
        folder: the job's.
        token: what the chat template writes for an image.
        dtype: of the tensors; the tower's.
    """

    processor: Any
    folder: JobFolder
    token: str
    dtype: torch.dtype
    _tokens: dict[tuple[int, int], str] = field(default_factory=dict, repr=False)

    def __repr__(self) -> str:
        """Everything that the tokens of a row depend on."""
        known = hashlib.sha256(json.dumps(self.processor.to_dict(), sort_keys=True, default=str).encode()).hexdigest()
        return f"Images({self.token}, {known})"

    def tokens(self, image: Image) -> str:
        """The text that stands for an image, made of tokens that only images have.

        Raises:
            ModelError: the processor does not say.
            Unseen: the processor takes no image of this size.
        """
        size = (image.width, image.height)
        if size not in self._tokens:
            if len(self._tokens) >= _SIZES:
                self._tokens.clear()
            try:
                self._tokens[size] = self._replacements([Pillow.new("RGB", size)])[0]
            except (ValueError, ArithmeticError, RuntimeError) as error:
                raise Unseen(f"{type(self.processor).__name__} does not take an image of {image.width} x "
                             f"{image.height} pixels: {error}") from error  # fmt: skip
        return self._tokens[size]

    def ids(self, images: Sequence[Image]) -> set[int]:
        """Ids of the tokens that stand for images."""
        found = self.processor.tokenizer([self.tokens(image) for image in images], add_special_tokens=False)
        return {token for ids in found["input_ids"] for token in ids}

    def _replacements(self, images: Sequence[Pillow.Image]) -> list[str]:
        found = self.processor(
            text=[self.token * len(images)], images=list(images), return_text_replacement_offsets=True
        )
        if "text_replacement_offsets" not in found:
            raise ModelError(f"data: the rows have images, and {type(self.processor).__name__} does not tell which "
                             "tokens stand for one; models of this family train on text alone")  # fmt: skip
        return [each["replacement"] for each in found["text_replacement_offsets"][0]]

    def check(self, images: Sequence[Image]) -> None:
        """Check that opened images have the tokens that were counted from their sizes.

        Raises:
            DataError: a file can't be decoded.
            ModelError: the tokens depend on more than the size.
        """
        opened = self._replacements([self.opened(image) for image in images])
        if opened != [self.tokens(image) for image in images]:
            raise ModelError(f"data: {type(self.processor).__name__} gives an image other tokens than a blank one of "
                             "its size; models of this family can't train on images")  # fmt: skip

    def inputs(self, images: Sequence[Image], input_ids: Tensor) -> dict[str, Tensor]:
        """The model's inputs for the images of a batch.

        Args:
            images: of all rows, in their order.
            input_ids: (rows, tokens), padded.
        """
        opened = [self.opened(image) for image in images]
        found = self.processor(text=[self.token * len(opened)], images=opened, images_kwargs={"return_tensors": "pt"})
        made = {
            name: tensor.to(self.dtype) if tensor.is_floating_point() else tensor
            for name, tensor in found.items()
            if name not in _OF_TEXT
        }
        if TYPES in found:
            made[TYPES] = torch.tensor(self.processor.create_mm_token_type_ids(input_ids.tolist()))
        return made

    def opened(self, image: Image) -> Pillow.Image:
        """The decoded image, in RGB.

        Raises:
            DataError: it can't be decoded, or is not what its rows say. Names the first row that has it.
        """
        path = self.folder.image(image.sha256, image.format)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", Pillow.DecompressionBombWarning)
                with Pillow.open(path, formats=[_FORMATS[image.format]]) as file:
                    if file.size != (image.width, image.height):
                        raise DataError(f"{self._where(image)}: is {file.size[0]} x {file.size[1]} pixels; the row "
                                        f"says {image.width} x {image.height}")  # fmt: skip
                    return in_rgb(file)
        except (Pillow.DecompressionBombError, Pillow.DecompressionBombWarning):
            most = Pillow.MAX_IMAGE_PIXELS
            raise DataError(f"{self._where(image)}: has more than {most:,} pixels, the most that is decoded") from None
        except (OSError, SyntaxError, ValueError, UnidentifiedImageError) as error:
            raise DataError(f"{self._where(image)}: can't be decoded: {error}") from None

    def _where(self, image: Image) -> str:
        """The first row and part of the job's data with an image; only an error reads the rows again."""
        for path in sorted(self.folder.data.glob("*.jsonl")):
            with path.open(encoding="utf-8") as lines:
                for number, line in enumerate(lines, start=1):
                    if image.sha256 in line and (part := _part(json.loads(line), image.sha256)):
                        return f"{path.name}, row {number}: {part}: the image"
        return f"image {image.sha256}"


def in_rgb(file: Pillow.Image) -> Pillow.Image:
    """An image in RGB: what is transparent is white, as in transformers' own conversion, and 16 bits of grey become 8.

    Pillow alone shows what a file hides below transparency, and makes each grey above 255 of 65,535 white.
    """
    if file.mode.startswith("I"):
        greys = file.convert("I;16").tobytes()  # the high byte of each comes second
        low, high = (Pillow.frombytes("L", file.size, greys[first::2]) for first in (0, 1))
        hidden = file.info.get("transparency")
        if isinstance(hidden, int):
            bytes_of = ((low, hidden % 256), (high, hidden // 256))
            alike = [half.point([255 * (byte == value) for byte in range(256)]) for half, value in bytes_of]
            high.paste(255, mask=ImageChops.darker(*alike))
        return high.convert("RGB")
    if not file.has_transparency_data:
        return file.convert("RGB")
    white = Pillow.new("RGBA", file.size, "white")
    return Pillow.alpha_composite(white, file.convert("RGBA")).convert("RGB")


def picture(width: int, height: int, pixels: bytes) -> Pillow.Image:
    """An image of drawn pixels: three bytes each (red, green, blue), row by row."""
    return Pillow.frombytes("RGB", (width, height), pixels)


def _part(row: Mapping[str, Any], sha256: str) -> str | None:
    """The path in a row of the part that is this image."""
    for column in ("messages", "prompt"):
        for number, message in enumerate(row.get(column, ())):
            for at, part in enumerate(message["content"] if isinstance(message["content"], list) else ()):
                if part.get("sha256") == sha256:
                    return f"{column}[{number}].content[{at}]"
    return None
