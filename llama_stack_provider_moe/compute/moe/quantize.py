"""A frozen base in 4 or 8 bits: the experts, which other tools skip, and the linear layers beside them.

QLoRA (Dettmers et al. 2023, arXiv 2305.14314): the base is stored as NF4 (or 8-bit dynamic) numbers in blocks with one
scale each, decoded for each product and again in backward, and never kept decoded. bitsandbytes provides the codec.

transformers 5.23 quantises linear layers, and its experts are not linear layers: `load_in_4bit` skips them silently.
Here each fused parameter is replaced by a code, and by a placeholder of the same shape that is all NaN and takes no
memory: whatever reads the weight without its code makes the first loss NaN.
"""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Literal, Protocol

import bitsandbytes.functional as codec
import torch
import torch.nn.functional as F
from bitsandbytes.functional import QuantState
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from llama_stack_provider_moe.compute.moe.backend import code_of, drop_codes, keep_code
from llama_stack_provider_moe.compute.moe.layout import ExpertLayout, decoder_layers, join, without_adapters
from llama_stack_provider_moe.errors import ModelError
from llama_stack_provider_moe.ground import liveness

Bits = Literal[4, 8]
BLOCKS: dict[Bits, int] = {4: 64, 8: 256}  # numbers that share a scale; the codec's usual sizes
_MOST_NUMBERS = 2**30  # per code; the codec's kernels count in 32 bits
_ATTENTION = "self_attn"  # not linear attention, whose fused kernels read the weights directly
_DENSE_MLP = "mlp"


class Code:
    """Matrices (E, O, I) in `bits` per number with one scale per block; a `Stored` for the ragged products.

    One code holds as many experts as possible, so that a GPU decodes them in one launch.
    """

    def __init__(self, weight_EOI: Tensor, bits: Bits) -> None:
        self.dtype, self.shape = weight_EOI.dtype, tuple(weight_EOI.shape)
        self._bits: Bits = bits
        self._numbers = math.prod(self.shape[1:])
        # A block across two experts would tie their scales together and could not be split.
        blocks, rest = divmod(self._numbers, BLOCKS[bits])
        self._blocks = blocks
        self._together = 1 if rest else max(1, _MOST_NUMBERS // self._numbers)
        self._parts = [
            _encode(weight_EOI[first : first + self._together].contiguous(), bits)
            for first in range(0, self.shape[0], self._together)
        ]

    @property
    def nbytes(self) -> int:
        """Bytes of numbers and scales."""
        return sum(packed.nbytes + state.absmax.nbytes for packed, state in self._parts)

    def expert(self, number: int) -> Tensor:
        """(O, I), decoded."""
        part, place = divmod(number, self._together)
        packed, state = self._parts[part]
        if self._together > 1:
            flat = packed.flatten()
            size = self._numbers * self._bits // 8
            packed = flat[place * size : (place + 1) * size].unsqueeze(-1)
            state = QuantState(
                state.absmax[place * self._blocks : (place + 1) * self._blocks],
                (self._numbers,), state.code, state.blocksize, state.quant_type, state.dtype,
            )  # fmt: skip
        return self._decode(packed, state).view(self.shape[1:])

    def whole(self) -> Tensor:
        """(E, O, I), decoded."""
        decoded = [self._decode(packed, state) for packed, state in self._parts]
        return (decoded[0] if len(decoded) == 1 else torch.cat(decoded)).view(self.shape)

    def _decode(self, packed: Tensor, state: QuantState) -> Tensor:
        decode = codec.dequantize_4bit if self._bits == 4 else codec.dequantize_blockwise
        numbers: Tensor = decode(packed, state)
        return numbers.flatten()


def _encode(matrix: Tensor, bits: Bits) -> tuple[Tensor, QuantState]:
    # Flat: on a CPU bitsandbytes 0.50 decodes a matrix row by row, and silently wrong if the row length is not a
    # multiple of the block size.
    matrix = matrix.flatten()
    encoded: tuple[Tensor, QuantState] = (
        codec.quantize_4bit(matrix, blocksize=BLOCKS[4], quant_type="nf4")
        if bits == 4
        else codec.quantize_blockwise(matrix, blocksize=BLOCKS[8])
    )
    return encoded


class CodedLinear(nn.Linear):
    """A frozen linear layer whose weight is a code."""

    def __init__(self, linear: nn.Linear, code: Code) -> None:
        nn.Module.__init__(self)  # not `Linear.__init__`, which would allocate the weight
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight = placeholder(linear.weight)
        self.bias = linear.bias
        self.code = code

    def forward(self, input: Tensor) -> Tensor:
        """The forward of a linear layer."""
        out: Tensor = _CodedProduct.apply(input.to(self.code.dtype), self.code)
        return out if self.bias is None else out + self.bias

    def decoded(self) -> nn.Linear:
        """A plain linear layer with the decoded weight."""
        weight = self.code.expert(0)
        plain = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        plain.weight = nn.Parameter(weight, requires_grad=False)
        plain.bias = self.bias
        return plain


class _Context(Protocol):
    code: Code


class _CodedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _Context, rows: Tensor, code: Code) -> Tensor:
        ctx.code = code
        return F.linear(rows, code.expert(0))

    @staticmethod
    def backward(ctx: _Context, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0].to(ctx.code.dtype) @ ctx.code.expert(0), None


