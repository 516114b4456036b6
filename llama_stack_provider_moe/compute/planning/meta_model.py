"""A model without weights: built from its config on the meta device, quantised without numbers, adapted as in a job."""

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from llama_stack_provider_moe.compute.moe.adapters import AdapterReport, add_lora, train_whole
from llama_stack_provider_moe.compute.moe.backend import keep_code
from llama_stack_provider_moe.compute.moe.codes import Code, Coding, bytes_of, parts_of
from llama_stack_provider_moe.compute.moe.derive import find_layout
from llama_stack_provider_moe.compute.moe.kernels.groups import HALVES
from llama_stack_provider_moe.compute.moe.layout import ExpertLayout
from llama_stack_provider_moe.compute.moe.model_types import blank_classifier, blank_model, has_experts, is_composite
from llama_stack_provider_moe.compute.moe.quantize import CodedLinear, placeholder, quantizable
from llama_stack_provider_moe.compute.moe.resolve_settings import ResolvedMoe, apply_moe, resolve_moe
from llama_stack_provider_moe.errors import ModelError, shorten
from llama_stack_provider_moe.ground.small_files import read_config as read_model_config
from llama_stack_provider_moe.spec import Adapter, Moe

Bits = Literal[16, 8, 4]


class BlankCode(Code):
    """Quantised matrices with a shape and a number of bytes, but no numbers."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, coding: Coding) -> None:
        self.shape, self.dtype, self.coding = shape, dtype, coding
        self._nbytes = bytes_of(shape, coding)

    @property
    def nbytes(self) -> int:
        """Bytes of the codes and the scales; each matrix has its own blocks."""
        return self._nbytes

    def expert(self, number: int) -> Tensor:
        """(O, I), as if decoded."""
        return torch.empty(self.shape[1:], dtype=self.dtype)

    def whole(self) -> Tensor:
        """(E, O, I), as if decoded."""
        return torch.empty(self.shape, dtype=self.dtype)


@dataclass(frozen=True)
class MetaModel:
    """A model with its adapter, or with all its weights to train.

    Attributes:
        weight_bytes: of the base in its stored form, embeddings and head included.
        decoded: bytes in 16 bits that decoding a fused weight takes at most; 0: there is none.
    """

    model: PreTrainedModel | PeftModel
    layout: ExpertLayout | None
    resolved: ResolvedMoe
    report: AdapterReport
    weight_bytes: int
    decoded: int


def read_config(name: str, field: str = "model") -> tuple[PreTrainedConfig, tuple[str, ...]]:
    """The model's config, and notes on it for a person.

    For a composite model without experts, which no job takes, it is that of its language model.

    Args:
        name: a folder with config.json, such a file, or the hub id of a model in the cache.
        field: of the job that names it, for errors.

    Raises:
        ModelError: there is no config, or it is not that of a causal language model in 16 bits or more.
    """
    try:
        if Path(name).exists():
            read_model_config(Path(name) / "config.json" if Path(name).is_dir() else Path(name))
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        text = shorten(" ".join(str(error).split()), 300)[1:-1]
        what = "a file" if Path(name).is_file() else "a folder" if Path(name).is_dir() else "no file or folder here"
        raise ModelError(
            f"{field}: the config of {name!r} ({what}) can't be read: {text}; expected a folder with config.json, that "
            "file, or a hub id (which needs the network or an earlier download)"
        ) from error
    notes: tuple[str, ...] = ()
    if is_composite(config):
        parts = ", ".join(config.sub_configs)
        notes = (
            f"{config.model_type} is a composite model ({parts}): its language model trains, and what adapter.vision "
            "names",
            "all weights count, and images as tokens of the length",
        )
    elif (text_config := config.get_text_config()) is not config:
        parts = ", ".join(config.sub_configs)
        notes = (
            f"{config.model_type} is a composite model ({parts}), which jobs refuse; the figures are for its language "
            "model only",
        )
        config = text_config
    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not has_experts(config.model_type):
        raise ModelError(f"{field}: {name!r} (model_type {config.model_type!r}) is not a causal language model")
    if getattr(config, "quantization_config", None) is not None:
        raise ModelError(f"{field}: {name!r} is quantised; expected the unquantised weights")
    return config, notes


def blank(
    config: PreTrainedConfig,
    adapter: Adapter | None,
    moe: Moe,
    bits: Bits = 16,
    dtype: torch.dtype = torch.bfloat16,
) -> MetaModel:
    """A model on the meta device, its base in `dtype` or quantised, adapted in the same order as in a job.

    Args:
        config: of the model.
        adapter: the `adapter` block of a job; None: all weights train.
        moe: the `moe` block of a job.
        bits: of the base; below 16: quantised.
        dtype: of the base.

    Raises:
        AdapterError, LayoutError, ModelError: the start of a job would fail too.
    """
    return adapt(bare(config, dtype), adapter, moe, bits)


def bare(config: PreTrainedConfig, dtype: torch.dtype, classifier: bool = False) -> PreTrainedModel:
    """The model, or the reward model made of it, on the meta device, without changes."""
    with torch.device("meta"):
        # Adapting a model changes its config, and the caller may build another model from this one.
        own = type(config).from_dict(config.to_dict())
        model = blank_classifier(own, dtype) if classifier else blank_model(own, dtype)
    # transformers does so when it reads the weights.
    wide = model._keep_in_fp32_modules_strict or ()
    for name, parameter in model.named_parameters():
        if dtype in HALVES and any(part in name for part in wide):
            parameter.data = parameter.data.float()
    return model


def adapt(model: PreTrainedModel, adapter: Adapter | None, moe: Moe, bits: Bits = 16) -> MetaModel:
    """Adapt a model, or let all of it train.

    Args:
        model: with weights, or on the meta device, which `bits` below 16 require.
        adapter: the `adapter` block of a job; None: all weights train.
        moe: the `moe` block of a job.
        bits: of the base; below 16: quantised.
    """
    layout = find_layout(model)
    resolved = resolve_moe(moe, layout, full=adapter is None)
    nested = bits == 4 and adapter is not None and adapter.quantize_scales
    codes = [] if bits == 16 else _quantize(model, layout, Coding(bits, nested))
    apply_moe(model, layout, resolved)
    tensors = [*model.parameters(), *model.buffers()]
    held = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}
    fused = [
        module.get_parameter(name) for module in (layout.experts(model).values() if layout is not None else ())
        for name in ((layout.gate_up, layout.down) if layout is not None else ())
    ]  # fmt: skip
    if adapter is None:
        adapted, report = model, train_whole(model, layout, resolved)
    else:
        # PEFT makes LoRA's weights on the CPU, gigabytes of noise, before it moves them to the base's device.
        nowhere = torch.device("meta") if model.device.type == "meta" else nullcontext()
        with nowhere:
            added = add_lora(model, adapter, layout, resolved)
        adapted, report = added.model, added.report
    return MetaModel(
        adapted,
        layout,
        resolved,
        report,
        weight_bytes=sum(held.values()) + sum(code.nbytes for code in codes),
        decoded=max((weight.numel() * 2 * (2 if _has_parts(weight, bits) else 1) for weight in fused), default=0),
    )


def _has_parts(weight: Tensor, bits: Bits) -> bool:
    return bits < 16 and parts_of(weight.shape[0], weight.shape[1] * weight.shape[2], 4 if bits == 4 else 8) > 1


def _quantize(model: nn.Module, layout: ExpertLayout | None, coding: Coding) -> list[BlankCode]:
    """Do what `compute.moe.quantize` does to the same weights, without numbers."""
    codes = []
    for each in quantizable(model, layout).values():
        weight = each.module.get_parameter(each.name)
        if each.parent is None:
            code = BlankCode(tuple((weight.mT if each.transposed else weight).shape), weight.dtype, coding)
            keep_code(each.module, each.name, code)
            setattr(each.module, each.name, placeholder(weight))
        else:
            assert isinstance(each.module, nn.Linear)
            code = BlankCode((1, *weight.shape), weight.dtype, coding)
            setattr(each.parent, each.child, CodedLinear(each.module, code))
        codes.append(code)
    if not codes:
        raise ModelError("adapter.quantize_base: true is not valid for this model: nothing in it can be quantised")
    return codes
