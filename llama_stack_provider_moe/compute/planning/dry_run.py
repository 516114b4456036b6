"""A dry run of a training step: the model's own code on tensors with shapes but no numbers; every byte is counted.

The model is built on the meta device and adapted by the code that trains (`compute.moe.adapters`). One decoder layer of
each kind then runs forward and backward on torch's fake tensors, under the autocast of a job, and a `Meter` counts the
storages in use: what autograd keeps, and the peak. Routing is assumed to be even, because only real numbers decide
which expert gets which token.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedConfig, PreTrainedModel
from trl.trainer.utils import add_fused_lm_head

from llama_stack_provider_moe.compute.models.heads import needs_plain_head, set_plain_head
from llama_stack_provider_moe.compute.moe import backend
from llama_stack_provider_moe.compute.moe.kernels.groups import HALVES, Groups, Sorted, bucket
from llama_stack_provider_moe.compute.moe.layout import decoder_layers, text_config, without_adapters
from llama_stack_provider_moe.errors import LayoutError, ModelError

Device = Literal["cuda", "cpu"]


class Meter(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's own hooks have no types
    """Counts the bytes of tensors that are made inside and still exist, and their peak; each storage counts once.

    Attributes:
        live: bytes now.
        peak: the most so far.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self._alive: dict[int, int] = {}
        self._older: set[int] = set()

    def __torch_dispatch__(
        self,
        func: Callable[..., object],
        types: object,
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        """Run the operation, and count the tensors that it makes."""
        kwargs = kwargs or {}
        for tensor in _tensors((args, kwargs)):
            self._note(tensor, is_new=False)
        out = func(*args, **kwargs)
        for tensor in _tensors(out):
            self._note(tensor, is_new=True)
        self.peak = max(self.peak, self.live)
        return out

    def _note(self, tensor: Tensor, is_new: bool) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._alive or key in self._older:
            return
        if is_new:
            self._alive[key] = storage.nbytes()
            self.live += storage.nbytes()
        else:
            self._older.add(key)
        weakref.finalize(storage, self._freed, key)

    def _freed(self, key: int) -> None:
        self._older.discard(key)
        self.live -= self._alive.pop(key, 0)


@dataclass(frozen=True)
class Footprint:
    """Bytes that a part of the model takes in addition to its weights.

    Attributes:
        output: of its output.
        kept: that autograd holds until its backward pass.
        forward: peak of its forward pass.
        without_graph: peak of a forward pass that keeps nothing, with the adapter off if there is one.
        backward: peak of its backward pass, including `kept` and `gradients`.
        gradients: of its weights that train.
    """

    output: int
    kept: int
    forward: int
    without_graph: int
    backward: int
    gradients: int


@dataclass(frozen=True)
class DryRun:
    """The result for one batch.

    Attributes:
        layers: of each decoder layer, in order.
        ends: embeddings, masks and positions, the last norm and, if it was run, the output head with its loss.
        shared: inputs that all layers get besides the hidden states: masks, positions.
    """

    layers: tuple[Footprint, ...]
    ends: Footprint
    shared: int


class NotMeasurable(ModelError):
    """A model can't run on tensors without numbers."""


class Rehearsal:
    """A model on the meta device, adapted or with all weights to train, ready to be measured; its weights become fake.

    Attributes:
        plain_head: its logits are computed whole (`compute.models.heads`), not in TRL's tiles.
        dtype: of the base.
        model: with adapters.
        mode: in which its weights are fake.
        path: of its decoder layers, in the model without adapters.
        device: that trains.
    """

    def __init__(self, model: PreTrainedModel | PeftModel, device: Device, plain_head: bool = False) -> None:
        self.plain_head = plain_head or needs_plain_head(model)
        self.model, self.device = model, device
        self.mode = FakeTensorMode()
        self.path, self._layers = decoder_layers(model)
        config = text_config(model)
        kinds = [_kind(layer, number, config) for number, layer in enumerate(self._layers)]
        self._kinds, self._first = kinds, {kind: kinds.index(kind) for kind in dict.fromkeys(kinds)}
        # Layers that are skipped give no router logits to an auxiliary loss (`memory` counts those).
        config.output_router_logits = False
        base = without_adapters(model)
        self.dtype: torch.dtype = base.dtype
        # As in the trainers of SFT and DPO, except for some sums of one number per token.
        if base.get_output_embeddings() is not None:  # a classifier has none
            add_fused_lm_head(base, outputs=("log_probs", "entropy", "is_top1"))
        if self.plain_head:
            set_plain_head(model)
        _put_on(model, self.mode)
        model.train()

    def run(self, batch: int, length: int, with_head: bool) -> DryRun:
        """Measure one batch.

        Args:
            batch: number of sequences.
            length: tokens of each, padding included.
            with_head: whether to run the output head and the loss too.

        Raises:
            NotMeasurable: the sizes of its tensors depend on their numbers.
        """
        try:
            return self._run(batch, length, with_head)
        except DynamicOutputShapeException as error:
            raise NotMeasurable(
                f"the memory of a {text_config(self.model).model_type} model can't be estimated from its config: the "
                "sizes of some tensors in its layers depend on the numbers in others"
            ) from error

    def _run(self, batch: int, length: int, with_head: bool) -> DryRun:
        with _even_routing(self.device), self.mode:
            ids, mask = torch.zeros(batch, length, dtype=torch.long), torch.ones(batch, length, dtype=torch.long)
            whole = partial(self._forward, ids, mask, with_head)
            beside: list[object] = []
            with _skipping(self._layers, set(self._first.values()), beside) as calls, torch.no_grad():
                self.autocast(whole)
            with _skipping(self._layers, set(), beside):
                ends = self._footprint(whole, self.model)
            found = {kind: self._of_layer(number, calls[number]) for kind, number in self._first.items()}
        given = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes()
                 for call in calls.values() for tensor in _tensors((call.args, call.kwargs))}  # fmt: skip
        return DryRun(tuple(found[kind] for kind in self._kinds), ends, sum(given.values()))

    def _forward(self, ids: Tensor, mask: Tensor, with_head: bool) -> Tensor:
        if not with_head:
            trunk = without_adapters(self.model).get_submodule(self.path.rpartition(".")[0])
            hidden: Tensor = trunk(input_ids=ids, attention_mask=mask, use_cache=False)[0]
            return hidden
        out = self.model(input_ids=ids, attention_mask=mask, labels=ids, use_cache=False, fused_lm_head=True)
        log_probs: Tensor = out.log_probs
        return log_probs

    def _of_layer(self, number: int, call: "_Call") -> Footprint:
        layer = self._layers[number]

        def run() -> Tensor:
            # Not a leaf: autograd would keep the value of a leaf after the backward pass.
            hidden = torch.zeros(1, dtype=call.dtype, requires_grad=True).expand(call.shape).clone()
            out: Tensor | tuple[Tensor, ...] = layer(hidden, *call.args, **call.kwargs)
            return out if isinstance(out, Tensor) else out[0]

        return self._footprint(run, layer)

    def _footprint(self, run: Callable[[], Tensor], part: nn.Module) -> Footprint:
        adapted = isinstance(self.model, PeftModel)
        off = self.model.disable_adapter() if adapted else nullcontext()
        with Meter() as alone, torch.no_grad(), off:
            self.autocast(run)
        with Meter() as meter:
            out = self.autocast(run)
            forward, output, shape, dtype = meter.peak, out.untyped_storage().nbytes(), out.shape, out.dtype
            # Not `out` itself: if autograd does not hold it, it is freed.
            edge = torch.autograd.graph.get_gradient_edge(out)
            del out
            kept = meter.peak = meter.live
            torch.autograd.backward((edge,), (torch.empty(shape, dtype=dtype),))
            backward = meter.peak
        gradients = sum(p.grad.nbytes for p in part.parameters() if p.grad is not None)
        for parameter in part.parameters():
            parameter.grad = None
        return Footprint(output, kept, forward, alone.peak, backward, gradients)

    def autocast[T](self, run: Callable[[], T]) -> T:
        """Run a part of the model as a trainer does."""
        # Accelerate uses it for the model's forward pass, and for nothing else.
        with torch.autocast("cpu", dtype=self.dtype, enabled=self.dtype in HALVES):
            return run()


