"""Tiny random vision-language models with their families' processors, and rows with drawn images.

`build("qwen3_vl_moe", folder)` saves one as a Hugging Face folder. An image token covers 8 x 8 pixels (Llama 4: 28 x 28
of a tile of 56). The Llama 4 tower has as many layers as its language model, in a list of the same name.
"""

import hashlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerFast, ProcessorMixin

from llama_stack_provider_moe.compute.moe.model_types import class_of
from llama_stack_provider_moe.jobdir.folder import JobFolder
from tests.support.every_family import tiny_config
from tests.support.template_tokenizers import byte_level

Draw = Callable[[ImageDraw.ImageDraw], None]
COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (30, 60, 220), "yellow": (230, 220, 40)}

# What each family's published chat template writes for an image.
_IMAGE = {
    "qwen3_vl_moe": "<|vision_start|><|image_pad|><|vision_end|>",
    "qwen3_vl": "<|vision_start|><|image_pad|><|vision_end|>",
    "glm4v_moe": "<|begin_of_image|><|image|><|end_of_image|>",
    "llama4": "<|image|>",
}
FAMILIES = tuple(_IMAGE)
_SPECIALS = {
    "qwen3_vl_moe": ["<|video_pad|>"],
    "qwen3_vl": ["<|video_pad|>"],
    "glm4v_moe": ["<|video|>", "<|begin_of_video|>", "<|end_of_video|>"],
    "llama4": ["<|image_start|>", "<|image_end|>", "<|patch|>", "<|tile_x_separator|>", "<|tile_y_separator|>"],
}


def template(family: str) -> str:
    """A chat template for texts and for lists of parts."""
    return (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
        "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
        "{% if part['type'] == 'image' %}{{ '" + _IMAGE[family] + "' }}{% else %}{{ part['text'] }}{% endif %}"
        "{% endfor %}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )


def tokenizer(family: str) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with the family's tokens of images."""
    of_image = [f"{part}|>" for part in _IMAGE[family].split("|>") if part]
    specials = ["<|pad|>", "<|im_end|>", "<|im_start|>", *of_image, *_SPECIALS[family]]
    return byte_level(template(family), specials, eos_token="<|im_end|>", pad_token="<|pad|>")


def processor(family: str) -> ProcessorMixin:
    """The family's processor: patches of 4 pixels, of which 2 x 2 are a token."""
    text = tokenizer(family)
    small: dict[str, Any] = {"patch_size": 4, "size": {"shortest_edge": 64, "longest_edge": 4096}}
    if family == "llama4":
        from transformers.models.llama4 import Llama4ImageProcessor, Llama4Processor

        tiles = Llama4ImageProcessor(size={"height": 56, "width": 56}, max_patches=4)
        return Llama4Processor(tiles, text, patch_size=14, chat_template=text.chat_template)
    if family == "glm4v_moe":
        from transformers.models.glm4v import Glm4vImageProcessor, Glm4vProcessor, Glm4vVideoProcessor

        return Glm4vProcessor(Glm4vImageProcessor(**small), text, Glm4vVideoProcessor(), text.chat_template)
    from transformers.models.qwen2_vl import Qwen2VLImageProcessor
    from transformers.models.qwen3_vl import Qwen3VLProcessor, Qwen3VLVideoProcessor

    return Qwen3VLProcessor(Qwen2VLImageProcessor(**small), text, Qwen3VLVideoProcessor(), text.chat_template)


def config(family: str, **text: Any) -> Any:
    """The tiny config; `text` changes its language model's."""
    values = tiny_config(family).to_dict()
    ids = tokenizer(family).convert_tokens_to_ids
    values["text_config"] |= {"eos_token_id": ids("<|im_end|>"), "pad_token_id": ids("<|pad|>"), "bos_token_id": None}
    vision = values["vision_config"]
    if family == "llama4":
        values |= {"image_token_index": ids("<|patch|>"), "boi_token_index": ids("<|image_start|>"),
                   "eoi_token_index": ids("<|image_end|>")}  # fmt: skip
        # The converter looks for the second matrix of the projector among as many names as there are layers.
        vision |= {"image_size": 56, "num_hidden_layers": 3, "intermediate_size": 128, "vision_output_dim": 32,
                   "projector_input_dim": 32, "projector_output_dim": 32}  # fmt: skip
        layers = ("layer_types", "no_rope_layers", "moe_layers")
        values["text_config"] = {name: value for name, value in values["text_config"].items() if name not in layers}
        values["text_config"] |= {"num_hidden_layers": 2, "attention_chunk_size": 512}
    else:
        token, video = ("<|image|>", "<|video|>") if family == "glm4v_moe" else ("<|image_pad|>", "<|video_pad|>")
        values |= {"image_token_id": ids(token), "video_token_id": ids(video)}
        vision |= {"patch_size": 4}
        if family == "glm4v_moe":
            values |= {f"{what}_{end}_token_id": ids(f"<|{name}_of_{what}|>") for what in ("image", "video")
                       for end, name in (("start", "begin"), ("end", "end"))}  # fmt: skip
            vision |= {"image_size": 64}
        else:
            values |= {f"vision_{end}_token_id": ids(f"<|vision_{end}|>") for end in ("start", "end")}
            vision |= {"deepstack_visual_indexes": [0], "num_position_embeddings": 64}
            values["text_config"]["rope_parameters"] = {
                "rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1], "mrope_interleaved": True,
            }  # fmt: skip
    values["text_config"] |= {"max_position_embeddings": 512, **text}
    del values["model_type"], values["transformers_version"]
    return AutoConfig.for_model(family, **values)


def model(family: str, seed: int = 0, **text: Any) -> PreTrainedModel:
    """A tiny random fp32 model in memory, in evaluation mode."""
    made = config(family, **text)
    kind = class_of(made)
    assert kind is not None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        whole: PreTrainedModel = kind._from_config(made, dtype=torch.float32)
    return whole.eval()


def build(family: str, folder: Path, seed: int = 0, **text: Any) -> Path:
    """Save a tiny model, its tokenizer and its processor to `folder`, and return it."""
    model(family, seed, **text).save_pretrained(folder)
    processor(family).save_pretrained(folder)
    return folder


def drawn(colour: str, width: int = 24, height: int = 16, kind: str = "png", place: int = 0) -> bytes:
    """An image file: a disc of a colour on grey; `place` moves it."""
    picture = Image.new("RGB", (width, height), (128, 128, 128))
    ImageDraw.Draw(picture).ellipse((2 + place, 2, min(width, 14 + place), height - 2), fill=COLOURS[colour])
    file = io.BytesIO()
    picture.save(file, kind.upper(), lossless=True)
    return file.getvalue()


def put(folder: JobFolder, file: bytes) -> dict[str, Any]:
    """Write an image into a job's folder, as the server does; returns the part of a row that names it."""
    with Image.open(io.BytesIO(file)) as opened:
        kind, (width, height) = str(opened.format).lower(), opened.size
    sha256 = hashlib.sha256(file).hexdigest()
    folder.images.mkdir(parents=True, exist_ok=True)
    folder.image(sha256, kind).write_bytes(file)
    return {"type": "image", "sha256": sha256, "format": kind, "width": width, "height": height}
