"""The part of a model that a probe reads: embeddings and the first decoder blocks, without an output head."""

import copy
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedConfig, PreTrainedTokenizerBase
from transformers.utils import logging

from llama_stack_provider_moe.compute.ablation.fingerprint import fingerprint, sha256
from llama_stack_provider_moe.compute.models.adapted import with_adapter
from llama_stack_provider_moe.compute.models.hidden_states import Blocks
from llama_stack_provider_moe.compute.models.loader import (
    DTYPES,
    TemplateName,
    load_weights,
    model_config,
    pick_device,
    tokenizer_of,
)
from llama_stack_provider_moe.compute.models.upcycle import model_folder
from llama_stack_provider_moe.compute.moe.derive import find_layout
from llama_stack_provider_moe.errors import InvalidInput
from llama_stack_provider_moe.shields.probe_card import Base
from llama_stack_provider_moe.spec import DType

_ADAPTER_WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True)
class Trunk:
    """The loaded part of a model, in evaluation mode.

    Attributes:
        blocks: its decoder blocks; those above the highest one that is read are gone.
        tokenizer: of the model.
        base: what a probe's card says of the model.
        vocabulary: rows of its embedding.
    """

    blocks: Blocks
    tokenizer: PreTrainedTokenizerBase
    base: Base
    vocabulary: int

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return next(self.blocks.decoder.parameters()).device


def blocks_in(model: str) -> int:
    """The number of decoder blocks of a model, from its config."""
    return int(model_config(model).get_text_config().num_hidden_layers)


def load_trunk(
    model: str, adapter_folder: str | None, dtype: DType, template: TemplateName | None, highest: int
) -> Trunk:
    """Load a model up to block `highest`.

    Without an adapter, only these blocks are read from its files. With one, the whole model is in memory until the
    adapter is on it.

    Args:
        model: a folder or a hub id.
        adapter_folder: of the adapter on it; None: none.
        dtype: of its parameters.
        template: see `options.chat_template`.
        highest: number of a decoder block.

    Raises:
        ModelError: the model can't be loaded, or the adapter does not fit it.
        InvalidInput: the model has no such block.
    """
    whole = model_config(model)
    text = whole.get_text_config()
    count, width = int(text.num_hidden_layers), int(text.hidden_size)
    if not 0 <= highest < count:
        raise InvalidInput("probe.layers", highest, f"decoder blocks of {model!r}: 0 to {count - 1}")
    tokenizer, device = tokenizer_of(model, template), pick_device(dtype)
    config = whole if adapter_folder is not None else first_blocks(whole, highest + 1)
    with _without_load_report():
        loaded = load_weights(model, config, DTYPES[dtype], device)
    vocabulary = int(loaded.get_input_embeddings().weight.shape[0])
    adapted = loaded
    if adapter_folder is not None:
        adapted = with_adapter(loaded, Path(adapter_folder), find_layout(loaded))
    blocks = Blocks(adapted.eval())
    blocks.drop_above(highest)
    base = Base(
        model=model,
        fingerprint=fingerprint(model_folder(model, "model")),
        adapter_folder=adapter_folder,
        adapter=None if adapter_folder is None else sha256(Path(adapter_folder) / _ADAPTER_WEIGHTS),
        model_type=str(text.model_type),
        layers=count,
        width=width,
        dtype=dtype,
        template=template,
        chat_template=hashlib.sha256(str(tokenizer.chat_template).encode()).hexdigest(),
    )
    return Trunk(blocks, tokenizer, base, vocabulary)


@contextmanager
def _without_load_report() -> Iterator[None]:
    """Weights of the blocks above are left in the files on purpose; transformers would warn of each."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def first_blocks(config: PreTrainedConfig, count: int) -> PreTrainedConfig:
    """The config of the same model with its first `count` decoder blocks alone."""
    cut = copy.deepcopy(config)
    text = cut.get_text_config()
    before = int(text.num_hidden_layers)
    if count == before:
        return cut
    # Lists with an entry for each block: layer_types, mlp_layer_types, no_rope_layers, ...
    lists = {name: value for name, value in vars(text).items() if isinstance(value, list) and len(value) == before}
    text.num_hidden_layers = count
    for name, value in lists.items():
        setattr(text, name, value[:count])
    return cut
