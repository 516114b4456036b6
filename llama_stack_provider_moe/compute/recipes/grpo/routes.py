"""Routes of answers that training replays: of generating them (R3, arXiv 2510.11370), or of the old policy's pass.

Shapes: B answers, S positions of prompt and answer with padding, L layers whose router chooses, K experts of a token.
Routes are int16 (B, S, L, K); -1 where a position has none: padding, and an answer's last token, which was never run.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

from llama_stack_provider_moe.compute.moe.layout import ExpertLayout
from llama_stack_provider_moe.compute.moe.replay import Replay
from llama_stack_provider_moe.compute.runtime.peers import Peers
from llama_stack_provider_moe.errors import EngineFailed, ModelError

KEY = "routes"  # in a micro-batch
NONE = -1


class Routes:
    """Records routes once for each generation, and replays them in training.

    Args:
        model: the trained model, with its adapter.
        layout: its layout.
        of: the pass whose routes are replayed.
        peers: the job's processes, each of which has its own answers.
    """

    def __init__(self, model: nn.Module, layout: ExpertLayout, of: Literal["rollout", "policy"], peers: Peers) -> None:
        self.of, self._peers = of, peers
        self._choices, self._top_k = layout.choices, layout.top_k
        self._replay = Replay(model, layout)
        self.own_choice = self._replay.own_choice
        self._raw: Tensor | None = None  # of the generation that is being made
        self._is_new = False  # no micro-batch has learnt from it yet

    @contextmanager
    def generating(self, rows: int) -> Iterator[None]:
        """Record a generation of answers to `rows` prompts, where its routes are wanted."""
        if self.of == "policy":
            yield
            return
        with self._replay.recording(rows) as found:
            yield
        (self._raw,) = found

    def take_from_engine(self, found: Sequence[Tensor], lengths: Sequence[tuple[int, int]], layers: int) -> None:
        """Take the routes of a generation by an engine, as `generating` records them.

        Args:
            found: for each answer, of the prompt's tokens and the answer's but the last: (tokens, layers, K).
            lengths: tokens of each prompt, and of its answer.
            layers: all decoder layers of the model; an engine may have columns for those without a router too.

        Raises:
            EngineFailed: they are of another model.
        """
        own = self._replay.layers
        wanted = {len(own): list(range(len(own))), layers: list(own)}
        for each in found:
            if each.shape[1] not in wanted or each.shape[2] != self._top_k:
                raise EngineFailed(
                    f"rl.routing_replay: the engine's routes have {each.shape[1]} layers with {each.shape[2]} experts "
                    f"of a token; expected {len(own)} (or {layers}, with those that have no router) with {self._top_k}"
                )
        prompt = max(before for before, _ in lengths)
        positions = prompt + max(after for _, after in lengths) - 1
        self._raw = torch.full((len(found), positions, len(own), self._top_k), NONE, dtype=torch.int16)
        for row, (each, (before, after)) in enumerate(zip(found, lengths, strict=True)):
            first = prompt - before  # prompts are padded on the left
            self._raw[row, first : first + before + after - 1] = each[:, wanted[each.shape[1]]]

    def of_generation(self, attention_mask: Tensor, answer: int) -> Tensor:
        """The routes of the last generation.

        Args:
            attention_mask: (B, S), of prompts padded on the left, and answers padded on the right.
            answer: the positions of S that are answers'.
        """
        assert self._raw is not None, "nothing was generated"
        raw, self._raw = self._raw.to(attention_mask.device), None
        return aligned(raw, attention_mask, answer)

    @contextmanager
    def old_policy(self, routes: Tensor | None, rows: int, found: list[Tensor]) -> Iterator[None]:
        """Around the old policy's pass over `rows` answers: replay `routes`; without them, add its own to `found`."""
        if routes is not None:
            self._replay.force(routes)
            try:
                yield
            finally:
                self._replay.rest()
            return
        with self._replay.recording(rows) as recorded:
            yield
        found += recorded

    def note_generation(self, routes: Tensor) -> None:
        """Check the routes of a generation before anything learns from it.

        Raises:
            ModelError: they are not routes of this model.
        """
        require_routes(routes, self._choices)
        self._is_new = True

    @contextmanager
    def replayed(self, routes: Tensor, figures: list[float]) -> Iterator[None]:
        """Around a training pass, whose backward runs before `rest`: replay `routes`.

        Args:
            routes: of the micro-batch.
            figures: gets the share of (token, layer) of all processes whose own choice is another.

        Raises:
            ModelError: the first pass after a generation, by the same weights, would choose other experts: the routes
                belong to other positions.
        """
        self._replay.force(routes)
        with self._replay.observing(len(routes)) as found:
            yield
        same, counted = _same(found[0], routes), routes[..., 0] != NONE
        if self._is_new:
            self._is_new = False
            require_alignment(found[0], routes)
        changed, of = self._peers.sums([float((~same & counted).sum()), float(counted.sum())])
        if of:
            figures.append(changed / of)

    def rest(self) -> None:
        """End the training steps: routers choose again."""
        self._replay.rest()


