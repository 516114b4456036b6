"""What a random router would choose: the baseline without which the mutual information of set and expert says little.

Tokens of two data sets differ, so any function of their hidden states tells the sets apart to some degree, and so does
a router that nobody trained. Here each layer gets a random linear router, which sees the hidden states that the model's
own router sees and chooses as many experts. The model is not changed.

Shapes: T tokens, D hidden size, E experts, K experts per token.
"""

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn

from llama_stack_provider_moe.compute.moe.layout import ExpertLayout


class RandomRouters:
    """Random routers beside those of a model.

    Args:
        model: whose routers run.
        layout: of its experts.
        seed: of the random weights.
    """

    def __init__(self, model: nn.Module, layout: ExpertLayout, seed: int = 0) -> None:
        self._layout = layout
        self._seed = seed
        self._weight_DE: dict[int, Tensor] = {}
        self._chosen: dict[int, Tensor] = {}
        self._handles = [
            router.register_forward_pre_hook(partial(self._choose, layer), with_kwargs=True)
            for layer, router in layout.routers(model).items()
        ]

    def chosen_in(self, layer: int) -> Tensor:
        """The experts (T, K) that the random router of a layer chose in the last pass."""
        return self._chosen[layer]

    def close(self) -> None:
        """Remove the hooks from the model."""
        for handle in self._handles:
            handle.remove()

    def _choose(self, layer: int, router: nn.Module, inputs: tuple[object, ...], named: Mapping[str, object]) -> None:
        given = [each for each in (*inputs, *named.values()) if isinstance(each, Tensor)]
        states = next(each for each in given if each.is_floating_point())  # some routers get ids of tokens too
        with torch.no_grad():
            states_TD = states.detach().reshape(-1, states.shape[-1]).float()
            if layer not in self._weight_DE:
                generator = torch.Generator().manual_seed((self._seed << 16) + layer)
                shape = (states_TD.shape[1], self._layout.choices)
                self._weight_DE[layer] = torch.randn(shape, generator=generator).to(states_TD.device)
            self._chosen[layer] = (states_TD @ self._weight_DE[layer]).topk(self._layout.top_k, dim=-1).indices
