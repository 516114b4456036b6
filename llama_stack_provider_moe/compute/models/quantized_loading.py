"""Load a model whose weights are quantised as they are read: main memory never holds it in 16 bits.

transformers reads a checkpoint one weight of the model at a time (for experts: a layer's, joined from the tensors on
disk) and hands each to a quantiser before it reads the next. Its own for bitsandbytes takes linear layers only; the one
here takes everything that this project quantises (`compute.moe.quantize.quantizable`). On a GPU each tensor goes
there first, so that main memory holds one tensor at a time.

Files are read, not mapped: a page of a mapped file counts as memory of the process from its first use until the file is
closed, and transformers closes files when all weights are loaded.
"""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    modeling_utils,
)
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from llama_stack_provider_moe.compute.models.loader import DTYPES, load_tokenizer, load_weights, model_config
from llama_stack_provider_moe.compute.moe.codes import Code, Coding
from llama_stack_provider_moe.compute.moe.derive import find_layout
from llama_stack_provider_moe.compute.moe.layout import ExpertLayout
from llama_stack_provider_moe.compute.moe.offload import offload_experts
from llama_stack_provider_moe.compute.moe.quantize import (
    Quantizable,
    QuantizeReport,
    placeholder,
    quantizable,
    quantize,
)
from llama_stack_provider_moe.spec import Adapter, LoadingSpec

METHOD = "moe_codes"  # in transformers' tables of quantisers


def coding_of(adapter: Adapter | None) -> Coding | None:
    """The coding that an `adapter` block asks for; None: the base stays as it is."""
    if adapter is None or not adapter.quantize_base:
        return None
    return Coding(adapter.quantize_bits, adapter.quantize_scales)


class Quantized(NamedTuple):
    """A quantised model in evaluation mode, where its experts are (None: it is dense), and what was quantised."""

    model: PreTrainedModel
    layout: ExpertLayout | None
    report: QuantizeReport


def load_quantized(
    spec: LoadingSpec,
    device: torch.device,
    coding: Coding,
    field: str,
    template_needed: bool = True,
    offload: bool = False,
) -> tuple[Quantized, PreTrainedTokenizerBase]:
    """The job's model, quantised, and its tokenizer.

    Args:
        spec: names the model and its dtype.
        device: where the model goes.
        coding: bits of the codes and of their scales.
        field: the setting that asks for it, for errors.
        template_needed: whether the tokenizer must have a chat template.
        offload: whether the codes of the experts stay in main memory.

    Raises:
        ModelError: the model can't be loaded, or a weight that should be quantised is not.
    """
    config = model_config(spec.model)
    tokenizer = load_tokenizer(spec, template_needed)
    return read_quantized(spec.model, config, DTYPES[spec.training.dtype], device, coding, field, offload), tokenizer


def read_quantized(
    name: str,
    config: PreTrainedConfig,
    dtype: torch.dtype,
    device: torch.device,
    coding: Coding,
    field: str = "adapter.quantize_base",
    offload: bool = False,
    model_class: type[AutoModelForSequenceClassification] | None = None,
    fresh: Collection[str] = (),
) -> Quantized:
    """Load a model by hub id or folder; see `load_quantized`.

    Args:
        name: a hub id or a folder.
        config: the model's config.
        dtype: of the weights, before they are quantised and after they are decoded.
        device: where the model goes.
        coding: bits of the codes and of their scales.
        field: the setting that asks for it, for errors.
        offload: whether the codes of the experts stay in main memory.
        model_class: see `loader.load_weights`.
        fresh: see `loader.load_weights`.
    """
    more = {"quantization_config": _CodesConfig(coding, offload)}
    with _files_are_read():
        model = load_weights(name, config, dtype, device, model_class, more, fresh)
    quantizer: _CodesQuantizer = model.hf_quantizer
    _forget(model, quantizer)
    report = quantize(model, quantizer.layout, coding, device, field, quantizer.codes)
    quantizer.codes.clear()
    if offload:
        report = replace(report, offloaded=offload_experts(model, quantizer.layout, device))
    return Quantized(model.eval(), quantizer.layout, report)


