"""Frozen experts in main memory: a device holds the codes of two layers, the one at work and the next.

The codes of a layer are one flat image in main memory, pinned where the device is a GPU. The device has two buffers of
the largest image's size. A code in a buffer is a set of views, made once, so what runs the experts sees an ordinary
stored weight (`kernels.reference.Stored`), whose numbers are there when it is decoded. Forward decodes a layer's
weights, and backward decodes them again, in the opposite order; so does a layer that checkpointing runs again.

When a layer is reached, the other buffer gets the layer after it in the same direction, where there is one. Where there
is none, it keeps the layer before, with which backward goes on. Whatever the order of the layers, the numbers are
right: a layer that was not expected is fetched when it is reached.

On a GPU the copies run in a stream of their own. A copy waits for what was launched before the layer was reached,
which includes all that read the buffer; what reads a layer waits for its copy. No GPU has run this.
"""

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from llama_stack_provider_moe.compute.moe.backend import code_of, keep_code
from llama_stack_provider_moe.compute.moe.codes import Code
from llama_stack_provider_moe.compute.moe.layout import ExpertLayout
from llama_stack_provider_moe.errors import ModelError
from llama_stack_provider_moe.ground import liveness
from llama_stack_provider_moe.ground.counting import number_of

BUFFERS = 2
ALIGNED = 256  # bytes; kernels read whole vectors from where a tensor begins
FIELD = "efficiency.offload_experts"


@dataclass(frozen=True)
class OffloadReport:
    """Bytes of the experts' codes: of all in main memory, and of the buffers on the device."""

    layers: int
    host_bytes: int
    device_bytes: int
    pinned: bool

    def text(self) -> str:
        """The report as one line for the start of a job's log."""
        kind = "pinned main memory" if self.pinned else "main memory"
        return (
            f"the experts of {number_of(self.layers, 'layer')} are in {kind}, {self.host_bytes / 2**20:,.1f} MiB; the "
            f"device holds {number_of(min(BUFFERS, self.layers), 'layer')} at a time, "
            f"{self.device_bytes / 2**20:,.1f} MiB"
        )