@dataclass(frozen=True)
class _Call:
    """The arguments of a decoder layer; of the hidden states only shape and dtype."""

    shape: torch.Size
    dtype: torch.dtype
    args: tuple[object, ...]
    kwargs: dict[str, object]


@contextmanager
def _skipping(layers: nn.ModuleList, keep: set[int], beside: list[object]) -> Iterator[dict[int, _Call]]:
    """Make decoder layers that are not in `keep` return their input; yields the calls of the others.

    Args:
        layers: of the model.
        keep: numbers of the layers that run.
        beside: what layers return beside hidden states (Mistral Large 4's indices), from the last one that ran; a pass
            in which none runs gets it from the pass before.
    """
    calls: dict[int, _Call] = {}

    def called(number: int, own: Callable[..., object], *args: object, **kwargs: object) -> object:
        first, *others = args if args else (kwargs.pop("hidden_states"),)
        hidden = cast(Tensor, first)
        if number not in keep:
            # The first layer makes its output need a gradient, as adapters in it would.
            same = hidden + torch.zeros(1, dtype=hidden.dtype, requires_grad=True) if number == 0 else hidden
            return (same, *beside) if beside else same
        calls[number] = _Call(hidden.shape, hidden.dtype, tuple(others), kwargs)
        out = own(hidden, *others, **kwargs)
        if isinstance(out, tuple) and out and isinstance(out[0], Tensor):
            beside[:] = out[1:]
        elif not isinstance(out, Tensor):
            raise LayoutError(f"decoder layer {number} ({type(layers[number]).__name__}) returns {type(out).__name__}; "
                              "expected hidden states, alone or first")  # fmt: skip
        return out

    for number, layer in enumerate(layers):
        layer.forward = partial(called, number, layer.forward)
    try:
        yield calls
    finally:
        for layer in layers:
            del layer.forward


