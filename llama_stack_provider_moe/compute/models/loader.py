"""Load a model and its tokenizer by hub id or folder, and check that this project can train the model.

Only safetensors are read. Code from the model's repository runs only if the server trusts that repository. No weight is
initialised at random, except the new head of a reward model (`classifier`).
"""

import json
import os
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, Protocol, cast

import torch
from safetensors import SafetensorError
from torch.distributed.tensor import DTensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from llama_stack_provider_moe.compute.distributed.expert_parallel import sharing_class, with_original_class
from llama_stack_provider_moe.compute.models.chat_templates import set_template
from llama_stack_provider_moe.compute.moe.downloads import DownloadBar
from llama_stack_provider_moe.compute.moe.layout import decoder_layers
from llama_stack_provider_moe.compute.moe.model_types import class_of, has_experts, is_classifier, is_composite
from llama_stack_provider_moe.compute.runtime.library_signs import transformers_counts, watch_layers
from llama_stack_provider_moe.errors import ModelError, shorten
from llama_stack_provider_moe.ground import liveness
from llama_stack_provider_moe.ground.counting import number_of
from llama_stack_provider_moe.spec import DType, LoadingSpec
from llama_stack_provider_moe.spec.server_config import TRUST_VARIABLE

TemplateName = Literal["chatml", "plain"]
DTYPES: dict[DType, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def pick_device(dtype: DType, index: int = 0) -> torch.device:
    """The CUDA device `index` of those that this process sees, or the CPU if there is none.

    Raises:
        ModelError: this process sees fewer devices than there are processes, or fp16 is asked for on a CPU.
    """
    if torch.cuda.is_available():
        if index >= torch.cuda.device_count():
            raise ModelError(f"resources.gpus: process {index} sees only {number_of(torch.cuda.device_count(), 'GPU')}")
        return torch.device("cuda", index)
    if dtype == "fp16":
        raise ModelError(
            "training.dtype: 'fp16' is not valid on a CPU, and this machine has no CUDA device; expected 'bf16' or "
            "'fp32'"
        )
    return torch.device("cpu")


def trusted(model: str) -> bool:
    """Whether the server allows this model's repository to run its code (`models.trust_remote_code` in its config)."""
    return model in json.loads(os.environ.get(TRUST_VARIABLE, "[]"))


def load(
    spec: LoadingSpec, device: torch.device, template_needed: bool = True
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model on `device` in the job's dtype and in evaluation mode, and its tokenizer.

    Args:
        spec: names the model and its dtype.
        device: where the weights go.
        template_needed: whether the tokenizer must have a chat template.
    """
    config = model_config(spec.model)
    tokenizer = load_tokenizer(spec, template_needed)
    if spec.resources.strategy == "fsdp":
        return load_sharded(spec, config, keeps_fp32(spec)), tokenizer
    return load_model(spec, config, device), tokenizer


def keeps_fp32(spec: LoadingSpec) -> bool:
    """Whether weights are kept in fp32 and computed with in bf16: all of them train, and they are sharded."""
    return (
        spec.resources.strategy == "fsdp" and getattr(spec, "adapter", None) is None and spec.training.dtype == "bf16"
    )


def load_sharded(spec: LoadingSpec, config: PreTrainedConfig, in_fp32: bool = False) -> PreTrainedModel:
    """Load the model sharded: each process reads its parts of the weights (transformers 5.23, by FSDP2).

    Args:
        spec: names the model, its dtype and the number of processes.
        config: the model's config.
        in_fp32: see `keeps_fp32`; a layer is gathered in bf16, and its gradients are summed in fp32.

    Raises:
        ModelError: transformers has no plan to shard this family.
    """
    from transformers.distributed import DistributedConfig  # older supported versions of transformers have none

    offloaded = spec.resources.cpu_offload
    sharding = DistributedConfig(
        fsdp_size=spec.resources.ranks, fsdp_mixed_precision=in_fp32, fsdp_cpu_offload=offloaded
    )
    dtype = torch.float32 if in_fp32 else DTYPES[spec.training.dtype]
    model = _weights(spec.model, config, dtype, {"distributed_config": sharding})
    whole = [name for name, parameter in model.named_parameters() if not isinstance(parameter, DTensor)]
    if whole:
        raise ModelError(f"resources.strategy: 'fsdp' is not valid for {type(model).__name__}: {len(whole)} of its "
                         f"weights are not sharded ({', '.join(whole[:3])})")  # fmt: skip
    if in_fp32:
        _require_mixed(model)
    if offloaded:
        _require_offloaded(model)
    return model


def _require_offloaded(model: PreTrainedModel) -> None:
    """Check that the weights are in the CPU's memory: now, and when the first two layers have run.

    Raises:
        ModelError: some weights are elsewhere.
    """

    def elsewhere() -> list[str]:
        return [name for name, parameter in model.named_parameters() if parameter.device.type != "cpu"]

    if found := elsewhere():
        raise ModelError(f"resources.cpu_offload: {len(found)} weights are not in the CPU's memory "
                         f"({', '.join(found[:3])})")  # fmt: skip
    path, layers = decoder_layers(model)

    def check_first_layer(*_: object) -> None:
        handle.remove()
        stayed = [name for name in elsewhere() if name.startswith(f"{path}.0.")]
        assert not stayed, f"{stayed} stayed on the device"

    handle = layers[min(1, len(layers) - 1)].register_forward_pre_hook(check_first_layer)


def _require_mixed(model: PreTrainedModel) -> None:
    """Check that weights are in fp32 and products in bf16: now, and in the first pass through the first layer.

    Raises:
        ModelError: the model always needs some weights in fp32, and transformers would gather those in bf16.
    """
    names = [name for name, parameter in model.named_parameters()]
    wanted = [name for name in names for part in model._keep_in_fp32_modules_strict or () if part in name]
    if wanted:
        raise ModelError(
            f"training.dtype: 'bf16' is not valid with resources.strategy 'fsdp' and all weights training: this model "
            f"keeps {len(wanted)} of them in fp32 ({', '.join(wanted[:2])}), and FSDP2 would not; expected 'fp32'"
        )
    kept_in = {parameter.dtype for parameter in model.parameters()}
    assert kept_in == {torch.float32}, f"trained weights are in {kept_in}"
    layer = decoder_layers(model)[1][0]

    def check_gathered_dtype(*_: object) -> None:
        handle.remove()
        gathered_in = {parameter.dtype for parameter in layer.parameters()}
        assert gathered_in == {torch.bfloat16}, f"a layer was gathered in {gathered_in}"

    handle = layer.register_forward_pre_hook(check_gathered_dtype)


def load_checkpoint_like(folder: Path, model: PreTrainedModel) -> PreTrainedModel:
    """Load a checkpoint of `model` from `folder`, in the model's dtype and sharded as the model is."""
    config = type(model.config).from_pretrained(folder)
    sharding = getattr(model.config, "distributed_config", None)
    where = _placement(torch.device("cpu")) if sharding is None else {"distributed_config": sharding}
    return _weights(str(folder), config, model.dtype, where, type(model) if is_classifier(model) else None)


def load_for_inference(
    name: str, dtype: DType, device: torch.device, template: TemplateName | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model that no job trains, in evaluation mode, and its tokenizer.

    Args:
        name: a hub id or a folder.
        dtype: of the weights.
        device: where the weights go.
        template: see `options.chat_template`.
    """
    config = model_config(name)
    tokenizer = tokenizer_of(name, template)
    return load_weights(name, config, DTYPES[dtype], device).eval(), tokenizer


def load_plain(name: str, dtype: DType, device: torch.device) -> PreTrainedModel:
    """Load a model with transformers alone, in evaluation mode and without a tokenizer."""
    return load_weights(name, model_config(name), DTYPES[dtype], device).eval()


def load_model(spec: LoadingSpec, config: PreTrainedConfig, device: torch.device) -> PreTrainedModel:
    """Load the job's model in its dtype; with strategy `ep` only the experts of this process."""
    dtype = DTYPES[spec.training.dtype]
    if spec.resources.strategy == "ep":
        return load_held(spec.model, config, dtype, device, spec.resources.ranks)
    return load_weights(spec.model, config, dtype, device)


def load_held(
    name: str, config: PreTrainedConfig, dtype: torch.dtype, device: torch.device, processes: int
) -> PreTrainedModel:
    """Load a model with only this process's experts. They are DTensors, of which each process reads its part.

    Args:
        name: a hub id or a folder.
        config: the model's config.
        dtype: of the weights.
        device: where the weights go.
        processes: the processes that share the experts.

    Raises:
        ModelError: the model has no experts, or the processes can't all have the same number of them.
    """
    from transformers.distributed import DistributedConfig  # see `load_sharded`

    where = {**_placement(device), "distributed_config": DistributedConfig()}
    return with_original_class(_weights(name, config, dtype, where, sharing_class(config, device, processes)))


def load_weights(
    name: str,
    config: PreTrainedConfig,
    dtype: torch.dtype,
    device: torch.device,
    model_class: type[AutoModelForSequenceClassification] | None = None,
    more: Mapping[str, object] = MappingProxyType({}),
    fresh: Collection[str] = (),
) -> PreTrainedModel:
    """Load a model. A missing weight is an error: transformers would initialise it at random and only log that.

    Args:
        name: a hub id or a folder.
        config: the model's config.
        dtype: of the weights.
        device: where the weights go.
        model_class: of another kind than causal language models; None: of these.
        more: further arguments of transformers' `from_pretrained`.
        fresh: names of the weights that transformers is to initialise at random where the model has none.
    """
    return _weights(name, config, dtype, {**_placement(device), **more}, model_class, fresh)


class _Loads(Protocol):
    """A model class of transformers, or its `AutoModelForCausalLM`."""

    from_pretrained: Callable[..., tuple[PreTrainedModel, Mapping[str, Collection[Any]]]]


def _weights(
    name: str,
    config: PreTrainedConfig,
    dtype: torch.dtype,
    where: Mapping[str, object],
    model_class: type[PreTrainedModel | AutoModelForCausalLM | AutoModelForSequenceClassification] | None = None,
    fresh: Collection[str] = (),
) -> PreTrainedModel:
    if model_class is None:  # a composite model is loaded by the class of the whole, so that it is saved whole
        whole = class_of(config) if has_experts(config.model_type) or is_composite(config) else None
        model_class = whole or AutoModelForCausalLM
    try:
        with liveness.stage("opening the model", unit="files"), transformers_counts():
            model, loading = cast(_Loads, model_class).from_pretrained(
                name,
                config=config,
                dtype=dtype,
                trust_remote_code=trusted(name),
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # reported below by name; transformers' RuntimeError has no names
                tqdm_class=DownloadBar,
                **where,
            )
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise ModelError(_why(name, error)) from error
    missing = [str(key) for key in loading["missing_keys"] if str(key) not in fresh]
    misshapen = [f"{key} {tuple(there)} for {tuple(here)}" for key, there, here in loading["mismatched_keys"]]
    lost = [
        f"{len(names)} {kind} ({', '.join(sorted(names)[:3])}{', ...' if len(names) > 3 else ''})"
        for kind, names in (("missing", missing), ("of another shape", misshapen))
        if names
    ]
    if lost:
        raise ModelError(f"model: {name!r} does not have every weight of {type(model).__name__}: {'; '.join(lost)}")
    watch_layers(model)
    return model


def load_tokenizer(spec: LoadingSpec, template_needed: bool = True) -> PreTrainedTokenizerBase:
    """Load the tokenizer. If it has no padding token, it pads with the end-of-sequence token.

    Padding is masked by position, never by id, so an end-of-sequence token in an answer still counts in the loss.
    """
    return tokenizer_of(spec.model, spec.options.chat_template, template_needed)


def tokenizer_of(name: str, template: TemplateName | None, template_needed: bool = True) -> PreTrainedTokenizerBase:
    """See `load_tokenizer`; `template`: see `options.chat_template`."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trusted(name))
    except (OSError, ValueError, ImportError) as error:
        raise ModelError(_why(name, error, part="tokenizer")) from error
    if not tokenizer.is_fast:
        raise ModelError(
            f"model: {name!r} has a slow tokenizer ({type(tokenizer).__name__}), which does not give a token's "
            "position in the text; convert it to a tokenizer.json"
        )
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ModelError(f"model: the tokenizer of {name!r} has neither a padding nor an end-of-sequence token")
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    set_template(tokenizer, template, name, template_needed)
    return tokenizer


def model_config(model: str) -> PreTrainedConfig:
    """The config of a model, which must be an unquantised causal language model.

    A composite model passes if its language model has experts: that part trains on text, the others are frozen.

    Raises:
        ModelError: it is another kind of model.
    """
    try:
        config = AutoConfig.from_pretrained(model, trust_remote_code=trusted(model))
    except (OSError, ValueError) as error:
        raise ModelError(_why(model, error)) from error
    made_as = (config.architectures or ["a model without an `architectures` entry"])[0]
    if config.get_text_config() is not config and not is_composite(config):
        parts = ", ".join(name for name in config.sub_configs)
        raise ModelError(
            f"model: {model!r} is {made_as}, a composite model ({parts}); expected a text model. If its language "
            "model is published separately, use that"
        )
    causal = set(_flat(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()))
    is_causal = config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and (
        not config.architectures or made_as in causal
    )
    if has_experts(config.model_type) or is_composite(config):
        known = class_of(config)
        is_causal = known is not None and (not config.architectures or made_as == known.__name__)
    has_own_code = trusted(model) and "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if not is_causal and not has_own_code:
        raise ModelError(
            f"model: {model!r} is {made_as} (model_type {config.model_type!r}), not a causal language model"
        )
    if getattr(config, "quantization_config", None) is not None:
        raise ModelError(f"model: {model!r} is quantised; expected unquantised weights")
    return config


def _flat(names: Iterable[str | tuple[str, ...]]) -> list[str]:
    # Some entries of the auto mapping name several classes.
    return [one for name in names for one in ((name,) if isinstance(name, str) else name)]


def _placement(device: torch.device) -> dict[str, object]:
    # A device map loads weights directly onto the GPU. For a CPU it would only add hooks.
    return {"device_map": {"": device}} if device.type == "cuda" else {}


def _why(model: str, error: Exception, part: str = "model") -> str:
    if "trust_remote_code" in str(error):
        return (
            f"model: {model!r} needs Python code from its repository, which this server does not run; its operator "
            "can allow that for a hub id (models.trust_remote_code)"
        )
    text = shorten(" ".join(str(error).split()), 300)[1:-1] or type(error).__name__
    if Path(model).is_absolute() and not Path(model).is_dir():
        return f"model: there is no folder {model!r} on the training machine"
    if Path(model).is_dir():
        return f"model: the {part} in {model!r} can't be loaded: {text}"
    return (
        f"model: the {part} {model!r} can't be loaded: {text} (a hub id needs the network or an earlier download; "
        "check the spelling, HF_TOKEN if the model is gated, and HF_HUB_OFFLINE; or use a folder)"
    )
