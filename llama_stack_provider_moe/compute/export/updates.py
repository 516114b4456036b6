"""The updates that an adapter's folder adds to the parameters of its base, read on demand.

PEFT itself decides what goes where: it adapts a model on the meta device with the adapter's config. So ranks, scales,
patterns and the nesting of several parameters in one module come from PEFT, not from guesses by name.
"""

import warnings
from collections import OrderedDict
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear, LoraLayer, ParamWrapper
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from torch import Tensor, nn
from transformers import PreTrainedModel

from llama_stack_provider_moe.compute.export.tensors import TensorEntry, read_header
from llama_stack_provider_moe.compute.moe.adapters import ADAPTER_NAME, injected
from llama_stack_provider_moe.compute.moe.saved_names import names_in_file
from llama_stack_provider_moe.compute.moe.steering import ROUTER_BIAS
from llama_stack_provider_moe.errors import AdapterError, MoeError, shorten
from llama_stack_provider_moe.ground.small_files import read_object

_KEPT = 2  # updates kept in memory: the two fused weights of a layer alternate on disk
# Settings that this merge handles correctly; any other setting is refused unless it has its default.
_FOLLOWED = {
    "task_type", "peft_type", "auto_mapping", "peft_version", "inference_mode",
    "r", "target_modules", "exclude_modules", "lora_alpha", "lora_dropout", "use_rslora", "layers_to_transform",
    "layers_pattern", "rank_pattern", "alpha_pattern", "target_parameters", "megatron_core", "qalora_group_size",
    "runtime_config",
}  # fmt: skip
# Names and shapes identify the base, not the place where it was stored.
_UNREAD = {"base_model_name_or_path", "revision"}
# These only change the starting point; pissa, olora, corda and loftq change the base as well.
_PLAIN_STARTS = (True, False, "gaussian", "orthogonal", "eva")


class Update(NamedTuple):
    """The update of a parameter, scale * left @ right: (E, a, r) and (E, r, b), or (a, r) and (r, b)."""

    left: Tensor
    right: Tensor
    scale: float


class Updates:
    """The LoRA of an adapter's folder, by full parameter names in the model without adapters.

    Args:
        folder: folder with adapter_config.json and adapter_model.safetensors.
        model: the base in fp32 on the meta device; it is adapted in place.

    Raises:
        AdapterError: the folder is not a LoRA adapter, belongs to another model, or can't be merged here.
    """

    def __init__(self, folder: Path, model: PreTrainedModel) -> None:
        self.config = read_config(folder)
        self.shapes = {name: tuple(each.shape) for name, each in model.named_parameters(remove_duplicate=False)}
        shared = _shared(model)
        self._folder = folder
        self._entries = _weights(folder)
        self._layers, self._names = adapted(model, self.config)
        self._kept: OrderedDict[str, Update] = OrderedDict()
        if tied := sorted(set(self._layers) & shared):
            raise AdapterError(
                f"adapter: has LoRA on {tied[0]}, which is tied to another weight (tie_word_embeddings); merging it "
                "would change both"
            )
        self._check(folder)

    def read_again(self) -> None:
        """Read the weights of the folder, in which another state of the same adapter was written.

        Raises:
            AdapterError: it is another adapter.
        """
        self._entries = _weights(self._folder)
        self._kept.clear()
        self._check(self._folder)

    @property
    def parameters(self) -> list[str]:
        """Full names of the updated parameters."""
        return list(self._layers)

    @property
    def tensors(self) -> int:
        """Number of tensors in the adapter."""
        return len(self._entries)

    def of(self, parameter: str) -> Update:
        """The update of one of `parameters`, in fp32."""
        if parameter not in self._kept:
            self._kept[parameter] = self._read(parameter)
            while len(self._kept) > _KEPT:
                self._kept.popitem(last=False)
        return self._kept[parameter]

    def _read(self, parameter: str) -> Update:
        key, layer = self._layers[parameter]
        names = [self._names[f"{key}.{part}.weight"] for part in ("lora_A", "lora_B")]
        weights = [self._entries[name].tensor().float() for name in names]
        if not all(bool(torch.isfinite(weight).all()) for weight in weights):
            raise AdapterError(f"adapter: LoRA of {parameter} has numbers that are not finite")
        scale = float(layer.scaling[ADAPTER_NAME])
        if len(self.shapes[parameter]) == 2:
            return Update(weights[1], weights[0], scale)
        # PEFT's wrapper knows the order of its axes, so it holds the weights for a moment.
        blank = layer.lora_A[ADAPTER_NAME].weight, layer.lora_B[ADAPTER_NAME].weight
        _set_weights(layer, *weights)
        left, right, _ = layer.get_delta_factors(ADAPTER_NAME)
        _set_weights(layer, *blank)
        return Update(left, right, scale)

    def _check(self, folder: Path) -> None:
        """Check that every weight belongs to a target, every target has both weights, and the shapes match."""
        expected = {
            self._names[f"{key}.{part}.weight"]: tuple(getattr(layer, part)[ADAPTER_NAME].weight.shape)
            for key, layer in self._layers.values() for part in ("lora_A", "lora_B")
        }  # fmt: skip
        file = folder / SAFETENSORS_WEIGHTS_NAME
        if spare := sorted(set(self._entries) - set(expected)):
            raise AdapterError(
                f"adapter: {file} holds {len(spare)} tensor(s) that have no place in this model by its config: "
                f"{', '.join(spare[:3])}"
            )
        if missing := sorted(set(expected) - set(self._entries)):
            raise AdapterError(f"adapter: {file} lacks {len(missing)} tensor(s): {', '.join(missing[:3])}")
        for name, shape in expected.items():
            if self._entries[name].shape != shape:
                raise AdapterError(
                    f"adapter: {name} has shape {self._entries[name].shape}, this base needs {shape}; does it belong "
                    "to another model?"
                )


