"""A frozen base in 4 or 8 bits: the experts, which other tools skip, and the linear layers beside them.

QLoRA (Dettmers et al. 2023, arXiv 2305.14314): the base is stored as NF4 (or 8-bit dynamic) numbers in blocks with one
scale each, decoded for each product and again in backward, and never kept decoded (`codes`).

transformers 5.23 quantises linear layers, and its experts are not linear layers: `load_in_4bit` skips them silently.
Here each fused parameter is replaced by a code, and by a placeholder of the same shape that is all NaN and takes no
memory: whatever reads the weight without its code makes the first loss NaN.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from llama_stack_provider_moe.compute.moe.backend import code_of, drop_codes, keep_code
from llama_stack_provider_moe.compute.moe.codes import Bits, Code, Coding
from llama_stack_provider_moe.compute.moe.layout import ExpertLayout, decoder_layers, join, without_adapters
from llama_stack_provider_moe.compute.moe.offload import OffloadReport, Streamed
from llama_stack_provider_moe.errors import ModelError
from llama_stack_provider_moe.ground import liveness

_ATTENTION = "self_attn"  # not linear attention, whose fused kernels read the weights directly
_DENSE_MLP = "mlp"


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
    """What was quantised: counts of matrices, and bytes of all weights and buffers of the model.

    Attributes:
        nested: the scales are quantised too.
        bits_a_weight: of what is quantised, with its scales; None: not known.
        offloaded: where the experts are; None: on the device, with all else.
    """

    bits: Bits
    nested: bool
    experts: int
    linear_layers: int
    bytes_before: int
    bytes_after: int
    bits_a_weight: float | None = None
    offloaded: OffloadReport | None = None

    def text(self) -> str:
        """The report as one line for the start of a job's log."""
        each = "" if self.bits_a_weight is None else f" at {self.bits_a_weight:.3f} bits a weight"
        return (
            f"{Coding(self.bits, self.nested).text()}: {self.experts:,} expert matrices and {self.linear_layers:,} "
            f"linear layers{each}; the model takes {self.bytes_after / 2**20:,.1f} MiB, "
            f"{self.bytes_before / 2**20:,.1f} MiB before"
        )

    def lines(self) -> list[str]:
        """The report with where the experts are."""
        return [self.text()] if self.offloaded is None else [self.text(), self.offloaded.text()]

    def as_json(self) -> dict[str, object]:
        """The report for `resolved.json`."""
        return asdict(self)


class Quantizable(NamedTuple):
    """A weight that gets quantised: parameter `name` of `module`.

    Attributes:
        transposed: it is stored as (E, I, O).
        parent: of a linear layer; None: the weight is that of experts.
        child: name of the linear layer in `parent`.
    """

    module: nn.Module
    name: str
    transposed: bool = False
    parent: nn.Module | None = None
    child: str = ""

    def encoded(self, weight: Tensor, coding: Coding) -> Code:
        """The code of the weight."""
        if self.parent is not None:
            return Code(weight.unsqueeze(0), coding)
        return Code(weight.transpose(1, 2) if self.transposed else weight, coding)


def quantizable(model: nn.Module, layout: ExpertLayout | None) -> dict[str, Quantizable]:
    """All weights that get quantised, by their full names: those of experts, then those of linear layers.

    Args:
        model: the model, perhaps on the meta device.
        layout: where its experts are; None: a dense model, linear layers only.
    """
    found = {} if layout is None else {
        layout.path(layer, f"{layout.experts_path}.{name}"): Quantizable(module, name, layout.transposed)
        for layer, module in layout.experts(model).items() for name in (layout.gate_up, layout.down)
    }  # fmt: skip
    names = {id(module): name for name, module in model.named_modules()}
    for parent, child, linear in linear_layers(model, layout):
        found[f"{names[id(linear)]}.weight"] = Quantizable(linear, "weight", False, parent, child)
    return found


def quantize(
    model: nn.Module,
    layout: ExpertLayout | None,
    coding: Coding,
    device: torch.device,
    field: str = "adapter.quantize_base",
    codes: Mapping[str, Code] | None = None,
) -> QuantizeReport:
    """Quantise a loaded model and move it to `device`.

    At most one fused parameter at a time is on the device in its original dtype; all other weights follow at the end.

    Args:
        model: the model; weights that have no code yet may be on the CPU.
        layout: where its experts are; None: a dense model, linear layers only.
        coding: bits of the codes and of their scales.
        device: where the model goes.
        field: the setting that asks for it, for errors.
        codes: those that were made while the weights were read, by the full names of the weights.

    Raises:
        ModelError: a weight that should be quantised is not.
    """
    weights = quantizable(model, layout)
    of_experts = {name: each for name, each in weights.items() if each.parent is None}
    of_linear = {name: each for name, each in weights.items() if each.parent is not None}
    made: list[Code] = []

    def code_for(name: str, each: Quantizable) -> Code:
        read = (codes or {}).get(name)
        if read is None:
            read = each.encoded(each.module.get_parameter(each.name).detach().to(device), coding)
        made.append(read)
        return read

    for name, each in liveness.counted("quantising experts", of_experts.items(), len(of_experts), "weights"):
        keep_code(each.module, each.name, code_for(name, each))
        setattr(each.module, each.name, placeholder(each.module.get_parameter(each.name)))
    experts = sum(code.shape[0] for code in made)
    for name, each in liveness.counted("quantising linear layers", of_linear.items(), len(of_linear), "layers"):
        assert isinstance(each.module, nn.Linear)
        setattr(each.parent, each.child, CodedLinear(each.module, code_for(name, each)))
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.device != device:
            tensor.data = tensor.data.to(device)
    after, coded = resident_bytes(model), sum(code.nbytes for code in made)
    numbers = sum(math.prod(code.shape) for code in made)
    holes = sum(code.dtype.itemsize for code in made)  # a placeholder has one number
    before = after - coded - holes + sum(math.prod(code.shape) * code.dtype.itemsize for code in made)
    report = QuantizeReport(
        coding.bits, coding.nested, experts, len(of_linear), before, after, 8 * coded / max(1, numbers)
    )
    _check(model, layout, report, field)
    return report


