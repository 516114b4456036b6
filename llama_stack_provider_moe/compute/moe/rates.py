"""Learning-rate multipliers for groups of an adapter's weights and for single experts within one weight.

A group gets its rate through a parameter group of the optimiser. Experts share one tensor, and scaling their gradients
would not work there (Adam divides the factor out again), so each update is scaled after the optimiser step.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

_Group = dict[str, Any]  # one entry of an optimiser's `param_groups`, typed as torch does


@dataclass
class Rates:
    """Multipliers of the learning rate by parameter; any other parameter has multiplier 1.

    Attributes:
        by_parameter: parameter -> its multiplier.
        within: parameter -> multipliers of its parts, broadcastable to its shape.
    """

    by_parameter: dict[nn.Parameter, float] = field(default_factory=dict)
    within: dict[nn.Parameter, Tensor] = field(default_factory=dict)

    def apply(self, optimizer: torch.optim.Optimizer) -> None:
        """Give `optimizer` these rates; call this before a scheduler reads the groups' initial rates."""
        optimizer.param_groups[:] = list(self._split(optimizer.param_groups))
        if self.within:
            before: dict[nn.Parameter, Tensor] = {}

            def keep(*_: object) -> None:
                for parameter in self.within:
                    before[parameter] = parameter.detach().clone()

            def stretch(*_: object) -> None:
                with torch.no_grad():
                    for parameter, multipliers in self.within.items():
                        old = before.pop(parameter)
                        # LoRA's weights are fp32, so this is exactly `old` where nothing moved.
                        parameter.copy_(old + (parameter - old) * multipliers.to(parameter))

            optimizer.register_step_pre_hook(keep)
            optimizer.register_step_post_hook(stretch)

    def _split(self, groups: Iterable[_Group]) -> Iterable[_Group]:
        for group in groups:
            rates = {parameter: self.by_parameter.get(parameter, 1.0) for parameter in group["params"]}
            # Trainers log the rate of the first group; make it the one with multiplier 1, if there is one.
            for rate in sorted(set(rates.values()), key=lambda rate: (rate != 1.0, rate)):
                members = [parameter for parameter in group["params"] if rates[parameter] == rate]
                yield {**group, "params": members, "lr": group["lr"] * rate}


def expert_multipliers(name: str, rates: tuple[float, ...], weight: Tensor) -> Tensor:
    """Multipliers for a LoRA weight of experts in PEFT's layout: A (E*r, in), row e*r + k; B (out, r*E).

    >>> expert_multipliers("lora_A", (1.0, 2.0), torch.zeros(4, 3)).tolist()
    [[1.0], [1.0], [2.0], [2.0]]
    >>> expert_multipliers("lora_B", (1.0, 2.0), torch.zeros(3, 4)).tolist()
    [[1.0, 2.0, 1.0, 2.0]]
    """
    by_expert = torch.tensor(rates, device=weight.device)
    if name == "lora_A":
        return by_expert.repeat_interleave(weight.shape[0] // len(rates)).unsqueeze(1)
    return by_expert.repeat(weight.shape[1] // len(rates)).unsqueeze(0)
