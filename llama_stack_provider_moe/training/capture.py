"""Hidden states of some decoder blocks, and no more of the model run than they need.

The states are taken by forward hooks on these blocks alone: 3 of 48 blocks hold 94 % less than all `hidden_states`
(`python -m benchmarks.breaker_memory`). The hooks are there for the time of a forward pass only: where transformers
runs a block again in backward (gradient checkpointing), nothing is taken twice.
"""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method

from llama_stack_provider_moe.experts.layout import decoder_layers, without_adapters

_METHOD = "states_of_blocks"


class Blocks:
    """The decoder blocks of a model, counted from 0; block i's output is transformers' `hidden_states[i + 1]`.

    Args:
        model: with or without adapters.
    """

    def __init__(self, model: nn.Module) -> None:
        path, self.layers = decoder_layers(model)
        parent, _, self._name = path.rpartition(".")
        whole: Any = without_adapters(model)
        self.decoder: nn.Module = whole.get_submodule(parent)
        self._run = self._run_decoder
        if isinstance(whole, FSDPModule):
            # Processes that share the weights out gather them in step with the whole model's passes.
            model_itself: Any = whole
            setattr(model_itself, _METHOD, self._run_decoder)
            register_fsdp_forward_method(model_itself, _METHOD)
            self._run = getattr(model_itself, _METHOD)

    def states(
        self, wanted: Collection[int], input_ids: Tensor, attention_mask: Tensor, whole: bool = False
    ) -> dict[int, Tensor]:
        """What the blocks `wanted` give, (batch, sequence, width), of a pass that ends at the last of them.

        The output head never runs. What is right for a pass (gradients, autocast, adapters on or off) is the caller's.

        Args:
            wanted: numbers of blocks.
            input_ids: (batch, sequence).
            attention_mask: the same, 0 where a token is padding.
            whole: run the blocks above as well, for what else hangs on them (the routers' balance).
        """
        last = len(self.layers) - 1 if whole else max(wanted)
        return self._run(wanted, last, input_ids, attention_mask)

    def _run_decoder(
        self, wanted: Collection[int], last: int, input_ids: Tensor, attention_mask: Tensor
    ) -> dict[int, Tensor]:
        with self.kept(wanted) as states, self._up_to(last):
            self.decoder(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        return states

    @contextmanager
    def kept(self, wanted: Collection[int]) -> Iterator[dict[int, Tensor]]:
        """Keep what the blocks `wanted` give in passes inside the `with`, each block's last output."""
        states: dict[int, Tensor] = {}

        def keep(block: int) -> Any:
            def hook(module: nn.Module, inputs: Any, output: Any) -> None:
                states[block] = output[0] if isinstance(output, tuple) else output

            return hook

        handles = [self.layers[block].register_forward_hook(keep(block)) for block in sorted(wanted)]
        try:
            yield states
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def _up_to(self, last: int) -> Iterator[None]:
        if last == len(self.layers) - 1:
            yield
            return
        setattr(self.decoder, self._name, self.layers[: last + 1])
        try:
            yield
        finally:
            setattr(self.decoder, self._name, self.layers)
