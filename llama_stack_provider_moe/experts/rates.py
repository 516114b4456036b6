"""Learning rates of their own: for groups of an adapter's weights, and for single experts within one weight.

A group's rate is one of the optimiser's parameter groups. Experts share a tensor, where a factor on the gradient
would not do (Adam divides it out again): there each step is stretched when it has been made.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class Rates:
    """Multipliers of the learning rate, by parameter; one that is not named has 1.

    Attributes:
        by_parameter: parameter -> its multiplier.
        within: parameter -> multipliers of its parts, broadcast to its shape.
    """

    by_parameter: dict[nn.Parameter, float] = field(default_factory=dict)
    within: dict[nn.Parameter, Tensor] = field(default_factory=dict)

    def apply(self, optimizer: torch.optim.Optimizer) -> None:
        """Give `optimizer` these rates; before a scheduler notes what each group begins with."""
        optimizer.param_groups[:] = list(self._split(optimizer.param_groups))
        if self.within:
            before: dict[nn.Parameter, Tensor] = {}

            def keep(*_: Any) -> None:
                for parameter in self.within:
                    before[parameter] = parameter.detach().clone()

            def stretch(*_: Any) -> None:
                with torch.no_grad():
                    for parameter, multipliers in self.within.items():
                        old = before.pop(parameter)
                        # In fp32, as LoRA's weights are: exactly `old` where nothing moved.
                        parameter.copy_(old + (parameter - old) * multipliers.to(parameter))

            optimizer.register_step_pre_hook(keep)
            optimizer.register_step_post_hook(stretch)

    def _split(self, groups: Iterable[dict[str, Any]]) -> Iterable[dict[str, Any]]:
        for group in groups:
            rates = {parameter: self.by_parameter.get(parameter, 1.0) for parameter in group["params"]}
            # A scheduler's first group is the one whose rate is logged: that of multiplier 1, where there is one.
            for rate in sorted(set(rates.values()), key=lambda rate: (rate != 1.0, rate)):
                members = [parameter for parameter in group["params"] if rates[parameter] == rate]
                yield {**group, "params": members, "lr": group["lr"] * rate}


def of_experts(name: str, rates: tuple[float, ...], weight: Tensor) -> Tensor:
    """Multipliers broadcast to a LoRA weight of experts, in PEFT's layout: A (E*r, in), row e*r + k; B (out, r*E).

    >>> of_experts("lora_A", (1.0, 2.0), torch.zeros(4, 3)).tolist()
    [[1.0], [1.0], [2.0], [2.0]]
    >>> of_experts("lora_B", (1.0, 2.0), torch.zeros(3, 4)).tolist()
    [[1.0, 2.0, 1.0, 2.0]]
    """
    by_expert = torch.tensor(rates, device=weight.device)
    if name == "lora_A":
        return by_expert.repeat_interleave(weight.shape[0] // len(rates)).unsqueeze(1)
    return by_expert.repeat(weight.shape[1] // len(rates)).unsqueeze(0)
