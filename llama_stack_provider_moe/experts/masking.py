"""Routers that never choose certain experts, for the time of a `with`: what a model does without them.

The logits of masked experts become -inf where the router computes them, and each family's own code makes the rest of
them: probabilities, weights, and what it divides those by. A bias that only steers the choice (DeepSeek-V3 and others),
which is added after the sigmoid has made 0 of -inf, becomes -inf as well.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from llama_stack_provider_moe.errors import InvalidInput
from llama_stack_provider_moe.experts.layout import ExpertLayout


@contextmanager
def masked_experts(model: nn.Module, layout: ExpertLayout, masked: Mapping[int, Collection[int]]) -> Iterator[None]:
    """Inside, no token goes to a masked expert; afterwards the model is bit for bit what it was.

    To be entered before a `RoutingRecorder` is made or after, alike: it sees what is chosen in the end. Not for
    training steps: biases are changed in place.

    Args:
        model: with or without adapters.
        layout: of it.
        masked: layer -> its experts that are not to be chosen.

    Raises:
        InvalidInput: no such layer or expert, or too few are left for a token.
    """
    for layer, experts in masked.items():
        _check(layout, layer, set(experts))
    routers, biases = layout.routers(model), layout.biases(model)
    with ExitStack() as stack:
        for layer, experts in masked.items():
            if experts:
                index = torch.tensor(sorted(set(experts)))
                stack.enter_context(_masked_logits(routers[layer], index, layout.num_experts))
                if layer in biases:
                    stack.enter_context(_masked_bias(biases[layer], index))
        yield


def _check(layout: ExpertLayout, layer: int, experts: set[int]) -> None:
    if layer not in layout.moe_layers:
        raise InvalidInput("masked", layer, f"layers with experts: {', '.join(map(str, layout.moe_layers))}")
    if strange := sorted(expert for expert in experts if not 0 <= expert < layout.num_experts):
        raise InvalidInput(f"masked[{layer}]", strange[0], f"experts 0 to {layout.num_experts - 1}")
    size = layout.num_experts // layout.groups
    left = [size - sum(expert // size == group for expert in experts) for group in range(layout.groups)]
    if layout.groups_chosen < layout.groups:
        # A group counts by its two best experts: with fewer it is never chosen, unless no others are left.
        left = sorted(count for count in left if count >= 2)
        enough = len(left) >= layout.groups_chosen and sum(left[: layout.groups_chosen]) >= layout.top_k
    else:
        enough = sum(left) >= layout.top_k
    if not enough:
        raise InvalidInput(
            f"masked[{layer}]", sorted(experts), f"so many left that every token finds {layout.top_k} experts"
        )


@contextmanager
def _masked_logits(router: nn.Module, index: Tensor, num_experts: int) -> Iterator[None]:
    running: list[_Masking] = []

    def begin(*_: Any) -> None:
        running.append(_Masking(index, num_experts))
        running[-1].__enter__()  # type: ignore[no-untyped-call]

    def end(_router: nn.Module, _inputs: Any, outputs: Any) -> None:
        if running:  # not if another hook failed before ours began
            mode = running.pop()
            mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]
            failed = outputs is None
            assert failed or mode.masked == 1, f"{type(router).__name__} made its logits {mode.masked} times"

    handles = [router.register_forward_pre_hook(begin), router.register_forward_hook(end, always_call=True)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Masking(TorchFunctionMode):
    """While a router runs: its one linear product makes the logits (..., E)."""

    def __init__(self, index: Tensor, num_experts: int) -> None:
        super().__init__()
        self._index = index
        self._num_experts = num_experts
        self.masked = 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        if func is functional.linear:
            assert made.shape[-1] == self._num_experts, tuple(made.shape)
            self.masked += 1
            made = made.index_fill(-1, self._index.to(made.device), float("-inf"))
        return made


@contextmanager
def _masked_bias(bias: Tensor, index: Tensor) -> Iterator[None]:
    with torch.no_grad():
        before = bias.clone()
        bias.view(-1)[index.to(bias.device)] = float("-inf")
    try:
        yield
    finally:
        with torch.no_grad():
            bias.copy_(before)
