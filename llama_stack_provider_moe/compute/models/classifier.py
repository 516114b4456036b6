"""Load a reward model: a sequence classifier of one label, with a chat template and a token to pad with.

A job makes one of a model that writes text: its decoder layers stay, and a new head replaces its output head.
"""

from pathlib import Path

import torch
from peft.utils import CONFIG_NAME
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from llama_stack_provider_moe.compute.models.loader import DTYPES, load_weights, model_config, tokenizer_of, trusted
from llama_stack_provider_moe.compute.models.quantized_loading import Quantized, read_quantized
from llama_stack_provider_moe.compute.moe.adapters import HEAD
from llama_stack_provider_moe.compute.moe.codes import Coding
from llama_stack_provider_moe.compute.moe.model_types import classifier_config
from llama_stack_provider_moe.errors import ModelError
from llama_stack_provider_moe.ground.small_files import read_object
from llama_stack_provider_moe.spec import DType

_FRESH = (f"{HEAD}.weight",)  # what the model has no weights for


def load_classifier(
    name: str, dtype: DType, device: torch.device, field: str
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a reward model, in evaluation mode, and its tokenizer.

    Args:
        name: a hub id or a folder.
        dtype: of the weights.
        device: where the weights go.
        field: the caller's name for the model, for errors.

    Raises:
        ModelError: it can't be loaded, or is not a classifier with one label.
    """
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=trusted(name))
    except (OSError, ValueError) as error:
        raise ModelError(f"{field}: {name!r} can't be loaded: {str(error)[:200]}") from error
    made_as = (config.architectures or [""])[0]
    if not made_as.endswith("ForSequenceClassification"):
        raise ModelError(f"{field}: {name!r} is {made_as or 'of no named architecture'}, not a sequence classifier")
    if config.num_labels != 1:
        raise ModelError(f"{field}: {name!r} has {config.num_labels} labels; expected one, whose logit is the reward")
    tokenizer = tokenizer_of(name, None)
    # The classifier reads the last token that is not padding, which it finds by this id.
    config.get_text_config().pad_token_id = config.pad_token_id = tokenizer.pad_token_id
    model = load_weights(name, config, DTYPES[dtype], device, AutoModelForSequenceClassification)
    return model.eval(), tokenizer


def is_saved_classifier(folder: str) -> bool:
    """Whether a model's config says that it is a sequence classifier."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trusted(folder))
    made_as = str((config.architectures or [""])[0])
    return made_as.endswith("ForSequenceClassification")


def is_reward_adapter(folder: Path) -> bool:
    """Whether an adapter's config says that it is one of a sequence classifier; a folder without an adapter is none."""
    return (folder / CONFIG_NAME).is_file() and read_object(folder / CONFIG_NAME).get("task_type") == "SEQ_CLS"


def load_saved_classifier(folder: str, dtype: DType, device: torch.device) -> PreTrainedModel:
    """Load a reward model that a job saved, in evaluation mode and without a tokenizer.

    Raises:
        ModelError: it can't be loaded.
    """
    config = AutoConfig.from_pretrained(folder)
    return load_weights(folder, config, DTYPES[dtype], device, AutoModelForSequenceClassification).eval()


def load_new_classifier(name: str, dtype: DType, device: torch.device, pad_token_id: int | None) -> PreTrainedModel:
    """Load a model that writes text as a reward model, whose head is new: drawn from torch's generator.

    Args:
        name: a hub id or a folder.
        dtype: of the weights.
        device: where the weights go.
        pad_token_id: of the tokenizer; the reward is read at the last token that is another one. None: rows are
            never padded.

    Raises:
        ModelError: it can't be loaded, or its family has no classifier.
    """
    kind = AutoModelForSequenceClassification
    return load_weights(name, _new_config(name, pad_token_id), DTYPES[dtype], device, kind, fresh=_FRESH).eval()


def load_quantized_classifier(
    name: str, dtype: DType, device: torch.device, pad_token_id: int | None, coding: Coding, offload: bool = False
) -> Quantized:
    """Load a model as a reward model, its decoder layers quantised; the new head is not. See `load_new_classifier`.

    Args:
        name: a hub id or a folder.
        dtype: of the weights that are not quantised.
        device: where the weights go.
        pad_token_id: of the tokenizer, or None.
        coding: bits of the codes and of their scales.
        offload: whether the codes of the experts stay in main memory.

    Raises:
        ModelError: it can't be loaded, or its family has no classifier.
    """
    config, kind = _new_config(name, pad_token_id), AutoModelForSequenceClassification
    return read_quantized(
        name, config, DTYPES[dtype], device, coding, offload=offload, model_class=kind, fresh=_FRESH
    )  # fmt: skip


def _new_config(name: str, pad_token_id: int | None) -> PreTrainedConfig:
    config = classifier_config(model_config(name), name)
    if pad_token_id is not None:
        config.pad_token_id = pad_token_id
    return config
