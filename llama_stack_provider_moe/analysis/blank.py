"""A model without weights: built from its config on the meta device, quantised in name, adapted as for training."""

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from llama_stack_provider_moe.errors import ModelError, shorten
from llama_stack_provider_moe.experts.adapters import AdapterReport, add_lora, train_whole
from llama_stack_provider_moe.experts.backend import keep_code
from llama_stack_provider_moe.experts.layout import ExpertLayout, find_layout
from llama_stack_provider_moe.experts.quantize import BLOCKS, Code, CodedLinear, linear_layers, placeholder
from llama_stack_provider_moe.experts.settings import ResolvedMoe, apply_moe, resolve_moe
from llama_stack_provider_moe.spec import Adapter, Moe

Bits = Literal[16, 8, 4]
_SCALE_BYTES = 4  # fp32, one a block


class BlankCode(Code):
    """Shape and bytes of quantised matrices, and no numbers."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, bits: Literal[8, 4]) -> None:
        experts, numbers = shape[0], shape[1] * shape[2]
        self.shape, self.dtype = shape, dtype
        self._nbytes = experts * (-(-numbers * bits // 8) + _SCALE_BYTES * -(-numbers // BLOCKS[bits]))

    @property
    def nbytes(self) -> int:
        """Of the codes, and the scales; each matrix has its own blocks."""
        return self._nbytes

    def expert(self, number: int) -> Tensor:
        """(O, I), as if decoded."""
        return torch.empty(self.shape[1:], dtype=self.dtype)

    def whole(self) -> Tensor:
        """(E, O, I), as if decoded."""
        return torch.empty(self.shape, dtype=self.dtype)


@dataclass(frozen=True)
class Adapted:
    """A model with its adapter, or with all its weights to train.

    Attributes:
        weight_bytes: of the base, embeddings and head included, as it is held.
        largest_expert_weight: bytes in 16 bits of the largest fused weight; 0 where there is none.
    """

    model: Any
    layout: ExpertLayout | None
    resolved: ResolvedMoe
    report: AdapterReport
    weight_bytes: int
    largest_expert_weight: int


def read_config(name: str) -> tuple[PreTrainedConfig, tuple[str, ...]]:
    """The language model's config, and what to know of it.

    Args:
        name: a folder with config.json, such a file, or the hub id of a model that is in the cache.

    Raises:
        ModelError: there is none, or it is no causal language model in 16 bits or more.
    """
    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        text = shorten(" ".join(str(error).split()), 300)[1:-1]
        what = "a file" if Path(name).is_file() else "a folder" if Path(name).is_dir() else "no file or folder here"
        raise ModelError(
            f"model: the config of {name!r} ({what}) can't be read: {text}; expected a folder with config.json, that "
            "file, or a hub id (which needs the network or an earlier download)"
        ) from error
    notes: tuple[str, ...] = ()
    if (text_config := config.get_text_config()) is not config:
        parts = ", ".join(config.sub_configs)
        notes = (
            f"{config.model_type} is a composite model ({parts}), which jobs refuse; this is its language model alone",
        )
        config = text_config
    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise ModelError(f"model: {name!r} (model_type {config.model_type!r}) is not a causal language model")
    if getattr(config, "quantization_config", None) is not None:
        raise ModelError(f"model: {name!r} is quantised; give the unquantised weights")
    return config, notes


def blank(
    config: PreTrainedConfig,
    adapter: Adapter | None,
    moe: Moe,
    bits: Bits = 16,
    dtype: torch.dtype = torch.bfloat16,
) -> Adapted:
    """A model on the meta device, its base in `dtype` or quantised, adapted in the order that a job has.

    Args:
        adapter: None: all weights train.

    Raises:
        AdapterError, LayoutError, ModelError: as a job's start would.
    """
    return adapt(bare(config, dtype), adapter, moe, bits)


def bare(config: PreTrainedConfig, dtype: torch.dtype) -> Any:
    """The model on the meta device, as it is."""
    with torch.device("meta"):
        # A config is written to while a model is adapted; another model may be built of this one.
        return AutoModelForCausalLM.from_config(type(config).from_dict(config.to_dict()), dtype=dtype)


def adapt(model: Any, adapter: Adapter | None, moe: Moe, bits: Bits = 16) -> Adapted:
    """Adapt a model, or let all of it train; with `bits` below 16 it must be on the meta device."""
    layout = find_layout(model)
    resolved = resolve_moe(moe, layout, full=adapter is None)
    codes = [] if bits == 16 else _quantize(model, layout, bits)
    apply_moe(model, layout, resolved)
    tensors = [*model.parameters(), *model.buffers()]
    held = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}
    fused = [
        module.get_parameter(name) for module in (layout.experts(model).values() if layout is not None else ())
        for name in ("gate_up_proj", "down_proj")
    ]  # fmt: skip
    if adapter is None:
        adapted, told = model, train_whole(model, layout, resolved)
    else:
        # PEFT makes LoRA's weights on the CPU, gigabytes of noise, before it moves them to where the base is.
        nowhere = torch.device("meta") if model.device.type == "meta" else nullcontext()
        with nowhere:
            added = add_lora(model, adapter, layout, resolved)
        adapted, told = added.model, added.report
    return Adapted(
        adapted,
        layout,
        resolved,
        told,
        weight_bytes=sum(held.values()) + sum(code.nbytes for code in codes),
        largest_expert_weight=max((weight.numel() * 2 for weight in fused), default=0),
    )


def _quantize(model: nn.Module, layout: ExpertLayout | None, bits: Literal[8, 4]) -> list[BlankCode]:
    """What `experts.quantize` does, to the same weights, without numbers."""
    codes = []
    for module in layout.experts(model).values() if layout is not None else ():
        assert layout is not None
        for name in (layout.gate_up, layout.down):
            weight = module.get_parameter(name)
            code = BlankCode(tuple((weight.mT if layout.transposed else weight).shape), weight.dtype, bits)
            keep_code(module, name, code)
            setattr(module, name, placeholder(weight))
            codes.append(code)
    for parent, name, linear in linear_layers(model, layout):
        code = BlankCode((1, *linear.weight.shape), linear.weight.dtype, bits)
        setattr(parent, name, CodedLinear(linear, code))
        codes.append(code)
    if not codes:
        raise ModelError("adapter.quantize_base: true is not valid for this model: nothing in it can be quantised")
    return codes
