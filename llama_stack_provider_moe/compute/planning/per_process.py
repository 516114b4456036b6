"""What one process of a job holds of a model under each strategy, counted weight by weight.

    ddp     everything. torch's reducer averages gradients in buckets, which it keeps in addition to the gradients
    fsdp    of each weight of the base a share of the rows, ceil(rows / processes) (FSDP2 pads the last share).
            A layer that runs is gathered whole, and meanwhile the next one arrives: two layers at once. If the base
            trains, a layer's whole gradients exist a second time in the buffer that is sent; and if it computes in
            bf16, weights, gradients and moments are held in fp32 (`wide`). Adapters are whole, as in ddp, but averaged
            one gradient at a time, without buckets
    ep      of the routed experts, and their adapters, num_experts / processes; everything else as in ddp. Tokens are
            sent to the processes that hold their experts, and back: at most min(top_k, processes) rows a token

Source for what FSDP2 holds at once: `FSDPParamGroup` of torch 2.15 (`torch/distributed/fsdp/_fully_shard`); the test
`tests/compute/planning/test_planner_measured.py` compares with a measurement.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

from llama_stack_provider_moe.compute.moe.backend import code_of
from llama_stack_provider_moe.compute.moe.codes import Code
from llama_stack_provider_moe.compute.moe.layout import decoder_layers, text_config, without_adapters
from llama_stack_provider_moe.compute.moe.offload import BUFFERS
from llama_stack_provider_moe.compute.moe.quantize import CodedLinear
from llama_stack_provider_moe.compute.planning.dry_run import DryRun
from llama_stack_provider_moe.compute.planning.meta_model import MetaModel
from llama_stack_provider_moe.compute.planning.optimizer_memory import is_paged, state_bytes, step_bytes
from llama_stack_provider_moe.spec import Optimizer

Way = Literal["ddp", "fsdp", "ep"]
Kind = Literal["expert", "layer", "embedding", "head", "buffer"]


@dataclass(frozen=True)
class Weight:
    """A weight, a buffer, or the code of a quantised weight.

    Attributes:
        layer: number of its decoder layer; None: outside the layers.
        rows: size of its first dimension.
        bytes: of the whole weight.
        added: by an adapter.
        numbers: in it; 0: not counted, because it does not train.
        looked_up: it is an embedding's, also where the head shares it.
        coded: it is the code of a layer's experts, which can be offloaded.
    """

    kind: Kind
    layer: int | None
    rows: int
    bytes: int
    trains: bool
    added: bool
    numbers: int = 0
    looked_up: bool = False
    coded: bool = False

    def of_one(self, way: Way, processes: int, wide: bool = False) -> int:
        """Bytes that one of several processes holds.

        >>> Weight("expert", 0, 6, 600, trains=False, added=False).of_one("fsdp", 4)
        200
        """
        if way == "fsdp" and not self.added and self.rows and self.kind != "buffer":
            return -(-self.rows // processes) * (self.bytes // self.rows) * (2 if wide else 1)
        if way == "ep" and self.kind == "expert":
            return self.bytes // processes
        return self.bytes


def weights_of(adapted: MetaModel) -> tuple[Weight, ...]:
    """All weights of a model, before a dry run replaces them by fake ones; a storage counts once."""
    path, _ = decoder_layers(adapted.model)
    return tuple(_weights(adapted, re.compile(rf"(?:^|\.){re.escape(path)}\.(\d+)\.(.*)")))


def _weights(adapted: MetaModel, in_layer: re.Pattern[str]) -> Iterator[Weight]:
    base = without_adapters(adapted.model)
    experts = None if adapted.layout is None else f"{adapted.layout.experts_path}."
    head = base.get_output_embeddings()
    of_head = {id(head.weight)} if head is not None else set()
    looked_up = id(base.get_input_embeddings().weight)

    def kind(name: str, tensor: Tensor) -> tuple[Kind, int | None]:
        if within := in_layer.search(name.replace(".base_layer", "")):
            is_expert = experts is not None and f"{within[2]}.".startswith(experts)
            return ("expert" if is_expert else "layer"), int(within[1])
        # A head that shares its weight with the embeddings is gathered like a head.
        return ("embedding" if id(tensor) == looked_up and looked_up not in of_head else "head"), None

    seen: set[int] = set()
    for name, weight in base.named_parameters():
        storage = weight.untyped_storage()
        if storage._cdata not in seen:
            seen.add(storage._cdata)
            rows = (
                weight.shape[0] if weight.ndim and storage.nbytes() >= weight.nbytes else 0
            )  # otherwise it is a placeholder
            trains = weight.requires_grad
            yield Weight(
                *kind(name, weight), rows, storage.nbytes(), trains, "lora_" in name,
                weight.numel() if trains else 0, id(weight) == looked_up,
            )  # fmt: skip
    for _, buffer in base.named_buffers():
        storage = buffer.untyped_storage()
        if storage._cdata not in seen:
            seen.add(storage._cdata)
            yield Weight("buffer", None, 0, storage.nbytes(), trains=False, added=False)
    for name, module in base.named_modules():
        if isinstance(module, CodedLinear):
            within = in_layer.search(name.replace(".base_layer", ""))
            yield Weight("layer", int(within[1]) if within else None, 0, module.code.nbytes, trains=False, added=False)
    layout = adapted.layout
    for layer, module in {} if layout is None else layout.experts(adapted.model).items():
        for name, _ in module.named_parameters(recurse=False):
            if isinstance(code := code_of(module, name), Code):
                yield Weight("expert", layer, 0, code.nbytes, trains=False, added=False, coded=True)


@dataclass(frozen=True)
class ProcessMemory:
    """Bytes in one process: all the time, except `gradients`, which are complete at the end of backward.

    Attributes:
        weights: the base, and its frozen copy if it also serves as the reference.
        optimizer: what a GPU can't lend to the machine of the optimiser's state.
        step: that the optimiser's step takes on a GPU, and on a CPU.
        lent: of the optimiser's state that CUDA may keep in the machine's memory.
        offloaded: experts' codes in the machine's memory, beside `weights`.
    """

    weights: int
    adapter: int
    gradients: int
    optimizer: int
    buckets: int
    step: tuple[int, int]
    lent: int = 0
    offloaded: int = 0

    @property
    def certain(self) -> int:
        """The bytes that a step needs whatever its batch."""
        return self.weights + self.adapter + self.gradients + self.optimizer + self.buckets


def process_memory(
    weights: Iterable[Weight],
    way: Way,
    processes: int,
    optimizer: Optimizer,
    references: int = 0,
    wide: bool = False,
) -> ProcessMemory:
    """What one process holds.

    Args:
        weights: of the model.
        way: the strategy.
        processes: that train together.
        optimizer: the job's.
        references: frozen copies of the base.
        wide: weights that are divided by rows take twice their bytes; references do not.
    """
    each = [(weight, weight.of_one(way, processes, wide)) for weight in weights]
    base = sum(size for weight, size in each if not weight.added)
    copy = sum(weight.of_one(way, processes) for weight, _ in each if not weight.added)
    trained = [(weight, size) for weight, size in each if weight.trains]
    gradients = sum(size for _, size in trained)
    states = [
        (is_paged(optimizer, weight.numbers), state_bytes(optimizer, weight.numbers, size, weight.looked_up))
        for weight, size in trained
    ]
    averaged = (size for weight, size in trained if _in_buckets(weight, way))
    return ProcessMemory(
        weights=base + copy * references,
        adapter=sum(size for weight, size in each if weight.added),
        gradients=gradients,
        optimizer=sum(size for paged, size in states if not paged),
        buckets=sum(averaged) if processes > 1 else 0,
        step=(_step(trained, optimizer, on_gpu=True), _step(trained, optimizer, on_gpu=False)),
        lent=sum(size for paged, size in states if paged),
    )


def _step(trained: list[tuple[Weight, int]], optimizer: Optimizer, on_gpu: bool) -> int:
    steps = (step_bytes(optimizer, weight.numbers, size, weight.looked_up, on_gpu) for weight, size in trained)
    return max(steps, default=0)


def _in_buckets(weight: Weight, way: Way) -> bool:
    if way == "fsdp":  # transformers 5.23 averages weights that are not divided itself, each gradient in place
        return False
    return way != "ep" or weight.kind != "expert"


def offloaded_bytes(weights: Iterable[Weight]) -> tuple[int, int]:
    """Bytes of experts that are offloaded: in main memory, and of the buffers on the device; (0, 0): none can be."""
    layers: dict[int | None, int] = {}
    for weight in weights:
        if weight.coded:
            layers[weight.layer] = layers.get(weight.layer, 0) + weight.bytes
    return sum(layers.values()), min(BUFFERS, len(layers)) * max(layers.values(), default=0)


def with_offloaded(held: ProcessMemory, weights: Iterable[Weight], on_gpu: bool) -> ProcessMemory:
    """What a process holds if its experts are offloaded; on a CPU both places are main memory."""
    host, device = offloaded_bytes(weights)
    if not on_gpu:
        return replace(held, weights=held.weights + device)
    return replace(held, weights=held.weights - host + device, offloaded=host)


@dataclass(frozen=True)
class TransientMemory:
    """Bytes that a strategy needs at one kind of moment, and a single process would not.

    Attributes:
        layer: while a decoder layer runs.
        reducing: in addition, while its backward runs.
        head: while the output head runs.
        ahead: in addition, while its backward runs, because the last layer is fetched already.
    """

    layer: int = 0
    reducing: int = 0
    head: int = 0
    ahead: int = 0


NOTHING = TransientMemory()


def transient_memory(
    adapted: MetaModel, weights: tuple[Weight, ...], way: Way, processes: int, tokens: int, wide: bool = False
) -> TransientMemory:
    """The bytes that a strategy needs only at times.

    Args:
        adapted: the model.
        weights: of the model.
        way: the strategy.
        processes: that train together.
        tokens: in a micro-batch of one process, padding included.
        wide: gradients are sent in twice their bytes.
    """
    if processes == 1 or way == "ddp":
        return NOTHING
    if way == "ep":
        layout = adapted.layout
        if layout is None:
            return NOTHING
        config = text_config(adapted.model)
        sent = tokens * min(layout.top_k, processes) * config.hidden_size * adapted.model.dtype.itemsize
        return TransientMemory(layer=2 * sent, reducing=2 * sent)
    base = [weight for weight in weights if not weight.added and weight.kind != "buffer"]
    layers = [sum(weight.bytes for weight in base if weight.layer == number) for number in _numbers(base)]
    trained = [sum(weight.bytes for weight in base if weight.layer == number and weight.trains)
               for number in _numbers(base)]  # fmt: skip
    head = sum(weight.bytes for weight in base if weight.kind == "head")
    return TransientMemory(
        layer=2 * max(layers), reducing=max(trained) * (2 if wide else 1), head=head, ahead=layers[-1]
    )


def _numbers(weights: Iterable[Weight]) -> list[int]:
    return sorted({weight.layer for weight in weights if weight.layer is not None})


def share_of_run(run: DryRun, weights: tuple[Weight, ...], way: Way, processes: int, wide: bool = False) -> DryRun:
    """The dry run of a single process, with the gradients that one of several processes holds.

    Args:
        run: of a single process.
        weights: of the model.
        way: the strategy.
        processes: that train together.
        wide: weights that are divided by rows take twice their bytes.
    """
    if processes == 1 or way == "ddp":
        return run
    layers = []
    for number, layer in enumerate(run.layers):
        mine = [weight for weight in weights if weight.layer == number and weight.trains]
        whole, kept = sum(weight.bytes for weight in mine), sum(weight.of_one(way, processes, wide) for weight in mine)
        # Under FSDP a layer's backward makes all of its gradients; under EP a process never has those of other experts.
        never = whole - kept if way == "ep" else 0
        layers.append(replace(layer, gradients=layer.gradients - (whole - kept), backward=layer.backward - never))
    of_ends = [weight for weight in weights if weight.layer is None and weight.trains]
    less = sum(weight.bytes - weight.of_one(way, processes, wide) for weight in of_ends)
    return replace(run, layers=tuple(layers), ends=replace(run.ends, gradients=run.ends.gradients - less))