@contextmanager
def _even_routing(device: Device) -> Iterator[None]:
    """Our code for experts sorts tokens as if each expert got the same number."""
    names = vars(backend)  # `run_experts` looks the name up at each call
    own = names["sort_by_expert"]

    def even(index_TK: Tensor, num_experts: int, dtype: torch.dtype, *, partial: bool = False) -> Sorted:
        rows, tokens = index_TK.numel(), index_TK.shape[0]
        many, left = divmod(rows, num_experts)
        size = rows
        if device == "cpu" and dtype in HALVES:  # see `kernels.groups`
            size = left * _filled(many + 1) + (num_experts - left) * _filled(many)
        groups = Groups(torch.empty(num_experts, dtype=torch.int32), partial)
        # A cached property that would read the fake ends. One product of all rows takes as much as one per expert.
        groups.__dict__["spans"] = [(0, 0, size)]
        filled = torch.empty(size, dtype=torch.bool) if size > rows else None
        order = torch.empty(size, dtype=torch.long)
        return Sorted(order, torch.empty(tokens, rows // tokens, dtype=torch.long), groups, filled_S=filled)

    names["sort_by_expert"] = even
    try:
        yield
    finally:
        names["sort_by_expert"] = own


def _filled(rows: int) -> int:
    with torch._subclasses.fake_tensor.unset_fake_temporarily():
        return int(bucket(torch.tensor([rows])))


def _put_on(model: nn.Module, mode: FakeTensorMode) -> None:
    """Replace the model's tensors by fake ones; shared tensors stay shared, and tensors without memory take none."""
    made: dict[int, Tensor] = {}

    def fake(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            with mode:
                new = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
            is_weight = isinstance(tensor, nn.Parameter)
            made[id(tensor)] = nn.Parameter(new, requires_grad=tensor.requires_grad) if is_weight else new
        return made[id(tensor)]

    for module in model.modules():
        held: tuple[dict[str, Any], ...] = (module._parameters, module._buffers, vars(module))
        for tensors in held:
            for name, tensor in list(tensors.items()):
                if isinstance(tensor, Tensor):
                    tensors[name] = fake(tensor)


def _kind(layer: nn.Module, number: int, config: PreTrainedConfig) -> tuple[object, ...]:
    """The properties that are equal in decoder layers that take equal memory."""
    types = config.to_dict().get("layer_types")
    weights = tuple((name, tuple(p.shape), p.requires_grad) for name, p in layer.named_parameters())
    return (types[number] if types else None, weights)


def _tensors(tree: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
