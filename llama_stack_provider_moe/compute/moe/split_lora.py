"""Hand LoRA's factors from PEFT's wrapper to our experts, which compute them beside the weights.

PEFT (0.21) folds W + B A of every expert in each forward, and once more when it registers the parametrization for it.
Here its wrapper offers its factors to the experts module during a forward instead, and our experts implementation
(`backend`) takes them. An offer that is not taken is an error: LoRA would have had no effect.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import NamedTuple

from peft.tuners.lora import ParamWrapper
from torch import Tensor, nn

from llama_stack_provider_moe.errors import AdapterError

_OFFERS = "_split_lora_offers"


class Factors(NamedTuple):
    """The update of a parameter (E, a, b): left (E, a, R), which includes the scale, times right (E, R, b)."""

    left: Tensor
    right: Tensor
    dropout: float


class _Offer:
    def __init__(self, factors: Factors) -> None:
        self.factors = factors
        self.was_taken = False


def split_lora(model: nn.Module, dropout: float = 0.0) -> int:
    """Offer the LoRA of all expert parameters of `model` instead of folding it; return how many there are.

    Args:
        model: a model with PEFT's adapters.
        dropout: dropout on the input of LoRA in training; PEFT has none on parameters.
    """
    wrappers = [each for each in model.modules() if isinstance(each, ParamWrapper) and each.num_experts > 1]
    for wrapper in wrappers:
        # Set on the instance, so it shadows PEFT's method; merging and saving don't use it and stay PEFT's.
        wrapper._activate_lora = partial(_offered, wrapper, dropout)
    return len(wrappers)


def take_lora(experts: nn.Module, name: str) -> Factors | None:
    """LoRA's factors for parameter `name` of `experts` in this forward; None if there are none."""
    offer: _Offer | None = getattr(experts, _OFFERS, {}).get(name)
    if offer is None:
        return None
    offer.was_taken = True
    return offer.factors


def _offered(wrapper: ParamWrapper, dropout: float, active_adapters: list[str]) -> AbstractContextManager[None]:
    known = [name for name in active_adapters if name in wrapper.lora_A]
    if len(known) != 1:  # with none or several PEFT folds, and our implementation reads the result as a weight
        folded: AbstractContextManager[None] = ParamWrapper._activate_lora(wrapper, active_adapters)
        return folded
    return _offer(wrapper, known[0], dropout)


@contextmanager
def _offer(wrapper: ParamWrapper, adapter: str, dropout: float) -> Iterator[None]:
    left, right, scaling = wrapper.get_delta_factors(adapter)
    offer = _Offer(Factors(left * scaling, right, dropout))
    offers: dict[str, _Offer] = wrapper.get_base_layer().__dict__.setdefault(_OFFERS, {})
    offers[wrapper.parameter_name] = offer
    try:
        yield
    finally:
        del offers[wrapper.parameter_name]
    if not offer.was_taken:
        raise AdapterError(
            f"adapter: LoRA on {wrapper.parameter_name} of experts had no effect in a forward: their implementation "
            "changed after LoRA was set up"
        )
