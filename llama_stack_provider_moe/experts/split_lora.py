"""LoRA on experts as two thin products beside x W^T (Hu et al. 2021, arXiv 2106.09685, section 4.1).

PEFT (0.21) folds W + B A of every expert at each forward, and once more when it registers the parametrization that
does so; backward then makes a gradient as large as W. Where a step has few tokens that costs more than all else in it.
And in bf16 the sum loses what is smaller than half of W's last digit, which is most of an update while it is young.

Here PEFT's wrapper offers its factors to the experts module for the time of a forward instead, and an experts
implementation that can (`bucketed`) takes them. An offer that nobody took is an error: LoRA would have had no effect.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

from peft.tuners.lora import ParamWrapper
from torch import Tensor, nn

from llama_stack_provider_moe.errors import AdapterError

_OFFERS = "_split_lora_offers"


class _Offer:
    def __init__(self, left: Tensor, right: Tensor) -> None:
        self.factors = left, right
        self.was_taken = False


def split_lora(model: nn.Module) -> int:
    """Have the LoRA of all expert parameters of `model` offered, not folded; how many there are."""
    wrappers = [each for each in model.modules() if isinstance(each, ParamWrapper) and each.num_experts > 1]
    for wrapper in wrappers:
        # On the instance, over PEFT's method of that name; merging and saving go other ways and stay PEFT's.
        wrapper._activate_lora = partial(_offered, wrapper)
    return len(wrappers)


def take_lora(experts: nn.Module, name: str) -> tuple[Tensor, Tensor] | None:
    """What LoRA adds to parameter `name` of `experts` in this forward, or None.

    Returns:
        left (E, a, R) and right (E, R, b), whose product, the scale in it, is to be added to the parameter (E, a, b).
    """
    offer: _Offer | None = getattr(experts, _OFFERS, {}).get(name)
    if offer is None:
        return None
    offer.was_taken = True
    return offer.factors


def _offered(wrapper: Any, active_adapters: list[str]) -> AbstractContextManager[None]:
    known = [name for name in active_adapters if name in wrapper.lora_A]
    if len(known) != 1:  # none, or several: PEFT's own way, whose result the implementation reads as a weight
        folded: AbstractContextManager[None] = ParamWrapper._activate_lora(wrapper, active_adapters)
        return folded
    return _offer(wrapper, known[0])


@contextmanager
def _offer(wrapper: Any, adapter: str) -> Iterator[None]:
    left, right, scaling = wrapper.get_delta_factors(adapter)
    offer = _Offer(left * scaling, right)
    offers: dict[str, _Offer] = wrapper.get_base_layer().__dict__.setdefault(_OFFERS, {})
    offers[wrapper.parameter_name] = offer
    try:
        yield
    finally:
        del offers[wrapper.parameter_name]
    if not offer.was_taken:
        raise AdapterError(
            f"adapter: LoRA on {wrapper.parameter_name} of experts had no effect in a forward: their implementation is "
            "no longer the one that it was set up for"
        )
