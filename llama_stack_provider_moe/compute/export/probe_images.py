"""Two drawn images of one size, and the model's inputs for a question about each: for logits that a later process
compares. Whoever asks needs the family's processor, as it was saved beside the weights.
"""

from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from llama_stack_provider_moe.errors import AdapterError, shorten

Drawing = Literal["disc", "stripes"]
_WIDTH, _HEIGHT = 96, 64  # pixels
_QUESTION = "What do you see? Answer in one word."


def asked_about(processor: Any, drawing: Drawing) -> tuple[list[int], dict[str, Tensor]]:
    """The tokens of a question about a drawing, and the model's other inputs, floats in fp32.

    Args:
        processor: the family's.
        drawing: which.
    """
    parts = [{"type": "image"}, {"type": "text", "text": _QUESTION}]
    chat = [{"role": "user", "content": parts}]
    template = processor.chat_template or processor.tokenizer.chat_template  # older repositories have the second alone
    text = processor.apply_chat_template(chat, chat_template=template, tokenize=False, add_generation_prompt=True)
    found = processor(text=[text], images=[drawn(drawing)], images_kwargs={"return_tensors": "pt"})
    inputs = {name: torch.as_tensor(value) for name, value in found.items()}
    tokens: list[int] = inputs.pop("input_ids")[0].tolist()
    return tokens, {name: value.float() if value.is_floating_point() else value for name, value in inputs.items()}


def drawn(drawing: Drawing) -> Any:
    """The picture, by whole numbers alone, so that it is the same everywhere."""
    from llama_stack_provider_moe.compute.models.images import picture  # Pillow: where there are images alone

    pixels = bytearray()
    for y in range(_HEIGHT):
        for x in range(_WIDTH):
            is_inside = (x - 32) ** 2 + (y - 32) ** 2 < 400 if drawing == "disc" else (x + y) % 24 < 12
            pixels += bytes((220, 40, 30) if is_inside else (40, 90, 200 - y))
    return picture(_WIDTH, _HEIGHT, bytes(pixels))


def saved_processor(folder: Path) -> Any:
    """The processor of images in an artifact's folder.

    Raises:
        AdapterError: it can't be loaded there.
    """
    from transformers import AutoProcessor  # it looks for torchvision, which only jobs with images need

    try:
        return AutoProcessor.from_pretrained(folder)
    except (OSError, ValueError, ImportError) as error:
        text = shorten(" ".join(str(error).split()), 300)[1:-1]
        raise AdapterError(
            f"{folder}: the model was trained on images, and the processor of images beside it can't be loaded: {text}"
        ) from error