def aligned(raw: Tensor, attention_mask: Tensor, answer: int) -> Tensor:
    """Routes (B, S, L, K) from those of the passes that generated (B, fewer or more positions, L, K).

    These ran the padded prompt, then each token but the last that any answer got.
    """
    rows, positions = attention_mask.shape
    prompt = positions - answer
    if raw.shape[0] != rows or raw.shape[1] < positions - 1:
        raise ModelError(f"rl.routing_replay: generating ran {tuple(raw.shape[:2])} tokens of {rows} answers with "
                         f"{positions} positions")  # fmt: skip
    ran = attention_mask.bool()
    ran = torch.cat([ran[:, :prompt], ran[:, prompt + 1 :], torch.zeros_like(ran[:, :1])], dim=1)
    routes = raw.new_full((rows, positions, *raw.shape[2:]), NONE)
    routes[:, :-1] = raw[:, : positions - 1]
    return routes.masked_fill(~ran[..., None, None], NONE)


def require_routes(routes: Tensor, choices: int) -> None:
    """Check that each token has different experts of the model, or none.

    Raises:
        ModelError: it has not.
    """
    none = (routes == NONE).all(dim=-1)
    ordered = routes.sort(dim=-1).values
    twice = (ordered[..., 1:] == ordered[..., :-1]).any(dim=-1)
    outside = ((routes < 0) | (routes >= choices)).any(dim=-1)
    if bool(((twice | outside) & ~none).any()):
        raise ModelError(f"rl.routing_replay: recorded routes have an expert twice for one token, or outside 0 to "
                         f"{choices - 1}")  # fmt: skip


def require_alignment(own: Tensor, routes: Tensor) -> None:
    """Check that `own`, chosen by the weights that `routes` are of, agrees with them, and best at the same position.

    Raises:
        ModelError: it does not.
    """
    counted = routes[..., 0] != NONE
    here = _share(_same(own, routes), counted)
    after = _share(_same(own[:, 1:], routes[:, :-1]), counted[:, :-1] & counted[:, 1:])
    before = _share(_same(own[:, :-1], routes[:, 1:]), counted[:, :-1] & counted[:, 1:])
    if counted.any() and (here < 0.5 or here < max(after, before)):
        raise ModelError(
            "rl.routing_replay: the model that wrote the answers chooses the recorded experts again for "
            f"{here:.0%} of tokens and layers ({before:.0%} one position before, {after:.0%} one after); expected more "
            "than half, and most at the same position"
        )


def _same(own: Tensor, routes: Tensor) -> Tensor:
    """(B, S, L), whether two routes are the same experts, in any order."""
    same: Tensor = (own.sort(dim=-1).values == routes.sort(dim=-1).values).all(dim=-1)
    return same


def _share(same: Tensor, counted: Tensor) -> float:
    return float(same[counted].float().mean()) if bool(counted.any()) else 0.0
