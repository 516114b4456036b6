"""The model types of the installed transformers that have experts, found in its source, and the class of a whole model.

A type counts if the module that defines its models has experts, and a class that writes text. A composite model (with
parts for images or sound) is loaded, trained and saved whole, by its own class.
"""

import re
from functools import cache
from pathlib import Path

import torch
import transformers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES, model_type_to_module_name
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)

from llama_stack_provider_moe.errors import ModelError

# Decorated experts, stacked projections, or classes named as experts are.
_EXPERTS = re.compile(r"use_experts_implementation|self\.down_proj = nn\.Parameter|^class \w+(Experts|MoE|Moe)\(", re.M)

# In this order: a whole model with all its parts first.
_WHOLE = (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)


@cache
def types_with_experts() -> dict[str, str]:
    """Model type -> name of the class of the whole model, which writes text, in alphabetical order."""
    found = {model_type: whole_class(model_type) for model_type in sorted(CONFIG_MAPPING_NAMES)}
    return {model_type: whole for model_type, whole in found.items() if whole is not None and has_experts(model_type)}


@cache
def has_experts(model_type: str) -> bool:
    """Whether it is one of `types_with_experts`; reads the source of this type alone."""
    if model_type not in CONFIG_MAPPING_NAMES or whole_class(model_type) is None:
        return False
    return _EXPERTS.search(_source(model_type)) is not None


def whole_class(model_type: str) -> str | None:
    """Name of the class of a whole model that writes text: with its other parts, if it has some."""
    return next((name for mapping in _WHOLE for name in _names(mapping.get(model_type, ()))), None)


def class_of(config: PreTrainedConfig) -> type[PreTrainedModel] | None:
    """The class of transformers that a config's model is of; None if it is not known (code from a repository).

    It is the class that the config names, if that belongs to its model type, else the class of the whole model.
    """
    model_type = str(config.model_type)
    named = (config.architectures or [""])[0]
    possible = [name for mapping in _WHOLE for name in _names(mapping.get(model_type, ()))]
    if not possible:
        return None
    found: type[PreTrainedModel] = getattr(transformers, named if named in possible else possible[0])
    return found


def is_composite(config: PreTrainedConfig) -> bool:
    """Whether a model has other parts beside its language model, and it has experts or sees images."""
    if config.get_text_config() is config:
        return False
    return has_experts(config.model_type) or sees_images(config)


def sees_images(config: PreTrainedConfig) -> bool:
    """Whether a model reads images and writes text."""
    return config.model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES


def loads_with_images(name: str) -> bool:
    """Whether `AutoModelForImageTextToText` loads models of a class of transformers."""
    return any(name in _names(names) for names in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values())


def blank_model(config: PreTrainedConfig, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """A model of a config, without weights if the caller is on the meta device."""
    kind = class_of(config)
    if kind is None:
        made: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
        return made
    return kind._from_config(config, dtype=dtype)


def is_classifier(model: PreTrainedModel) -> bool:
    """Whether it is a sequence classifier of transformers, as reward models are."""
    names = {name for each in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.values() for name in _names(each)}
    return any(each.__name__ in names for each in type(model).__mro__)


def classifier_config(config: PreTrainedConfig, name: str) -> PreTrainedConfig:
    """The config of a classifier of one label, changed in place from that of a model that writes text.

    Raises:
        ModelError: transformers has no such class for text models of this type; it names `name`.
    """
    known = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
    if config.model_type not in known or config.get_text_config() is not config:
        families = ", ".join(each for each in types_with_experts() if each in known)
        raise ModelError(
            f"model: {name!r} (model_type {config.model_type!r}) can't become a reward model, because transformers has "
            f"no sequence classifier of this family; it has, with experts: {families}"
        )
    config.num_labels = 1
    return config


def blank_classifier(config: PreTrainedConfig, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The reward model made of a model with this config, as `blank_model`.

    Raises:
        ModelError: see `classifier_config`.
    """
    changed = classifier_config(config, str(config.name_or_path) or "the model")
    made: PreTrainedModel = AutoModelForSequenceClassification.from_config(changed, dtype=dtype)
    return made


def _names(names: str | tuple[str, ...]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names)


def _source(model_type: str) -> str:
    module = model_type_to_module_name(model_type)
    file = Path(transformers.__file__).parent / "models" / module / f"modeling_{module}.py"
    return file.read_text(encoding="utf-8") if file.is_file() else ""
