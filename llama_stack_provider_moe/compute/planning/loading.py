"""What main memory and the device hold at most while the weights of a quantised base are read.

transformers reads one weight of the model at a time; each gets its code before the next is read
(`compute.models.quantized_loading`). On top of all codes and all weights that stay in 16 bits:

    joining    the largest weight of experts: its tensors on disk and the stack of them, so twice its bytes in 16 bits
               if a file has a tensor for each expert, else once
    encoding   on a CPU 30 bytes for each of the 2**20 numbers that are encoded at once

On a GPU all of this is on the device, and main memory holds one tensor of the files at a time. Codes of experts
that are offloaded go to main memory when they are made.
"""

from dataclasses import dataclass

from llama_stack_provider_moe.compute.moe.offload import BUFFERS
from llama_stack_provider_moe.compute.moe.on_disk import names_on_disk
from llama_stack_provider_moe.compute.planning.dry_run import Device
from llama_stack_provider_moe.compute.planning.meta_model import MetaModel

ENCODING = 30 * 2**20


@dataclass(frozen=True)
class LoadingMemory:
    """Bytes while the weights are read: of main memory, and of a GPU (0: the job runs on the CPU)."""

    host_bytes: int
    device_bytes: int


def loading_memory(adapted: MetaModel, device: Device, offloaded: tuple[int, int] = (0, 0)) -> LoadingMemory:
    """The estimate for a model whose base is quantised.

    Args:
        adapted: the model on the meta device; its placeholders have the shapes of the weights.
        device: where the job runs.
        offloaded: bytes of experts that are offloaded (`per_process.offloaded_bytes`); zeros: none are.
    """
    joined, largest = 0, 0
    layout, model = adapted.layout, adapted.model
    for name, weight in model.named_parameters():
        if "lora_" not in name and (layout is None or f".{layout.experts_path}." not in f".{name}"):
            largest = max(largest, weight.numel() * weight.dtype.itemsize)
    if layout is not None:
        on_disk = names_on_disk(model, layout)
        experts = layout.experts(model)[layout.moe_layers[-1]]
        for name in (layout.gate_up, layout.down):
            weight = experts.get_parameter(name)
            size = weight.numel() * weight.dtype.itemsize
            parts = on_disk[f"{layout.experts_path}.{name}"]
            each = any("{expert}" in part for part in parts)
            joined = max(joined, 2 * size if each or len(parts) > 1 else size)
            largest = max(largest, size // (len(parts) * (weight.shape[0] if each else 1)))
    scratch, (host, buffers) = joined + ENCODING, offloaded
    # Once all codes are made, those of a layer at a time are copied into an image; then the buffers are made.
    layer = buffers // BUFFERS
    if device == "cpu":
        return LoadingMemory(adapted.weight_bytes + max(scratch, layer, buffers), 0)
    return LoadingMemory(host + max(layer, largest), adapted.weight_bytes - host + max(scratch, buffers))
