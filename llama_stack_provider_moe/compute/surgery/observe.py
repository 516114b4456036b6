"""What calibration rows show of experts beside their use: mean outputs, likeness to the router, and router inputs.

Shapes: L layers with experts, T tokens, E experts, H width of the residual stream.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from llama_stack_provider_moe.compute.analysis.routing_report import Prompt
from llama_stack_provider_moe.compute.export.shard_files import Progress
from llama_stack_provider_moe.compute.moe.layout import ExpertLayout
from llama_stack_provider_moe.compute.surgery.calibrate import SCALED_INPUTS, batches
from llama_stack_provider_moe.errors import LayoutError
from llama_stack_provider_moe.ground import liveness

_Sums = dict[int, Tensor]
# What is added up for one layer: gets the layer, its router, the router's input and output, and the counted tokens.
_Hook = Callable[[int, nn.Module, Tensor, tuple[Tensor, ...], Tensor], Tensor]


def mean_outputs(
    model: nn.Module, layout: ExpertLayout, prompts: Sequence[Prompt], batch_size: int, progress: Progress
) -> Tensor:
    """Mean output (L, E, H) of each expert over all tokens, whether they chose it or not, in fp64 (arXiv 2410.08589).

    Every expert computes every token, so a pass takes E / K times as long as an ordinary one in these layers.

    Args:
        model: in evaluation mode.
        layout: of its experts.
        prompts: rows.
        batch_size: rows in one pass.
        progress: called with the number of rows that are done and their total.

    Raises:
        LayoutError: the experts' module is called in a way that is not known.
    """
    sums: _Sums = {}
    hidden: dict[int, Tensor] = {}
    counted = _Counted()

    def see_router(layer: int) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _router, given: hidden.update({layer: given[0].detach()})

    def see_experts(layer: int) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(experts: nn.Module, given: tuple[Tensor, ...], _output: Tensor) -> None:
            added_EH = _summed_outputs(experts, given, hidden[layer], layout.num_experts, counted.token_T)
            sums[layer] = sums[layer] + added_EH if layer in sums else added_EH

        return hook

    handles = [each.register_forward_pre_hook(see_router(layer)) for layer, each in layout.routers(model).items()]
    handles += [each.register_forward_hook(see_experts(layer)) for layer, each in layout.experts(model).items()]
    with _removed(handles):
        tokens = _run(model, prompts, batch_size, counted, "measuring mean outputs", progress)
    return torch.stack([sums[layer] for layer in layout.moe_layers]) / tokens


def _summed_outputs(
    experts: nn.Module, given: tuple[Tensor, ...], hidden: Tensor, count: int, token_T: Tensor
) -> Tensor:
    """Sum (E, H) of each expert's outputs over the counted tokens, with weight 1."""
    if type(experts).__name__ in SCALED_INPUTS:
        hidden_TH = hidden.reshape(-1, hidden.shape[-1])
        made_ETH = experts.forward(hidden_TH.repeat(count, 1)).view(count, *hidden_TH.shape)
        found: Tensor = torch.einsum("eth,t->eh", made_ETH.double(), token_T).cpu()
        return found
    if len(given) != 3 or given[1].is_floating_point():
        raise LayoutError(f"{type(experts).__name__}: is not called with tokens, chosen experts and their weights, so "
                          "its outputs can't be measured; expected surgery.by 'weights'")  # fmt: skip
    hidden_TH, chosen_TK, weight_TK = given
    sums = []
    for expert in range(count):
        one_T1, weight_T1 = torch.full_like(chosen_TK[:, :1], expert), torch.ones_like(weight_TK[:, :1])
        # `forward`, not a call: the hook that calls this must not see it.
        made_TH = experts.forward(hidden_TH, one_T1, weight_T1)
        sums.append((token_T @ made_TH.reshape(len(token_T), -1).double()).cpu())
        liveness.alive()
    return torch.stack(sums)