def image_bytes(sizes: Sequence[int]) -> int:
    """Bytes of an image of tensors of these sizes.

    >>> image_bytes([1, 256, 257])
    1024
    """
    return sum(-(-size // ALIGNED) * ALIGNED for size in sizes)


class _Layer(NamedTuple):
    image: Tensor  # in main memory
    codes: tuple[dict[str, Code], ...]  # by the parameter's name, in each buffer


class ExpertStream:
    """The codes of all layers' experts in main memory, and those of two layers on a device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._layers: list[_Layer] = []
        self._buffers: tuple[Tensor, ...] = ()
        self._held: list[int | None] = [None] * BUFFERS  # the layer in each buffer
        self._now = -1  # the layer that was reached last
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._copied: list[torch.cuda.Event | None] = [None] * BUFFERS
        self._pinned: list[Tensor] = []
        # Memory that is freed while it is pinned would stay so under its next owner.
        weakref.finalize(self, _unpin, self._pinned).atexit = False

    @property
    def resident(self) -> tuple[int, ...]:
        """The layers whose codes are on the device."""
        return tuple(layer for layer in self._held if layer is not None)

    @property
    def host_bytes(self) -> int:
        """Bytes in main memory."""
        return sum(layer.image.nbytes for layer in self._layers)

    @property
    def device_bytes(self) -> int:
        """Bytes of the buffers."""
        return sum(buffer.nbytes for buffer in self._buffers)

    def take(self, modules: Sequence[tuple[nn.Module, tuple[str, ...]]]) -> None:
        """Take the codes of layers, in the order in which they run, out of their modules.

        Args:
            modules: the experts of each layer, with the names of the quantised parameters.
        """
        images, made = list[Tensor](), list[dict[str, Code]]()
        for module, names in liveness.counted("offloading experts", modules, len(modules), "layers"):
            codes: dict[str, Code] = {}
            for name in names:
                code = code_of(module, name)
                assert isinstance(code, Code)
                codes[name] = code
                keep_code(module, name, Streamed(self, len(made), name, code))
            images.append(_image(codes))
            made.append(_tables(codes, self.device))
            if self._copies is not None:
                _pin(images[-1])
                self._pinned.append(images[-1])
        size = max(image.nbytes for image in images)
        count = min(BUFFERS, len(images))
        self._buffers = tuple(torch.empty(size, dtype=torch.uint8, device=self.device) for _ in range(count))
        self._layers = [
            _Layer(image, tuple(_inside(codes, buffer, self.device) for buffer in self._buffers))
            for image, codes in zip(images, made, strict=True)
        ]

    def code(self, layer: int, name: str) -> Code:
        """The code of a parameter on the device, ready for what the current stream launches next."""
        if layer != self._now:
            self._reach(layer)
        place = self._held.index(layer)
        copied = self._copied[place]
        if copied is not None:
            torch.cuda.current_stream(self.device).wait_event(copied)
        return self._layers[layer].codes[place][name]

    def _reach(self, layer: int) -> None:
        step = 1 if layer > self._now else -1
        self._now = layer
        free = None if self._copies is None else torch.cuda.current_stream(self.device).record_event()
        if layer not in self._held:
            # In a pass whose layers follow each other this happens at its first layer only.
            self._fetch(layer, self._held.index(None) if None in self._held[: len(self._buffers)] else 0, free)
        following = layer + step if 0 <= layer + step < len(self._layers) else layer - step
        if following not in self._held and 0 <= following < len(self._layers):
            self._fetch(following, 1 - self._held.index(layer), free)

    def _fetch(self, layer: int, place: int, free: torch.cuda.Event | None) -> None:
        image = self._layers[layer].image
        self._held[place] = layer
        into = self._buffers[place][: image.nbytes]
        if self._copies is None or free is None:
            into.copy_(image)
            return
        self._copies.wait_event(free)
        with torch.cuda.stream(self._copies):
            into.copy_(image, non_blocking=True)
            self._copied[place] = self._copies.record_event()


class Streamed:
    """Weights whose code is in an `ExpertStream`; a `Stored` for the ragged products."""

    def __init__(self, stream: ExpertStream, layer: int, name: str, code: Code) -> None:
        self.stream, self.layer = stream, layer
        self.dtype, self.shape, self.nbytes = code.dtype, code.shape, code.nbytes
        self._name = name

    def expert(self, number: int) -> Tensor:
        """(O, I), decoded."""
        return self.stream.code(self.layer, self._name).expert(number)

    def whole(self) -> Tensor:
        """(E, O, I), decoded."""
        return self.stream.code(self.layer, self._name).whole()


def offload_experts(model: nn.Module, layout: ExpertLayout | None, device: torch.device) -> OffloadReport:
    """Move the codes of a quantised model's experts to main memory.

    Args:
        model: its experts are quantised; their codes are on `device` or in main memory.
        layout: where its experts are; None: a dense model.
        device: where the model runs.

    Raises:
        ModelError: the model has no experts.
    """
    if layout is None:
        raise ModelError(f"{FIELD}: true is not valid for this model: it is dense; expected false")
    stream = ExpertStream(device)
    experts = layout.experts(model)
    stream.take([(experts[layer], (layout.gate_up, layout.down)) for layer in sorted(experts)])
    return OffloadReport(len(experts), stream.host_bytes, stream.device_bytes, pinned=device.type == "cuda")


def _pin(image: Tensor) -> None:
    """Pin memory where it is: torch's own pinned memory comes in powers of two, up to twice as much."""
    portable = 1
    torch.cuda.check_error(int(torch.cuda.cudart().cudaHostRegister(image.data_ptr(), image.nbytes, portable)))  # type: ignore[no-untyped-call]
    assert image.is_pinned(), "copies from pageable memory would make the device wait"


def _unpin(images: list[Tensor]) -> None:
    if images:
        torch.cuda.synchronize()  # a copy may still read
    for image in images:
        torch.cuda.check_error(int(torch.cuda.cudart().cudaHostUnregister(image.data_ptr())))  # type: ignore[no-untyped-call]


def _image(codes: dict[str, Code]) -> Tensor:
    """The flat image of a layer's codes, in main memory."""
    tensors = [tensor for code in codes.values() for tensor in code.tensors()]
    image = torch.empty(image_bytes([tensor.nbytes for tensor in tensors]), dtype=torch.uint8)
    for tensor, place in zip(tensors, _places(tensors, image), strict=True):
        place.copy_(tensor)
    return image


def _tables(codes: dict[str, Code], device: torch.device) -> dict[str, Code]:
    """The codes without numbers: tensors of the same shapes that take no memory, and tables on `device`."""
    return {
        name: code.placed([torch.empty_like(tensor, device="meta") for tensor in code.tensors()], device)
        for name, code in codes.items()
    }


def _inside(codes: dict[str, Code], buffer: Tensor, device: torch.device) -> dict[str, Code]:
    """The codes as views of a buffer that gets their image."""
    places = _places([tensor for code in codes.values() for tensor in code.tensors()], buffer)
    made = {}
    for name, code in codes.items():
        count = len(code.tensors())
        made[name] = code.placed(places[:count], device)
        places = places[count:]
    return made


def _places(tensors: Sequence[Tensor], flat: Tensor) -> list[Tensor]:
    """Views of a flat image, one for each tensor, of its dtype and shape."""
    found, begin = [], 0
    for tensor in tensors:
        found.append(flat[begin : begin + tensor.nbytes].view(tensor.dtype).view(tensor.shape))
        begin += -(-tensor.nbytes // ALIGNED) * ALIGNED
    return found