@register_quantization_config(METHOD)
class _CodesConfig(QuantizationConfigMixin):  # type: ignore[misc]
    def __init__(self, coding: Coding, offload: bool) -> None:
        self.quant_method = METHOD
        self.offload = offload
        self.bits, self.nested = coding.bits, coding.nested  # transformers writes the config as JSON


@register_quantizer(METHOD)
class _CodesQuantizer(HfQuantizer):  # type: ignore[misc]
    """Makes the codes while transformers reads the weights.

    Attributes:
        layout: of the model, before it has weights.
        codes: of the weights that have been read, by their full names.
    """

    def __init__(self, quantization_config: _CodesConfig, **keywords: Any) -> None:
        super().__init__(quantization_config, **keywords)
        self.coding = Coding(quantization_config.bits, quantization_config.nested)
        self.offload = quantization_config.offload
        self.layout: ExpertLayout | None = None
        self.codes: dict[str, Code] = {}
        self._wanted: dict[str, Quantizable] = {}

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **_: object) -> None:
        self.layout = find_layout(model)
        self._wanted = quantizable(model, self.layout)

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **_: object) -> bool:
        """Whether this weight gets a code."""
        return param_name in self._wanted

    def param_element_size(self, model: PreTrainedModel, param_name: str, param: Tensor) -> float:
        """Bytes of a number, by which transformers reserves memory of a GPU."""
        return self.coding.bits / 8 if param_name in self._wanted else param.element_size()

    def get_quantize_ops(self) -> ConversionOps:
        """What transformers calls with the whole weight."""
        return _Encode(self)

    def take(self, name: str, weight: Tensor, expected: Tensor) -> Tensor:
        """Encode a weight and return what the model gets in its place: a placeholder, or the weight itself.

        Args:
            name: full name of the weight.
            weight: in the dtype of the model.
            expected: the model's parameter.
        """
        wanted = self._wanted.get(name)
        if wanted is None:  # read together with one that is quantised
            return weight
        if weight.shape != expected.shape:
            del self._wanted[name]  # so that transformers reports the shape
            return weight
        code = wanted.encoded(weight, self.coding)
        self.codes[name] = code.moved(torch.device("cpu")) if self.offload and wanted.parent is None else code
        return placeholder(weight)

    def is_serializable(self) -> bool:
        """transformers must not save the codes."""
        return False

    @property
    def is_trainable(self) -> bool:
        """Adapters train on top."""
        return True


class _Encode(ConversionOps):  # type: ignore[misc]
    def __init__(self, quantizer: _CodesQuantizer) -> None:
        self._quantizer = quantizer

    def convert(self, input_dict: dict[str, Any], *, model: PreTrainedModel, **_: object) -> dict[str, Tensor]:
        """The weights of `input_dict`, by full names, with placeholders for those that are encoded."""
        found = {}
        for name in list(input_dict):
            given = input_dict.pop(name)  # freed when it is encoded
            weight = given[0] if isinstance(given, list) else given
            del given
            found[name] = self._quantizer.take(name, weight, model.get_parameter_or_buffer(name))
            del weight
        return found


@contextmanager
def _files_are_read() -> Iterator[None]:
    """Inside, transformers opens safetensors files for reading instead of mapping them; 5.23 has no setting for it."""
    mapped = modeling_utils.safe_open

    def opened(path: object, **keywords: object) -> object:
        return mapped(path, **{**keywords, "backend": "pread"})

    modeling_utils.safe_open = opened
    try:
        yield
    finally:
        modeling_utils.safe_open = mapped


def _forget(model: PreTrainedModel, quantizer: HfQuantizer) -> None:
    """Remove transformers' marks of a quantised model: they concern formats that PEFT and TRL know, and files."""
    quantizer.remove_quantization_config(model)
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and isinstance(module, nn.Module):
            module.config.__dict__.pop("_is_quantized", None)