def logit_products(
    model: nn.Module, layout: ExpertLayout, prompts: Sequence[Prompt], batch_size: int, progress: Progress
) -> Tensor:
    """Inner products (L, E, E) of the experts' router logits over all tokens, in fp64; see `mean_outputs`."""

    def products(_layer: int, _router: nn.Module, _input: Tensor, made: tuple[Tensor, ...], token_T: Tensor) -> Tensor:
        logits_TE = made[layout.logits_at].reshape(-1, layout.choices)[:, : layout.num_experts].double()
        return logits_TE.mT @ (token_T[:, None] * logits_TE)

    sums, _ = _of_routers(model, layout, prompts, batch_size, products, "comparing router logits", progress)
    return torch.stack([sums[layer] for layer in layout.moe_layers])


def mean_router_inputs(
    model: nn.Module, layout: ExpertLayout, prompts: Sequence[Prompt], batch_size: int, progress: Progress
) -> Tensor:
    """Mean (L, H) of what each router's matrix is multiplied with, over all tokens, in fp64; see `mean_outputs`."""

    def inputs(_layer: int, _router: nn.Module, given_TH: Tensor, _made: object, token_T: Tensor) -> Tensor:
        return token_T @ given_TH.reshape(len(token_T), -1).double()

    sums, tokens = _of_routers(model, layout, prompts, batch_size, inputs, "measuring router inputs", progress)
    return torch.stack([sums[layer] for layer in layout.moe_layers]) / tokens


class _Counted:
    """Which tokens of the pass that runs are not padding: 1.0 or 0.0, (T,) in fp64."""

    token_T: Tensor = torch.zeros(0, dtype=torch.float64)


class _LinearInput(TorchFunctionMode):
    """Keeps what a router multiplies with its matrix of `rows` rows."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self._rows = rows
        self.found: list[Tensor] = []

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: Collection[type],
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        made = func(*args, **(kwargs or {}))
        if func is functional.linear and isinstance(made, Tensor) and made.shape[-1] == self._rows:
            given = args[0]
            assert isinstance(given, Tensor), "linear gets tensors"
            self.found.append(given.detach())
        return made


def _of_routers(
    model: nn.Module,
    layout: ExpertLayout,
    prompts: Sequence[Prompt],
    batch_size: int,
    hook: _Hook,
    stage: str,
    progress: Progress,
) -> tuple[_Sums, int]:
    """Layer -> the sum of what `hook` returns, on the CPU; and the number of tokens."""
    sums: _Sums = {}
    counted = _Counted()
    running: list[_LinearInput] = []

    def begin(rows: int) -> Callable[..., None]:
        def enter(*_: object) -> None:
            running.append(_LinearInput(rows))
            running[-1].__enter__()  # type: ignore[no-untyped-call]

        return enter

    def end(layer: int) -> Callable[..., None]:
        def leave(router: nn.Module, _inputs: object, made: tuple[Tensor, ...] | None) -> None:
            mode = running.pop()
            mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]
            if made is None:  # the router failed, and its error goes on
                return
            assert len(mode.found) == 1, f"{type(router).__name__} computed its logits {len(mode.found)} times"
            added = hook(layer, router, mode.found[0], made, counted.token_T).cpu()
            sums[layer] = sums[layer] + added if layer in sums else added

        return leave

    handles = []
    for layer, router in layout.routers(model).items():
        rows = router.get_parameter(layout.router_weight).shape[0]
        handles.append(router.register_forward_pre_hook(begin(rows)))
        handles.append(router.register_forward_hook(end(layer), always_call=True))
    with _removed(handles):
        return sums, _run(model, prompts, batch_size, counted, stage, progress)


@contextmanager
def _removed(handles: Sequence[torch.utils.hooks.RemovableHandle]) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _run(
    model: nn.Module, prompts: Sequence[Prompt], batch_size: int, counted: _Counted, stage: str, progress: Progress
) -> int:
    """Run the rows through the model, and return the number of their tokens."""
    done = 0
    with torch.no_grad(), liveness.stage(stage, len(prompts), "rows") as counter:
        for ids_BT, mask_BT in batches(model, prompts, batch_size):
            counted.token_T = mask_BT.reshape(-1).double()
            model(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False, logits_to_keep=1)
            done += len(ids_BT)
            counter.at(done, len(prompts))
            progress(done, len(prompts))
    return sum(len(prompt.ids) for prompt in prompts)
