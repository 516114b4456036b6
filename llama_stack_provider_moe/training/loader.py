"""Model id or folder -> the model and its tokenizer, checked to be what can be trained.

Safetensors only, no code from the model's repository unless the server trusts that one, nothing initialised at random.
"""

import json
import os
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from torch.distributed.tensor import DTensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from llama_stack_provider_moe.config import TRUST_VARIABLE
from llama_stack_provider_moe.errors import ModelError, shorten
from llama_stack_provider_moe.experts.layout import decoder_layers
from llama_stack_provider_moe.spec import DType, LoadingSpec
from llama_stack_provider_moe.training.chat_templates import set_template
from llama_stack_provider_moe.training.expert_parallel import as_made, sharing_class

TemplateName = Literal["chatml", "plain"]
DTYPES: dict[DType, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def pick_device(dtype: DType, index: int = 0) -> torch.device:
    """CUDA device `index` of those this process sees, else the CPU; half precision is refused where it can't train.

    Raises:
        ModelError: fewer devices are seen than there are processes; or fp16 on a CPU.
    """
    if torch.cuda.is_available():
        if index >= torch.cuda.device_count():
            raise ModelError(f"resources.gpus: process {index} sees {torch.cuda.device_count()} GPU(s) only")
        return torch.device("cuda", index)
    if dtype == "fp16":
        raise ModelError(
            "training.dtype: 'fp16' can't be trained on a CPU, and there is no CUDA device here; use 'bf16' or 'fp32'"
        )
    return torch.device("cpu")


def trusted(model: str) -> bool:
    """Whether the server lets this model's repository run its own code (`models.trust_remote_code` of its config)."""
    return model in json.loads(os.environ.get(TRUST_VARIABLE, "[]"))


def load(spec: LoadingSpec, device: torch.device) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model on `device` in the job's dtype, in training mode off, and its tokenizer with a chat template."""
    config = model_config(spec.model)
    tokenizer = load_tokenizer(spec)
    if spec.resources.strategy == "fsdp":
        return load_sharded(spec, config, keeps_fp32(spec)), tokenizer
    return load_model(spec, config, device), tokenizer


def keeps_fp32(spec: LoadingSpec) -> bool:
    """Whether weights lie in fp32 and are computed with in bf16: all of them train, and processes share them out."""
    return (
        spec.resources.strategy == "fsdp" and getattr(spec, "adapter", None) is None and spec.training.dtype == "bf16"
    )


def load_sharded(spec: LoadingSpec, config: PreTrainedConfig, in_fp32: bool = False) -> PreTrainedModel:
    """The weights shared out among the job's processes as they are read (transformers 5.23, by FSDP2).

    Args:
        spec: names the model, its dtype and how many processes there are.
        config: of the model.
        in_fp32: see `keeps_fp32`; a layer is gathered in bf16, and its gradients are summed in fp32.

    Raises:
        ModelError: the family has no plan for that.
    """
    from transformers.distributed import DistributedConfig  # not in every version that does without it here

    offloaded = spec.resources.cpu_offload
    sharding = DistributedConfig(
        fsdp_size=spec.resources.ranks, fsdp_mixed_precision=in_fp32, fsdp_cpu_offload=offloaded
    )
    dtype = torch.float32 if in_fp32 else DTYPES[spec.training.dtype]
    model = _weights(spec.model, config, dtype, {"distributed_config": sharding})
    whole = [name for name, parameter in model.named_parameters() if not isinstance(parameter, DTensor)]
    if whole:
        raise ModelError(f"resources.strategy: fsdp: {len(whole)} weights of {type(model).__name__} are not shared out "
                         f"({', '.join(whole[:3])})")  # fmt: skip
    if in_fp32:
        _require_mixed(model)
    if offloaded:
        _require_offloaded(model)
    return model


def _require_offloaded(model: PreTrainedModel) -> None:
    """Hold the model to weights in the CPU's memory: here, and once its first layer has run and another one too.

    Raises:
        ModelError: some are elsewhere.
    """

    def away() -> list[str]:
        return [name for name, parameter in model.named_parameters() if parameter.device.type != "cpu"]

    if found := away():
        raise ModelError(f"resources.cpu_offload: {len(found)} weights are not in the CPU's memory "
                         f"({', '.join(found[:3])})")  # fmt: skip
    path, layers = decoder_layers(model)

    def look(*_: Any) -> None:
        handle.remove()
        stayed = [name for name in away() if name.startswith(f"{path}.0.")]
        assert not stayed, f"{stayed} stayed on the device"

    handle = layers[min(1, len(layers) - 1)].register_forward_pre_hook(look)


def _require_mixed(model: PreTrainedModel) -> None:
    """Hold the model to fp32 weights and products in bf16: here, and in the first pass through its first layer.

    Raises:
        ModelError: the model wants some weights in fp32 whatever the rest is in; transformers gathers those in bf16.
    """
    names = [name for name, parameter in model.named_parameters()]
    wanted = [name for name in names for part in model._keep_in_fp32_modules_strict or () if part in name]
    if wanted:
        raise ModelError(
            f"training.dtype: 'bf16' is not valid with resources.strategy 'fsdp' and all weights training: this model "
            f"keeps {len(wanted)} of them in fp32 ({', '.join(wanted[:2])}), and FSDP2 would not; expected 'fp32'"
        )
    kept_in = {parameter.dtype for parameter in model.parameters()}
    assert kept_in == {torch.float32}, f"weights that train lie in {kept_in}"
    layer = decoder_layers(model)[1][0]

    def look(*_: Any) -> None:
        handle.remove()
        gathered_in = {parameter.dtype for parameter in layer.parameters()}
        assert gathered_in == {torch.bfloat16}, f"a layer was gathered in {gathered_in}"

    handle = layer.register_forward_pre_hook(look)


def load_alike(folder: Path, model: PreTrainedModel) -> PreTrainedModel:
    """The weights in `folder`, those of `model` at another time; in its dtype, and shared out as its are."""
    config = type(model.config).from_pretrained(folder)
    sharding = getattr(model.config, "distributed_config", None)
    where = _placement(torch.device("cpu")) if sharding is None else {"distributed_config": sharding}
    return _weights(str(folder), config, model.dtype, where)


def load_beside(
    name: str, dtype: DType, device: torch.device, template: TemplateName | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model that is no job's to train, in evaluation mode, and its tokenizer."""
    config = model_config(name)
    tokenizer = tokenizer_of(name, template)
    return load_weights(name, config, DTYPES[dtype], device).eval(), tokenizer


def load_plain(name: str, dtype: DType, device: torch.device) -> PreTrainedModel:
    """A model as anybody loads it, in evaluation mode; no tokenizer."""
    return load_weights(name, model_config(name), DTYPES[dtype], device).eval()


def load_model(spec: LoadingSpec, config: PreTrainedConfig, device: torch.device) -> PreTrainedModel:
    """The weights that the job names, in its dtype; where processes share experts out, of those its own alone."""
    dtype = DTYPES[spec.training.dtype]
    if spec.resources.strategy == "ep":
        return load_held(spec.model, config, dtype, device, spec.resources.ranks)
    return load_weights(spec.model, config, dtype, device)


def load_held(
    name: str, config: PreTrainedConfig, dtype: torch.dtype, device: torch.device, processes: int
) -> PreTrainedModel:
    """The weights, of experts those that are this process's: DTensors, of which each process reads its own part.

    Raises:
        ModelError: the model has no experts, or not so many that each process has equally many.
    """
    from transformers.distributed import DistributedConfig  # as above

    where = {**_placement(device), "distributed_config": DistributedConfig()}
    return as_made(_weights(name, config, dtype, where, sharing_class(config, device, processes)))


def load_weights(name: str, config: PreTrainedConfig, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """The weights; a missing one is an error, for transformers would fill it with noise and only log it."""
    return _weights(name, config, dtype, _placement(device))


def _weights(
    name: str, config: PreTrainedConfig, dtype: torch.dtype, where: dict[str, Any], kind: Any = AutoModelForCausalLM
) -> PreTrainedModel:
    try:
        model, loading = kind.from_pretrained(
            name,
            config=config,
            dtype=dtype,
            trust_remote_code=trusted(name),
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # told below, by name, instead of raised as a RuntimeError without one
            **where,
        )
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise ModelError(_why(name, error)) from error
    missing = [str(key) for key in loading["missing_keys"]]
    misshapen = [f"{key} {tuple(there)} for {tuple(here)}" for key, there, here in loading["mismatched_keys"]]
    lost = [
        f"{len(names)} {kind} ({', '.join(sorted(names)[:3])}{', ...' if len(names) > 3 else ''})"
        for kind, names in (("missing", missing), ("of another shape", misshapen))
        if names
    ]
    if lost:
        raise ModelError(f"model: {name!r} does not hold every weight of {type(model).__name__}: {'; '.join(lost)}")
    return model


def load_tokenizer(spec: LoadingSpec) -> PreTrainedTokenizerBase:
    """The tokenizer, with a padding token: its own, else the end-of-sequence token.

    Padding is masked by position, never by id, so an end-of-sequence token in an answer still counts in the loss.
    """
    return tokenizer_of(spec.model, spec.options.chat_template)


def tokenizer_of(name: str, template: TemplateName | None) -> PreTrainedTokenizerBase:
    """See `load_tokenizer`; `template`: see `options.chat_template`."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trusted(name))
    except (OSError, ValueError, ImportError) as error:
        raise ModelError(_why(name, error, part="tokenizer")) from error
    if not tokenizer.is_fast:
        raise ModelError(
            f"model: {name!r} has a slow tokenizer ({type(tokenizer).__name__}), which does not tell where in "
            "the text a token stands; convert it to a tokenizer.json"
        )
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ModelError(f"model: the tokenizer of {name!r} has neither a padding nor an end token")
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    set_template(tokenizer, template, name)
    return tokenizer


def model_config(model: str) -> PreTrainedConfig:
    """The config of a causal language model of text, unquantised; ModelError for any other."""
    try:
        config = AutoConfig.from_pretrained(model, trust_remote_code=trusted(model))
    except (OSError, ValueError) as error:
        raise ModelError(_why(model, error)) from error
    made_as = (config.architectures or ["a model without an `architectures` entry"])[0]
    if config.get_text_config() is not config:
        parts = ", ".join(name for name in config.sub_configs)
        raise ModelError(
            f"model: {model!r} is {made_as}, a composite model ({parts}); only text models are trained. If its "
            "language model is published on its own, use that"
        )
    causal = set(_flat(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()))
    is_causal = config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and (
        not config.architectures or made_as in causal
    )
    brings_its_own = trusted(model) and "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if not is_causal and not brings_its_own:
        raise ModelError(
            f"model: {model!r} is {made_as} (model_type {config.model_type!r}), not a causal language model"
        )
    if getattr(config, "quantization_config", None) is not None:
        raise ModelError(f"model: {model!r} is quantised; give the unquantised weights")
    return config


def _flat(names: Any) -> list[str]:
    # Some entries of the auto mapping name several classes.
    return [one for name in names for one in ((name,) if isinstance(name, str) else name)]


def _placement(device: torch.device) -> dict[str, Any]:
    # On a GPU the weights go there straight from the file; on a CPU a device map would only cost hooks.
    return {"device_map": {"": device}} if device.type == "cuda" else {}


def _why(model: str, error: Exception, part: str = "model") -> str:
    if "trust_remote_code" in str(error):
        return (
            f"model: {model!r} comes with Python code of its own, which this server does not run; its operator can "
            "allow it for a hub id (models.trust_remote_code)"
        )
    text = shorten(" ".join(str(error).split()), 300)[1:-1] or type(error).__name__
    if Path(model).is_absolute() and not Path(model).is_dir():
        return f"model: there is no folder {model!r} on the training machine"
    if Path(model).is_dir():
        return f"model: the {part} in {model!r} can't be loaded: {text}"
    return (
        f"model: the {part} {model!r} can't be loaded: {text} (a hub id needs the network or an earlier download; "
        "check its spelling, HF_TOKEN if it is gated, and HF_HUB_OFFLINE; or give a folder)"
    )
