"""The memory of a vision tower and its projector: the model's own code on images with sizes but no numbers.

The whole model runs as far as its language model, on the tensors of `dry_run`. What follows from the sizes of images
alone (positions, masks, where each image ends) is computed for real, because it decides how large other tensors are.

A frozen tower keeps nothing: it needs what its largest moment takes, and while the language model runs, its output.
One that trains keeps what its backward pass needs until the language model's is done. In both cases the pixels are
there all the time.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    unset_fake_temporarily,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from transformers.modeling_layers import GradientCheckpointingLayer

from llama_stack_provider_moe.compute.moe.layout import without_adapters
from llama_stack_provider_moe.compute.planning.dry_run import Meter, NotMeasurable, Rehearsal
from llama_stack_provider_moe.compute.planning.tower_inputs import TowerInputs

_OF_IMAGE = 1  # in `mm_token_type_ids`
# On a CPU, torch's kernel that takes the gradients of images' tokens from those of all counts with two int64 a number.
_PLACING = 2 * 8
# What the code of a model raises that takes other inputs, or other names.
_OF_OTHER_INPUTS = (TypeError, ValueError, NotImplementedError, KeyError, AttributeError)


@dataclass(frozen=True)
class TowerMemory:
    """Bytes in addition to the weights; the pixels of the images are in `inputs` alone.

    Attributes:
        inputs: pixels.
        forward: peak of its forward pass.
        held: what exists of it while the language model's forward pass runs.
        kept: what exists of it from then until its own backward pass.
        backward: peak of its backward pass, `kept` and its gradients included; 0: there is none.
        alone: peak of a forward pass that keeps nothing, with the adapter off if there is one.
        held_alone: `held` after such a pass.
        tokens: that stand for the images.
    """

    inputs: int
    forward: int
    held: int
    kept: int
    backward: int
    alone: int
    held_alone: int
    tokens: int

    @property
    def peak(self) -> int:
        """The most that it takes at once."""
        return self.inputs + max(self.forward, self.held, self.backward)


class TowerOperations(NamedTuple):
    """Floating-point operations of a tower and its projector on the images of a micro-batch.

    Attributes:
        learning: of a forward pass, and of a backward pass if anything of it trains.
        alone: of a forward pass with the adapter off.
    """

    learning: int
    alone: int


def tower_memory(rehearsal: Rehearsal, given: TowerInputs, length: int, checkpointing: bool) -> TowerMemory:
    """Measure the tower on the images of a micro-batch.

    Args:
        rehearsal: the model, ready to be measured.
        given: the images.
        length: tokens of each row, padding included.
        checkpointing: whether its layers keep their inputs alone.

    Raises:
        NotMeasurable: the sizes of its tensors depend on their numbers, or it takes other inputs.
    """
    run = _TowerRun(rehearsal, given, length)
    with _measurable(rehearsal), _checkpointed(rehearsal) if checkpointing else nullcontext():
        return run.measured()


def tower_operations(rehearsal: Rehearsal, given: TowerInputs, length: int) -> TowerOperations:
    """Count the operations of the tower on the images of a micro-batch.

    Args:
        rehearsal: the model, ready to be measured.
        given: the images.
        length: tokens of each row, padding included.

    Raises:
        NotMeasurable: as in `tower_memory`.
    """
    run = _TowerRun(rehearsal, given, length)
    with _measurable(rehearsal):
        return run.counted()


@contextmanager
def _measurable(rehearsal: Rehearsal) -> Iterator[None]:
    try:
        yield
    except (DynamicOutputShapeException, RuntimeError, *_OF_OTHER_INPUTS) as error:
        kind = without_adapters(rehearsal.model).config.model_type
        raise NotMeasurable(f"the memory of a vision tower of {kind} can't be estimated from its config") from error


class _Reached(Exception):
    """The language model begins."""


class _TowerRun:
    def __init__(self, rehearsal: Rehearsal, given: TowerInputs, length: int) -> None:
        self._rehearsal, self._given = rehearsal, given
        self._trunk = without_adapters(rehearsal.model).get_submodule(rehearsal.path.rpartition(".")[0])
        self._ids, self._types = self._tokens(length)

    def _tokens(self, length: int) -> tuple[list[list[int]], list[list[int]]]:
        """Token ids of the rows, with a token of text before each image, and which of them stand for images."""
        token = int(without_adapters(self._rehearsal.model).config.image_token_id)
        text = 0 if token else 1
        ids, types = [], []
        longest = max(length, *(sum(row) + len(row) + 1 for row in self._given.tokens))
        for row in self._given.tokens:
            said = [kind for count in row for kind in (0, *[_OF_IMAGE] * count)]
            said += [0] * (longest - len(said))
            types.append(said)
            ids.append([token if kind else text for kind in said])
        return ids, types

    def measured(self) -> TowerMemory:
        """All figures."""
        model, mode = self._rehearsal.model, self._rehearsal.mode
        with mode, _WholeNumbers(mode):
            pixels = torch.empty(self._given.pixels, dtype=self._rehearsal.dtype)
            run = partial(self._forward, pixels)
            off = model.disable_adapter() if isinstance(model, PeftModel) else nullcontext()
            with Meter() as alone, torch.no_grad(), off:
                _, held_alone = self._until_language_model(run, alone)
            with Meter() as meter:
                reached, held = self._until_language_model(run, meter)
                forward, backward = meter.peak, 0
                given = [each for each in _tensors(reached) if each.requires_grad]
                edges = [torch.autograd.graph.get_gradient_edge(each) for each in given]
                shapes = [(each.shape, each.dtype) for each in given]
                del reached, given
                kept = meter.peak = meter.live
                if edges:
                    gradients = [torch.empty(shape, dtype=dtype) for shape, dtype in shapes]
                    placed = meter.live + self._placing(edges[0].node) * gradients[0].numel()
                    torch.autograd.backward(edges, gradients)
                    backward = max(meter.peak, placed)
        for parameter in model.parameters():
            parameter.grad = None
        return TowerMemory(
            inputs=pixels.untyped_storage().nbytes(),
            forward=forward,
            held=held,
            kept=kept,
            backward=backward,
            alone=alone.peak,
            held_alone=held_alone,
            tokens=sum(map(sum, self._given.tokens)),
        )

    def counted(self) -> TowerOperations:
        """Operations, in passes of their own: torch's counter keeps tensors alive."""
        model, mode = self._rehearsal.model, self._rehearsal.mode
        with mode, _WholeNumbers(mode):
            run = partial(self._forward, torch.empty(self._given.pixels, dtype=self._rehearsal.dtype))
            off = model.disable_adapter() if isinstance(model, PeftModel) else nullcontext()
            with FlopCounterMode(display=False) as alone, torch.no_grad(), off, Meter() as meter:
                self._until_language_model(run, meter)
            with FlopCounterMode(display=False) as learning, Meter() as meter:
                reached, _ = self._until_language_model(run, meter)
                given = [each for each in _tensors(reached) if each.requires_grad]
                if given:
                    torch.autograd.backward(given, [torch.empty_like(each) for each in given])
        for parameter in model.parameters():
            parameter.grad = None
        return TowerOperations(learning.get_total_flops(), alone.get_total_flops())

    def _placing(self, placed: torch.autograd.graph.Node) -> int:
        """Bytes a number of the embeddings, behind which images' tokens were placed, if these have gradients."""
        of_images, _ = placed.next_functions[-1]
        return _PLACING if self._rehearsal.device == "cpu" and of_images is not None else 0

    def _forward(self, pixels: Tensor) -> object:
        grid = self._given.grid
        of_grid = {} if grid is None else {
            "image_grid_thw": torch.tensor(grid), "mm_token_type_ids": torch.tensor(self._types),
        }  # fmt: skip
        ids = torch.tensor(self._ids)
        return self._rehearsal.model(
            input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels, use_cache=False, **of_grid
        )

    def _until_language_model(self, run: Callable[[], object], meter: Meter) -> tuple[object, int]:
        """What the language model gets, and the bytes that exist then beside its first input."""
        found: list[object] = []
        held = 0

        def caught(*args: object, **kwargs: object) -> object:
            nonlocal held
            found.append((args, kwargs))
            embeddings = kwargs["inputs_embeds"]
            assert isinstance(embeddings, Tensor)
            held = meter.live - embeddings.untyped_storage().nbytes()
            raise _Reached

        self._trunk.forward = caught
        try:
            self._rehearsal.autocast(run)  # it never returns
        except _Reached:
            pass
        finally:
            del self._trunk.forward
        return found.pop(), held