@dataclass(frozen=True)
class MergeMemory:
    """Bytes that a quantised model takes, beside what it holds, while it is decoded and its adapter is merged.

    Attributes:
        codes: of all codes, which are dropped one after the other.
        decoded: of all weights that have codes, in their first dtype.
        merging: of the largest of them: its copy, and in fp32 B A before and after it is scaled.
    """

    codes: int
    decoded: int
    merging: int

    @property
    def total(self) -> int:
        """At most; the codes are not subtracted."""
        return self.decoded + self.merging


def merge_memory(model: nn.Module) -> MergeMemory:
    """What `dequantize` and a merge by PEFT take; also for a model on the meta device."""
    codes = list(_codes(without_adapters(model)))
    numbers = [(math.prod(code.shape), code.dtype.itemsize) for code in codes]
    fp32 = torch.float32.itemsize
    return MergeMemory(
        sum(code.nbytes for code in codes),
        sum(count * size for count, size in numbers),
        max((count * (size + 2 * fp32) for count, size in numbers), default=0),
    )


def decoded_on(model: nn.Module, room_bytes: float) -> torch.device:
    """Where `dequantize` puts the model."""
    base = without_adapters(model)
    streamed = any(isinstance(code, Streamed) for code in _codes(base))
    if streamed or merge_memory(model).total > room_bytes:
        return torch.device("cpu")
    found: torch.device = base.get_input_embeddings().weight.device
    return found


def dequantize(model: nn.Module, layout: ExpertLayout | None, room_bytes: float = math.inf) -> None:
    """Replace the codes of a quantised model by plain weights in their first dtype; a plain model does not change.

    A model whose experts are offloaded, or that would take more than `room_bytes` (`merge_memory`), goes to main
    memory.

    Args:
        model: with codes, and with or without an adapter.
        layout: where its experts are; None: a dense model.
        room_bytes: free memory of its device.
    """
    base, device = without_adapters(model), decoded_on(model, room_bytes)
    modules = (layout.experts(model) if layout is not None else {}).values()
    for module in liveness.counted("decoding the base", modules, len(modules), "layers"):
        for name in (layout.gate_up, layout.down) if layout is not None else ():
            if isinstance(code := code_of(module, name), Code | Streamed):
                weight = code.whole().to(device)
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
        setattr(parent, name, layer.decoded().to(device))
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.data = tensor.data.to(device)


def resident_bytes(model: nn.Module) -> int:
    """Bytes of all weights, buffers and codes, on the device and offloaded; a placeholder counts as one number."""
    base = without_adapters(model)
    tensors = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
               for tensor in [*base.parameters(), *base.buffers()]}  # fmt: skip
    codes = list(_codes(base))
    buffers = {code.stream: code.stream.device_bytes for code in codes if isinstance(code, Streamed)}
    return int(sum(tensors.values())) + sum(code.nbytes for code in codes) + sum(buffers.values())


def spare_ddp(model: nn.Module) -> None:
    """Make DistributedDataParallel ignore placeholders: it would write to them to synchronise the processes."""
    names = [name for name, parameter in model.named_parameters() if _is_placeholder(parameter)]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)  # type: ignore[no-untyped-call]


def _is_placeholder(parameter: Tensor) -> bool:
    # All numbers are one, so that no more needs to be looked at.
    return parameter.numel() > 1 and not any(parameter.stride()) and bool(parameter.flatten()[0].isnan())


def _codes(base: nn.Module) -> Iterator[Code | Streamed]:
    for module in base.modules():
        if isinstance(module, CodedLinear):
            yield module.code
        for name, _ in module.named_parameters(recurse=False):
            if isinstance(code := code_of(module, name), Code | Streamed):
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
    left = [
        name for name, each in quantizable(model, layout).items()
        if each.parent is not None  # a linear layer that is still plain
        or code_of(each.module, each.name) is None or not _is_placeholder(each.module.get_parameter(each.name))
    ]  # fmt: skip
    if report.experts != wanted or left:
        raise ModelError(f"{field}: {report.experts} of {wanted} expert matrices are quantised; these are not: {left}")
    if not report.experts and not report.linear_layers:
        raise ModelError(f"{field}: is not valid for this model: it has no weight that is quantised here (experts, "
                         "attention, dense MLPs)")  # fmt: skip
