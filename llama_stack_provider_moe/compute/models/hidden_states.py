"""Hidden states of chosen decoder blocks, running no more of the model than they need.

Forward hooks on these blocks take the states: 3 of 48 blocks hold 94 % less than all `hidden_states`
(`python -m benchmarks.breaker_memory`). The hooks exist only during a forward pass, so when gradient checkpointing runs
a block again in backward, they do not take the states twice.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method

from llama_stack_provider_moe.compute.moe.layout import decoder_layers, without_adapters

EMBEDDINGS = -1  # as a block's number: the input of block 0, `hidden_states[0]`
_METHOD = "states_of_blocks"


class Blocks:
    """The decoder blocks of a model, counted from 0; block i's output is transformers' `hidden_states[i + 1]`.

    The last of the `hidden_states` is not a block's output but the final norm's. Ask for it as number `final`, and for
    the embeddings as `EMBEDDINGS`.

    Args:
        model: with or without adapters.
    """

    def __init__(self, model: nn.Module) -> None:
        path, self.layers = decoder_layers(model)
        parent, _, self._name = path.rpartition(".")
        whole: nn.Module = without_adapters(model)
        self.decoder: nn.Module = whole.get_submodule(parent)
        self.final = len(self.layers)
        self._run = self._run_decoder
        if isinstance(whole, FSDPModule):
            # With FSDP2, processes gather the weights in step with passes of the whole model.
            vars(whole)[_METHOD] = self._run_decoder
            register_fsdp_forward_method(whole, _METHOD)
            self._run = getattr(whole, _METHOD)

    def states(
        self, wanted: Collection[int], input_ids: Tensor, attention_mask: Tensor, whole: bool = False
    ) -> dict[int, Tensor]:
        """The outputs of the blocks `wanted`, (batch, sequence, width), from a pass that ends at the last of them.

        The output head never runs. The caller chooses gradients, autocast, and adapters on or off.

        Args:
            wanted: block numbers, or `EMBEDDINGS`, or `final`, which needs `whole`.
            input_ids: (batch, sequence).
            attention_mask: the same shape, 0 where a token is padding.
            whole: run the blocks above too, because something else needs them (the routers' balance).
        """
        last = len(self.layers) - 1 if whole else max(wanted)
        return self._run(wanted, last, input_ids, attention_mask)

    def drop_above(self, last: int) -> None:
        """Let go of the blocks above `last`. The output head goes with the model, once the caller lets go of that."""
        self.layers = self.layers[: last + 1]
        self.final = len(self.layers)
        setattr(self.decoder, self._name, self.layers)

    def _run_decoder(
        self, wanted: Collection[int], last: int, input_ids: Tensor, attention_mask: Tensor
    ) -> dict[int, Tensor]:
        with self.kept(wanted) as states, self._up_to(last):
            self.decoder(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        return states

    @contextmanager
    def kept(self, wanted: Collection[int]) -> Iterator[dict[int, Tensor]]:
        """Keep the outputs of the blocks `wanted` in passes inside the `with`; a later pass replaces an earlier one."""
        states: dict[int, Tensor] = {}

        def keep(block: int) -> Callable[[nn.Module, object, Tensor | tuple[Tensor, ...]], None]:
            def hook(module: nn.Module, inputs: object, output: Tensor | tuple[Tensor, ...]) -> None:
                states[block] = _one_width(output if isinstance(output, Tensor) else output[0])

            return hook

        def keep_input(module: nn.Module, inputs: tuple[Tensor, ...], keywords: Mapping[str, Tensor]) -> None:
            states[EMBEDDINGS] = _one_width(inputs[0] if inputs else keywords["hidden_states"])

        handles = [
            self.layers[0].register_forward_pre_hook(keep_input, with_kwargs=True)
            if block == EMBEDDINGS
            else (self.decoder if block == self.final else self.layers[block]).register_forward_hook(keep(block))
            for block in sorted(wanted)
        ]
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


def _one_width(states: Tensor) -> Tensor:
    """(batch, sequence, width); DeepSeek-V4 and others carry several streams, (batch, sequence, streams, width)."""
    return states.flatten(2)