@dataclass(frozen=True)
class QuantizeReport:
    """What was quantised: counts of matrices, and bytes of all weights and buffers of the model."""

    bits: Bits
    experts: int
    linear_layers: int
    bytes_before: int
    bytes_after: int

    def text(self) -> str:
        """The report as one line for the start of a job's log."""
        kind = "NF4" if self.bits == 4 else "8-bit"
        return (
            f"{kind}: {self.experts:,} expert matrices and {self.linear_layers:,} linear layers; the model takes "
            f"{self.bytes_after / 2**20:,.1f} MiB, {self.bytes_before / 2**20:,.1f} MiB before"
        )

    def as_json(self) -> dict[str, object]:
        """The report for `resolved.json`."""
        return asdict(self)


def quantize(
    model: nn.Module,
    layout: ExpertLayout | None,
    bits: Bits,
    device: torch.device,
    field: str = "adapter.quantize_base",
) -> QuantizeReport:
    """Quantise a model that was loaded on the CPU and move it to `device`.

    At most one fused parameter at a time is on the device in its original dtype; all other weights follow at the end.

    Args:
        model: the model, on the CPU.
        layout: where its experts are; None: a dense model, linear layers only.
        bits: 4 (NF4) or 8.
        device: where the model goes.
        field: the setting that asks for it, for errors.

    Raises:
        ModelError: a weight that should be quantised is not.
    """
    before = resident_bytes(model)
    experts = 0
    if layout is not None:
        modules = layout.experts(model).values()
        for module in liveness.counted("quantising experts", modules, len(modules), "layers"):
            for name in (layout.gate_up, layout.down):
                liveness.alive()
                weight = module.get_parameter(name).detach().to(device)
                code = Code(weight.transpose(1, 2) if layout.transposed else weight, bits)
                keep_code(module, name, code)
                setattr(module, name, placeholder(weight))
                experts += code.shape[0]
                del weight
    linear = 0
    plain = linear_layers(model, layout)
    for parent, name, layer in liveness.counted("quantising linear layers", plain, len(plain), "layers"):
        code = Code(layer.weight.detach().to(device).unsqueeze(0), bits)
        setattr(parent, name, CodedLinear(layer, code))
        linear += 1
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.device != device:
            tensor.data = tensor.data.to(device)
    report = QuantizeReport(bits, experts, linear, before, resident_bytes(model))
    _check(model, layout, report, field)
    return report


