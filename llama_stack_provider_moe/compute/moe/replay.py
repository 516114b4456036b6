"""Replay routes: record the experts that every router chooses, and make later passes use the same ones.

While a router runs, its own choice is found where it calls `topk` over all experts (or, in SparseMixer, `max` once for
each), and replaced there. So the family's own code computes the weights of the replayed experts from the logits of the
pass: softmax or sigmoid, renormalised or not, without a bias that only affects the choice, and without a limit to
groups. `require_replay` tries it with a copy of each class of router.

Shapes: B rows, S positions, T = B x S, L layers whose router chooses, E choices, K choices of a token. -1 in routes
means that a token has none: its router chooses.
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from llama_stack_provider_moe.compute.moe.layout import ExpertLayout, text_config
from llama_stack_provider_moe.compute.moe.router_probe import Trial, chosen_of, formulas
from llama_stack_provider_moe.errors import ModelError

_TOPK = (torch.topk, Tensor.topk)
_MAX = (torch.max, Tensor.max)


class Choosing(TorchFunctionMode):
    """Find a router's choice while it runs; replace it by `forced_TK`, except where that is -1.

    Args:
        choices: E.
        top_k: K.
        forced_TK: int64; None: the router chooses.
    """

    def __init__(self, choices: int, top_k: int, forced_TK: Tensor | None) -> None:
        super().__init__()
        self._choices, self._top_k, self._forced_TK = choices, top_k, forced_TK
        self._own: list[Tensor] = []  # one with all K columns, or one for each
        self._used: list[Tensor] = []

    @property
    def complete(self) -> bool:
        """Whether one choice of K experts was found, no more and no less."""
        return sum(each.shape[1] for each in self._own) == self._top_k

    @property
    def own_TK(self) -> Tensor:
        """What the router would have chosen."""
        return torch.cat(self._own, dim=1)

    @property
    def used_TK(self) -> Tensor:
        """What it was made to use."""
        return torch.cat(self._used, dim=1)

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: Collection[type],
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        given = kwargs or {}
        made = func(*args, **given)
        scores = args[0] if args else None
        if func not in _TOPK + _MAX or not isinstance(made, tuple) or not isinstance(scores, Tensor):
            return made
        index = made[1]
        columns = self._top_k if func in _TOPK else 1
        if scores.dim() != 2 or scores.shape[1] != self._choices or index.shape != (len(scores), columns):
            return made
        before = sum(each.shape[1] for each in self._own)
        self._own.append(index)
        if self._forced_TK is None or before + columns > self._top_k:
            self._used.append(index)
            return made
        forced = self._forced_TK[:, before : before + columns]
        used = torch.where(forced < 0, index, forced)
        self._used.append(used)
        kind = torch.return_types.topk if func in _TOPK else torch.return_types.max
        return kind((scores.gather(1, used), used))


class Replay:
    """Hooks on the routers of a model, which do nothing until `recording` or `force`.

    A pass of a checkpointed layer in backward uses the routes of its forward, because these stay until `rest`.

    Args:
        model: with or without adapters.
        layout: the model's layout; see `require_replay`.
    """

    def __init__(self, model: nn.Module, layout: ExpertLayout) -> None:
        self._layout = layout
        self.layers = tuple(layer for layer in layout.moe_layers if layer not in layout.by_token_layers)
        self._forced: list[Tensor] | None = None
        self._recorded: list[list[Tensor]] | None = None
        self._own: dict[int, Tensor] | None = None
        self._wrong: Tensor | None = None
        self._running: list[Choosing] = []
        self._last: dict[int, Choosing] = {}  # of each router that is made to use routes
        routers = layout.routers(model)
        for at, layer in enumerate(self.layers):
            routers[layer].register_forward_pre_hook(partial(self._begin, at))
            routers[layer].register_forward_hook(partial(self._end, at), always_call=True)

    def force(self, routes_BSLK: Tensor) -> None:
        """Make the passes until `rest` use these routes."""
        shape = (len(self.layers), self._layout.top_k)
        assert routes_BSLK.shape[2:] == shape, f"routes of {tuple(routes_BSLK.shape[2:])}, expected {shape}"
        self._forced = list(routes_BSLK.flatten(0, 1).long().unbind(dim=1))

    def rest(self) -> None:
        """Let routers choose again."""
        self._forced = None
        self._last.clear()

    def own_choice(self, layer: int) -> Tensor | None:
        """The experts (T, K) that a layer's router would have chosen in its last pass; None: they are those it used."""
        if self._forced is None or layer not in self.layers:
            return None
        return self._last[self.layers.index(layer)].own_TK

    @contextmanager
    def recording(self, rows: int) -> Iterator[list[Tensor]]:
        """Yield a list that has, after the `with`, the routes (B, S, L, K) of the passes inside, one after another.

        Args:
            rows: B, of each pass.
        """
        found: list[Tensor] = []
        self._recorded = [[] for _ in self.layers]
        try:
            yield found
            by_layer = [
                torch.cat([each_TK.reshape(rows, -1, self._layout.top_k) for each_TK in passes], dim=1)
                for passes in self._recorded
            ]
            found.append(torch.stack([each.to(by_layer[0].device) for each in by_layer], dim=2))
        finally:
            self._recorded = None

    @contextmanager
    def observing(self, rows: int) -> Iterator[list[Tensor]]:
        """Yield a list that has, after the `with`, the experts (B, S, L, K) that routers would have chosen themselves.

        Inside, one pass of the model.

        Raises:
            ModelError: a router did not return the routes that it was made to use.
        """
        found: list[Tensor] = []
        self._own, self._wrong = {}, None
        try:
            yield found
            assert len(self._own) == len(self.layers), "a router did not run"
            own = [self._own[at].reshape(rows, -1, self._layout.top_k) for at in range(len(self.layers))]
            found.append(torch.stack([each.to(own[0].device) for each in own], dim=2))
            wrong: Tensor | None = self._wrong  # set by the hooks
            if wrong is not None and bool(wrong):
                raise ModelError("rl.routing_replay: a router did not use the routes that it was given")
        finally:
            self._own = None

    def _begin(self, at: int, *_: object) -> None:
        if self._forced is None and self._recorded is None and self._own is None:
            return
        forced_TK = None if self._forced is None else self._forced[at]
        self._running.append(Choosing(self._layout.choices, self._layout.top_k, forced_TK))
        if forced_TK is not None:
            self._last[at] = self._running[-1]
        self._running[-1].__enter__()  # type: ignore[no-untyped-call]

    def _end(self, at: int, router: nn.Module, _inputs: object, outputs: tuple[Tensor, ...] | None) -> None:
        if not self._running:
            return
        choosing = self._running.pop()
        choosing.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        if outputs is None:  # the router failed
            return
        assert choosing.complete, f"{type(router).__name__} did not choose once"
        with torch.no_grad():
            if self._recorded is not None:
                self._recorded[at].append(choosing.used_TK.to(torch.int16))
            if self._own is None:
                return
            assert at not in self._own, "more than one pass"
            self._own[at] = choosing.own_TK.to(torch.int16)
            if self._layout.chosen_at < len(outputs):
                used_TK = choosing.used_TK
                wrong = (outputs[self._layout.chosen_at].reshape(used_TK.shape) != used_TK).any()
                self._wrong = wrong if self._wrong is None else self._wrong | wrong.to(self._wrong.device)


