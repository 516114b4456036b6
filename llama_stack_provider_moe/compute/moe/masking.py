"""Mask experts inside a `with`: routers never choose them, which shows what a model does without them.

The logits of masked experts become -inf where the router computes them; the family's own code derives the rest from
them: probabilities, weights and their normalisation. A bias that only affects the choice (DeepSeek-V3 and others) is
added after the sigmoid turned -inf into 0, so it becomes -inf as well.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from llama_stack_provider_moe.compute.moe.layout import ExpertLayout
from llama_stack_provider_moe.errors import InvalidInput


@contextmanager
def masked_experts(model: nn.Module, layout: ExpertLayout, masked: Mapping[int, Collection[int]]) -> Iterator[None]:
    """Send no token to a masked expert inside the `with`; afterwards the model is restored bit by bit.

    Enter it before or after you create a `RoutingRecorder`: the recorder sees the final choice either way. Not for
    training steps: biases change in place.

    Args:
        model: with or without adapters.
        layout: the model's layout.
        masked: layer -> its masked experts.

    Raises:
        InvalidInput: the layer or expert does not exist, or too few experts remain for a token.
    """
    for layer, experts in masked.items():
        _check(layout, layer, set(experts))
    routers, biases = layout.routers(model), layout.biases(model)
    with ExitStack() as stack:
        for layer, experts in masked.items():
            if experts:
                index = torch.tensor(sorted(set(experts)))
                stack.enter_context(_masked_logits(routers[layer], index, layout))
                if layer in biases:
                    stack.enter_context(_masked_bias(biases[layer], index))
        yield


def _check(layout: ExpertLayout, layer: int, experts: set[int]) -> None:
    if layer not in layout.moe_layers:
        raise InvalidInput("masked", layer, f"layers with experts: {', '.join(map(str, layout.moe_layers))}")
    if layer in layout.by_token_layers:
        raise InvalidInput("masked", layer, "a layer whose router chooses; here a token's id fixes its experts")
    if strange := sorted(expert for expert in experts if not 0 <= expert < layout.num_experts):
        raise InvalidInput(f"masked[{layer}]", strange[0], f"experts 0 to {layout.num_experts - 1}")
    size = layout.choices // layout.groups
    left = [size - sum(expert // size == group for expert in experts) for group in range(layout.groups)]
    if layout.groups_chosen < layout.groups:
        # A group is scored by its two best experts: with fewer it is never chosen, unless no other group is left.
        left = sorted(count for count in left if count >= 2)
        enough = len(left) >= layout.groups_chosen and sum(left[: layout.groups_chosen]) >= layout.top_k
    else:
        enough = sum(left) >= layout.top_k
    if not enough:
        raise InvalidInput(
            f"masked[{layer}]", sorted(experts), f"enough experts left that every token can choose {layout.top_k}"
        )


@contextmanager
def _masked_logits(router: nn.Module, index: Tensor, layout: ExpertLayout) -> Iterator[None]:
    running: list[_Masking] = []
    rows = router.get_parameter(layout.router_weight).shape[0]

    def begin(*_: object) -> None:
        running.append(_Masking(index, rows))
        running[-1].__enter__()  # type: ignore[no-untyped-call]

    def end(_router: nn.Module, _inputs: object, outputs: object) -> None:
        if running:  # empty if another hook failed before ours
            mode = running.pop()
            mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]
            failed = outputs is None
            assert failed or mode.masked == 1, f"{type(router).__name__} computed its logits {mode.masked} times"

    handles = [router.register_forward_pre_hook(begin), router.register_forward_hook(end, always_call=True)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Masking(TorchFunctionMode):
    """Active while a router runs; one of its linear products computes the logits (..., R), R rows of its matrix."""

    def __init__(self, index: Tensor, rows: int) -> None:
        super().__init__()
        self._index = index
        self._rows = rows
        self.masked = 0

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: Collection[type],
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        made = func(*args, **(kwargs or {}))
        if func is functional.linear and isinstance(made, Tensor) and made.shape[-1] == self._rows:
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