def read_config(folder: Path) -> LoraConfig:
    """The adapter's config, if it needs no more than a plain merge.

    Raises:
        AdapterError: the config can't be read, or a setting can't be merged here.
    """
    path = folder / CONFIG_NAME
    try:
        config = read_object(path)
    except (OSError, ValueError) as error:
        raise AdapterError(f"adapter: {path} can't be read: {error}") from error
    if config.get("peft_type") != "LORA":
        raise AdapterError(f"adapter: {path} is not the config of a LoRA adapter")
    plain = LoraConfig()
    known = {field.name for field in fields(LoraConfig)}
    for name, value in config.items():
        is_default = not value or (name in known and value == getattr(plain, name))
        if name in _FOLLOWED | _UNREAD or is_default or (name == "init_lora_weights" and value in _PLAIN_STARTS):
            continue
        why = " (DoRA scales whole rows of the weight; merge it in memory, with PEFT)" if name == "use_dora" else ""
        raise AdapterError(f"adapter: {name} {shorten(value)} can't be merged here{why}")
    try:
        return LoraConfig(**{name: value for name, value in config.items() if name in _FOLLOWED & known})
    except (TypeError, ValueError) as error:
        raise AdapterError(f"adapter: {path} is not a config that peft accepts: {error}") from error


def read_biases(folder: Path) -> dict[str, TensorEntry]:
    """Full name in memory -> the router bias that load balancing (`aux_free`) trained."""
    path = folder / ROUTER_BIAS
    return {entry.name: entry for entry in read_header(path)} if path.is_file() else {}


def _weights(folder: Path) -> dict[str, TensorEntry]:
    path = folder / SAFETENSORS_WEIGHTS_NAME
    if not path.is_file():
        raise AdapterError(f"adapter: {folder} has no {SAFETENSORS_WEIGHTS_NAME}")
    try:
        return {entry.name: entry for entry in read_header(path)}
    except MoeError as error:
        raise AdapterError(f"adapter: {error}") from error


def adapted(model: PreTrainedModel, config: LoraConfig) -> tuple[dict[str, tuple[str, LoraLayer]], dict[str, str]]:
    """Full name of each parameter that gets LoRA -> (name of its LoRA in PEFT's model, its layer); `names_in_file`."""
    with warnings.catch_warnings(), torch.device("meta"):
        # peft 0.21 looks for parameters' names among modules, and warns about ties; the result is checked here.
        warnings.simplefilter("ignore")
        try:
            adapted = get_peft_model(model, config, adapter_name=ADAPTER_NAME, low_cpu_mem_usage=True)
        except (ValueError, TypeError, AttributeError) as error:
            raise AdapterError(f"adapter: PEFT can't add it to this base: {error}") from error
    keys = {id(module): name for name, module in adapted.named_modules() if isinstance(module, LoraLayer)}
    found: dict[str, tuple[str, LoraLayer]] = {}
    for name, layer in injected(adapted).items():
        if not isinstance(layer, ParamWrapper | Linear) or not isinstance(
            layer.get_base_layer(), nn.Linear if isinstance(layer, Linear) else nn.Module
        ):
            raise AdapterError(
                f"adapter: LoRA on {name} ({type(layer.get_base_layer()).__name__}) can't be merged here"
            )
        found[name if isinstance(layer, ParamWrapper) else f"{name}.weight"] = keys[id(layer)], layer
    if not found:
        raise AdapterError("adapter: this base has none of its targets")
    return found, names_in_file(adapted)


def _shared(model: PreTrainedModel) -> set[str]:
    """Names of the parameters that also have another name."""
    by_identity: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        by_identity.setdefault(id(parameter), []).append(name)
    return {name for each in by_identity.values() if len(each) > 1 for name in each}


def _set_weights(layer: LoraLayer, weight_a: Tensor, weight_b: Tensor) -> None:
    layer.lora_A[ADAPTER_NAME].weight = nn.Parameter(weight_a, requires_grad=False)
    layer.lora_B[ADAPTER_NAME].weight = nn.Parameter(weight_b, requires_grad=False)