def require_replay(model: PreTrainedModel, layout: ExpertLayout) -> None:
    """Check with copies of a model's routers that their code computes right weights for replayed experts.

    The router's own choice, replayed, gives the same outputs bit by bit. Another token's choice gives the same logits,
    that choice, and weights by the same formula.

    Raises:
        ModelError: a router's choice can't be replaced exactly.
    """
    tried: set[type] = set()
    for layer, router in layout.routers(model).items():
        if layer in layout.by_token_layers or type(router) in tried:
            continue
        tried.add(type(router))
        trial = Trial(router, layout.submodule(model, layer, layout.block), text_config(model).hidden_size)
        if not _is_exact(trial, router, layout):
            raise ModelError(f"rl.routing_replay: is not possible with {layout.model_type}: the choice of its "
                             f"{type(router).__name__} can't be replaced exactly; expected 'off'")  # fmt: skip


def _is_exact(trial: Trial, router: nn.Module, layout: ExpertLayout) -> bool:
    before, free = _tried(trial, layout, None)
    if not free.complete:
        return False
    same, _ = _tried(trial, layout, free.own_TK)
    other_TK = free.own_TK.roll(1, dims=0)
    after, forced = _tried(trial, layout, other_TK)
    at, width = layout.logits_at, layout.choices
    if not forced.complete or not torch.equal(before[at], after[at]):
        return False
    if len(same) != len(before) or not all(map(torch.equal, before, same)):
        return False
    chosen_TK, _ = chosen_of(router, after, at, width)
    if not torch.equal(chosen_TK.sort(dim=1).values, other_TK.sort(dim=1).values):
        return False
    return formulas(router, before, at, width) == formulas(router, after, at, width)


def _tried(trial: Trial, layout: ExpertLayout, forced_TK: Tensor | None) -> tuple[list[Tensor], Choosing]:
    choosing = Choosing(layout.choices, layout.top_k, forced_TK)
    with torch.device("cpu"), choosing:
        return trial.run(), choosing