class _WholeNumbers(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's own hooks have no types
    """Computes for real what no weight and no pixel is part of."""

    def __init__(self, mode: FakeTensorMode) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._mode = mode

    def __torch_dispatch__(
        self,
        func: Callable[..., object],
        types: object,
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        """Run the operation on numbers, or on shapes alone."""
        kwargs = kwargs or {}
        given = _tensors((args, kwargs))
        if any(isinstance(each, FakeTensor) for each in given):
            args, kwargs = tree_map_only(Tensor, self._without_numbers, (args, kwargs))
        elif given or _is_whole(func, kwargs):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        return func(*args, **kwargs)

    def _without_numbers(self, tensor: Tensor) -> Tensor:
        return tensor if isinstance(tensor, FakeTensor) else self._mode.from_tensor(tensor, static_shapes=True)


def _is_whole(func: Callable[..., object], kwargs: dict[str, object]) -> bool:
    """Whether an operation without tensors makes one of whole numbers."""
    dtype = kwargs.get("dtype")
    if isinstance(dtype, torch.dtype):
        return not dtype.is_floating_point and not dtype.is_complex
    return getattr(func, "overloadpacket", None) is torch.ops.aten.arange


@contextmanager
def _checkpointed(rehearsal: Rehearsal) -> Iterator[None]:
    """As a trainer sets a model up that checkpoints its layers."""
    base = without_adapters(rehearsal.model)
    once = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
    layers: list[nn.Module] = [each for each in base.modules() if isinstance(each, GradientCheckpointingLayer)]
    for layer in layers:
        layer.gradient_checkpointing = True  # type: ignore[assignment]
        layer._gradient_checkpointing_func = once  # type: ignore[assignment]
    base.enable_input_require_grads()
    try:
        yield
    finally:
        base.disable_input_require_grads()
        for layer in layers:
            del layer.gradient_checkpointing, layer._gradient_checkpointing_func


def _tensors(tree: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
