"""What a job needs of a vision-language model before its rows are read: the family's processor of images."""

from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch
from transformers import AutoProcessor, PreTrainedModel, PreTrainedTokenizerBase

from llama_stack_provider_moe.compute.models.loader import DTYPES, trusted
from llama_stack_provider_moe.compute.moe.layout import text_config
from llama_stack_provider_moe.compute.moe.vision_parts import vision_layers
from llama_stack_provider_moe.compute.runtime.context import AnySession
from llama_stack_provider_moe.errors import InvalidInput, ModelError, shorten
from llama_stack_provider_moe.jobdir.folder import JobFolder
from llama_stack_provider_moe.spec.image_limits import require_trainable_images

if TYPE_CHECKING:
    from llama_stack_provider_moe.compute.models.images import Images

NEEDED = ("torchvision", "PIL")  # what processors of images import


def has_images(session: AnySession) -> bool:
    """Whether the job's rows have images."""
    folder = session.folder.images
    return folder.is_dir() and any(folder.iterdir())


def load_images(session: AnySession) -> "Images | None":
    """What turns the images of the job's rows into tokens and tensors; None if the rows have none.

    Raises:
        InvalidInput: the job asks for what does not work with images.
        ModelError: a library is missing, or the model has no processor of images.
    """
    spec = session.spec
    if not has_images(session):
        if spec.adapter is not None and spec.adapter.vision != "off":
            raise InvalidInput("adapter.vision", spec.adapter.vision, "'off', because no row has an image")
        return None
    require_trainable_images(spec)
    return images_of_model(spec.model, session.folder, DTYPES[spec.training.dtype])


def images_of_model(model: str, folder: JobFolder, dtype: torch.dtype) -> "Images":
    """What turns images into tokens and tensors of a model.

    Args:
        model: folder or hub id.
        folder: has the images.
        dtype: of the tensors.

    Raises:
        ModelError: a library is missing, or the model has no processor of images.
    """
    for module in NEEDED:
        if find_spec(module) is None:
            raise ModelError(
                f"data: the rows have images, and the training environment has no {module}; install "
                "'llama-stack-provider-moe[vision]' there"
            )
    from llama_stack_provider_moe.compute.models.images import Images

    try:
        processor = AutoProcessor.from_pretrained(model, trust_remote_code=trusted(model))
    except (OSError, ValueError, ImportError) as error:
        text = shorten(" ".join(str(error).split()), 300)[1:-1]
        raise ModelError(f"model: the processor of images of {model!r} can't be loaded: {text}") from error
    if isinstance(processor, PreTrainedTokenizerBase) or getattr(processor, "image_processor", None) is None:
        raise ModelError(f"data: the rows have images, and {model!r} has no processor of images; expected a "
                         "vision-language model, or rows of text")  # fmt: skip
    if getattr(processor, "image_token", None) is None:
        raise ModelError(f"data: the rows have images, and {type(processor).__name__} has no token for one; models of "
                         "this family train on text alone")  # fmt: skip
    return Images(processor, folder, processor.image_token, dtype)


def use_template(tokenizer: PreTrainedTokenizerBase, images: "Images") -> None:
    """Give a tokenizer the processor's chat template: in older repositories the tokenizer's knows no images.

    Raises:
        ModelError: there is no chat template.
    """
    if images.processor.chat_template is not None:
        tokenizer.chat_template = images.processor.chat_template
    if tokenizer.chat_template is None:
        raise ModelError("model: neither its processor nor its tokenizer has a chat template, which places the images")


def require_tower(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, images: "Images") -> str:
    """Check that a model sees images, and give its tokenizer the processor's chat template; returns a line about it.

    Raises:
        ModelError: it has no vision tower, or no chat template.
    """
    if text_config(model) is model.config or not vision_layers(model):
        raise ModelError(f"data: the rows have images, and {type(model).__name__} is a text model; expected a "
                         "vision-language model, or rows of text")  # fmt: skip
    use_template(tokenizer, images)
    return f"images    {type(images.processor).__name__}: {images.token!r} in the chat template stands for one"