def dequantize(model: nn.Module, layout: ExpertLayout | None) -> None:
    """Replace the codes of a quantised model by plain weights in their first dtype; a plain model does not change."""
    base = without_adapters(model)
    modules = (layout.experts(model) if layout is not None else {}).values()
    for module in liveness.counted("decoding the base", modules, len(modules), "layers"):
        for name in (layout.gate_up, layout.down) if layout is not None else ():
            if isinstance(code := code_of(module, name), Code):
                weight = code.whole()
                weight = weight.transpose(1, 2).contiguous() if layout is not None and layout.transposed else weight
                setattr(module, name, nn.Parameter(weight, requires_grad=False))
        drop_codes(module)
    coded = [
        (parent, name, module)
        for parent in base.modules()
        for name, module in parent.named_children()
        if isinstance(module, CodedLinear)
    ]
    for parent, name, layer in liveness.counted("decoding the base", coded, len(coded), "linear layers"):
        setattr(parent, name, layer.decoded())


def resident_bytes(model: nn.Module) -> int:
    """Bytes of all weights, buffers and codes; a placeholder counts as the one number that it holds."""
    base = without_adapters(model)
    tensors = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
               for tensor in [*base.parameters(), *base.buffers()]}  # fmt: skip
    return int(sum(tensors.values())) + sum(code.nbytes for code in _codes(base))


def spare_ddp(model: nn.Module) -> None:
    """Make DistributedDataParallel ignore placeholders: it would write to them to synchronise the processes."""
    names = [name for name, parameter in model.named_parameters() if _is_placeholder(parameter)]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)  # type: ignore[no-untyped-call]


def _is_placeholder(parameter: Tensor) -> bool:
    return parameter.numel() > 1 and not any(parameter.stride())


def _codes(base: nn.Module) -> Iterator[Code]:
    for module in base.modules():
        if isinstance(module, CodedLinear):
            yield module.code
        for name, _ in module.named_parameters(recurse=False):
            if isinstance(code := code_of(module, name), Code):
                yield code


def placeholder(weight: Tensor) -> nn.Parameter:
    """A parameter with the shape of `weight` that is all NaN and takes no memory."""
    nothing = torch.full((), torch.nan, dtype=weight.dtype, device=weight.device)
    return nn.Parameter(nothing.expand(weight.shape), requires_grad=False)


def linear_layers(model: nn.Module, layout: ExpertLayout | None) -> list[tuple[nn.Module, str, nn.Linear]]:
    """(parent, name, layer) of the linear layers that get quantised: those that are known to run as linear layers."""
    path, layers = decoder_layers(model)
    found = []
    for number, layer in enumerate(layers):
        below = {_ATTENTION}
        if layout is None:
            below.add(_DENSE_MLP)
        # If PEFT treats these as experts, it folds their LoRA into the weight, so the weight must exist.
        elif not layout.peft_renames_mlp:
            root = f"{path}.{number}."
            below |= {each.removeprefix(root) for each in layout.dense_mlps if each.startswith(root)}
            if layout.shared_path is not None and number in layout.moe_layers:
                below.add(layout.shared_path)
        for within, module in layer.named_modules():
            for name, child in module.named_children():
                whole = join(within, name)
                if type(child) is nn.Linear and any(whole.startswith(f"{root}.") for root in below):
                    found.append((module, name, child))
    return found


def _check(model: nn.Module, layout: ExpertLayout | None, report: QuantizeReport, field: str) -> None:
    wanted = 0 if layout is None else sum(
        module.get_parameter(name).shape[0] for module in layout.experts(model).values()
        for name in (layout.gate_up, layout.down)
    )  # fmt: skip
    left = [] if layout is None else [
        layout.path(layer, f"{layout.experts_path}.{name}")
        for layer, module in layout.experts(model).items() for name in (layout.gate_up, layout.down)
        if code_of(module, name) is None or not module.get_parameter(name).isnan().all()
    ]  # fmt: skip
    if report.experts != wanted or left:
        raise ModelError(f"{field}: {report.experts} of {wanted} expert matrices are quantised; these are not: {left}")
    if not report.experts and not report.linear_layers:
        raise ModelError(f"{field}: is not valid for this model: it has no weight that is quantised here (experts, "
                         "attention, dense MLPs)")  # fmt: skip
