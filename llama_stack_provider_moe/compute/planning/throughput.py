"""Tokens and floating-point operations per second and device, and their share of the device's peak.

Only operations that the method needs count. Padding, and layers that checkpointing runs again, take time but are not
counted. The product of a matrix of n numbers with a token takes 2 n operations. Its backward takes as many for the
token's gradient and, if the matrix trains, as many for the matrix's:

    forward, a token     2 x (matrices that act on it; of an expert's, top_k / experts; LoRA's beside them)
    backward, a token    the same once for gradients of inputs, from the lowest layer that trains, and once more for
                         each matrix that trains
    attention, a row     2 x (pairs of tokens that see each other) x heads x (width of keys + of values) a layer,
                         and twice that in backward

A reference pass is another forward without LoRA. Not counted: norms, activations, softmax, embeddings (which are only
looked up), recurrences of state-space and linear-attention layers (their projections are counted). If embeddings are
frozen, the lowest layer's inputs need no gradient; it is counted anyway.

Model FLOPs utilisation as in PaLM (arXiv 2204.02311, appendix B), with only the causal half of attention.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from llama_stack_provider_moe.compute.moe.layout import ExpertLayout, decoder_layers, text_config, without_adapters
from llama_stack_provider_moe.compute.moe.sharding import pieces
from llama_stack_provider_moe.spec import DType

# Dense bf16 and fp16 peaks in TFLOP/s, without sparsity, from NVIDIA's data sheets; the first that a name contains.
PEAKS: tuple[tuple[str, float], ...] = (
    ("B200", 2250.0), ("H200 NVL", 835.5), ("H200", 989.4), ("H100 NVL", 835.5), ("H100 PCIe", 756.5), ("H100", 989.4),
    ("A100", 312.0), ("L40S", 362.05), ("L4", 121.0), ("A10G", 70.0), ("A10", 125.0),
)  # fmt: skip
# Bandwidths of memory in GB/s, from the same data sheets.
BANDWIDTHS: tuple[tuple[str, float], ...] = (
    ("B200", 8000.0), ("H200", 4800.0), ("H100 NVL", 3900.0), ("H100 PCIe", 2000.0), ("H100", 3350.0),
    ("A100 80GB PCIe", 1935.0), ("A100 SXM4 80GB", 2039.0), ("A100", 1555.0),
    ("L40S", 864.0), ("L4", 300.0), ("A10G", 600.0), ("A10", 600.0),
)  # fmt: skip


def peak_flops(device: str, dtype: DType) -> float | None:
    """The device's peak operations per second in matrix products; None if we don't know it.

    Args:
        device: CUDA's name of it.
        dtype: of the products. fp32 has no single peak, because products may be in TF32 or not.
    """
    tera = None if dtype == "fp32" else _of_device(PEAKS, device)
    return None if tera is None else tera * 1e12


def bandwidth(device: str) -> float | None:
    """Bytes per second of the device's memory; None if we don't know it.

    Args:
        device: CUDA's name of it.
    """
    giga = _of_device(BANDWIDTHS, device)
    return None if giga is None else giga * 1e9


def _of_device(table: Sequence[tuple[str, float]], device: str) -> float | None:
    names = set(re.split(r"[\s-]+", device))
    return next((value for name, value in table if set(name.split()) <= names), None)


@dataclass(frozen=True)
class StepFlops:
    """Operations of one training step.

    Attributes:
        a_token: operations per token, in matrix products.
        a_pair: operations per pair of tokens in one layer's attention.
        windows: for each layer with attention that runs, how many tokens a token sees; None: all before it.
    """

    a_token: float
    a_pair: float
    windows: tuple[int | None, ...]

    def of(self, lengths: Sequence[int]) -> float:
        """Operations for rows of these lengths, in tokens."""
        pairs = sum(_pairs(length, window) for length in lengths for window in self.windows)
        return self.a_token * sum(lengths) + self.a_pair * pairs


def count_flops(
    model: nn.Module, layout: ExpertLayout | None, references: float = 0, head: bool = True, layers: int | None = None
) -> StepFlops:
    """Count the operations of a model that trains.

    Args:
        model: with its adapters.
        layout: of its experts; None for a dense model.
        references: additional forward passes in a step, without the adapter.
        head: whether the output head runs.
        layers: decoder layers that run, from the first; None: all.
    """
    base = without_adapters(model)
    path, blocks = decoder_layers(model)
    count = len(blocks) if layers is None else layers
    matrices = [one for one in _matrices(base, layout, path, len(blocks)) if one.layer < count or one.is_head * head]
    looked_up = base.get_input_embeddings().weight.requires_grad
    lowest = 0 if looked_up else min((one.layer for one in matrices if one.trains), default=len(blocks) + 1)
    forward = sum(2 * one.active for one in matrices)
    above = sum(2 * one.active for one in matrices if one.layer >= lowest)
    own = sum(2 * one.active for one in matrices if one.trains)
    frozen = sum(2 * one.active for one in matrices if not one.lora)
    config = text_config(model)
    heads = int(config.num_attention_heads)
    width = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    keys = int(getattr(config, "qk_head_dim", None) or width)
    values = int(getattr(config, "v_head_dim", None) or width)
    share_above = max(count - lowest, 0) / max(count, 1)
    return StepFlops(
        a_token=forward + above + own + references * frozen,
        a_pair=2 * heads * (keys + values) * (1 + 2 * share_above + references),
        windows=_windows(config, count),
    )


@dataclass(frozen=True)
class _Matrix:
    layer: int  # the head's: as many as there are layers
    active: float
    trains: bool
    lora: bool
    is_head: bool = False


def _matrices(base: PreTrainedModel, layout: ExpertLayout | None, path: str, layers: int) -> list[_Matrix]:
    head, found = base.get_output_embeddings(), list[_Matrix]()
    of_head: set[int] = set()
    if head is not None:  # a classifier has none
        found.append(_Matrix(layers, head.weight.numel(), head.weight.requires_grad, lora=False, is_head=True))
        of_head = {id(parameter) for name, parameter in head.named_parameters() if "lora_" in name}
    held = pieces(base, layout)  # number of processes that share the experts
    for name, parameter in base.named_parameters():
        lora, within = "lora_" in name, re.match(rf"{re.escape(path)}\.(\d+)\.(.*)", name)
        if id(parameter) in of_head:
            found.append(_Matrix(layers, parameter.numel(), parameter.requires_grad, lora, is_head=True))
        if within is None or parameter.ndim < 2 or name.endswith("bias"):
            continue
        experts = layout is not None and f"{within[2]}.".startswith(f"{layout.experts_path}.")
        share = held * layout.top_k / layout.num_experts if layout is not None and experts else 1.0
        found.append(_Matrix(int(within[1]), parameter.numel() * share, parameter.requires_grad, lora))
    return found


def _windows(config: PreTrainedConfig, layers: int) -> tuple[int | None, ...]:
    """The windows of layers with softmax attention; other layers have no pairs."""
    kinds = list(getattr(config, "layer_types", None) or ["full_attention"] * layers)[:layers]
    width = getattr(config, "sliding_window", None)
    everywhere = None if getattr(config, "layer_types", None) else width
    known: dict[str, int | None] = {
        "full_attention": everywhere,
        "attention": None,
        "sliding_attention": width,
        "chunked_attention": getattr(
            config, "attention_chunk_size", None
        ),  # as if chunks were sliding windows: slightly too many
    }
    return tuple(known[kind] for kind in kinds if kind in known)


def _pairs(length: int, window: int | None) -> int:
    """The number of pairs (token, token that it sees), itself included.

    >>> _pairs(4, None), _pairs(4, 2)
    (10, 7)
    """
    seen = length if window is None else min(length, window)
    return seen * (seen + 1) // 2 + (length - seen) * seen


def lengths_of(batch: Mapping[str, Tensor]) -> list[int]:
    """The number of tokens in each row of a micro-batch, packed or not, without padding."""
    mask = batch.get("attention_mask")
    if mask is not None:
        return [int(length) for length in mask.sum(dim=1).tolist()]
    positions = batch["position_ids"].reshape(-1)
    begins = [*torch.nonzero(positions == 0).reshape(-1).tolist(), positions.numel()]
    return [end - begin for begin, end in pairwise(begins)]
