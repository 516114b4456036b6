"""What a router returns, found by running a copy of it: positions in its output, top-k, scoring, bias for the choice.

The copy has random weights in fp32 on the CPU, so the model is never run or changed: it may be on a GPU, quantised,
sharded, or without weights (the meta device).

T tokens, W outputs of the router (experts, and choices that compute nothing), K choices per token, H hidden size.
"""

import copy
import inspect
import math
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from llama_stack_provider_moe.compute.moe.scoring import SCORES, Scoring, Weighing
from llama_stack_provider_moe.errors import LayoutError

TOKENS = 64
_VOCABULARY = 32
_CLOSE = 1e-3


@dataclass(frozen=True)
class RouterFacts:
    """What the probe found out about a router.

    Attributes:
        width: W.
        top_k: K.
        logits_at: position of the logits (T, W) in the router's output.
        chosen_at: position of the chosen experts (T, K); after the last position if the output has none.
        scoring: how logits become scores; None: no known formula gives the weights.
        bias: name of the tensor that only affects the choice, below the router or (first item "block") beside it.
        by_token: experts depend on the token's id, not on the logits.
        weighing: what the weights of the chosen experts depend on.
        groups_used: most groups of experts that a token used, by number of groups; see `most_groups`.
    """

    width: int
    top_k: int
    logits_at: int
    chosen_at: int
    scoring: Scoring | None
    bias: tuple[str, str] | None
    by_token: bool
    weighing: Weighing
    chosen_TK: Tensor

    def most_groups(self, groups: int) -> int:
        """The most groups, of `groups` of equal size, that the experts of one token came from."""
        group_TK = self.chosen_TK // (self.width // groups)
        return max(len(set(row)) for row in group_TK.tolist())


def probe(router: nn.Module, block: nn.Module, hidden: int, logits_at: int | None) -> RouterFacts:
    """Run a copy of `router` on random tokens.

    Args:
        router: the router of one layer, without adapters.
        block: the module that calls it; it may own tensors that it passes to its router.
        hidden: H.
        logits_at: position of the logits, where the model states it.

    Raises:
        LayoutError: the router can't be called, or its output is not understood.
    """
    with torch.device("cpu"):  # not the one on which the caller may be building a model
        return _probe(router, Trial(router, block, hidden), logits_at)


def _probe(router: nn.Module, trial: "Trial", logits_at: int | None) -> RouterFacts:
    outputs = trial.run()
    at, logits_TW = _logits(router, outputs, logits_at)
    width = logits_TW.shape[1]
    found = _chosen(outputs, width)
    chosen_at = len(outputs) if found is None else found[0]
    chosen_TK, weights_TK = chosen_of(router, outputs, at, width)
    by_token = trial.takes_ids and bool((chosen_TK == trial.other_tokens(chosen_at)).all())
    return RouterFacts(
        width=width,
        top_k=chosen_TK.shape[1],
        logits_at=at,
        chosen_at=chosen_at,
        scoring=_scoring(logits_TW, chosen_TK, weights_TK) or _scoring_of_two(trial, at, width, chosen_TK),
        bias=None if by_token else trial.choice_bias(at, width),
        by_token=by_token,
        weighing=_weighing(logits_TW, chosen_TK, weights_TK),
        chosen_TK=chosen_TK,
    )


class Trial:
    """A copy of a router with random weights, and the other arguments of its forward."""

    def __init__(self, router: nn.Module, block: nn.Module, hidden: int) -> None:
        self._random = torch.Generator().manual_seed(0)
        self._name = type(router).__name__
        self._router = self._copy(router).eval()
        self._tokens = self._normal((1, TOKENS, hidden))
        self._ids_1T = torch.randint(_VOCABULARY, (1, TOKENS), generator=self._random)
        self._beside: dict[str, Tensor] = {}
        self._arguments: dict[str, object] = {}
        self.takes_ids = False
        _self, _tokens, *others = inspect.signature(type(router).forward).parameters.values()
        for parameter in others:
            self._take(parameter, block)
        # A router that keeps the shape of its input expects tokens without a batch; others may need to see a batch.
        if self.run()[0].dim() == self._tokens.dim():
            self._tokens = self._tokens[0]

    def run(self) -> list[Tensor]:
        """The tensors in the router's output, in order."""
        with torch.no_grad():
            made = self._router(self._tokens, **self._arguments)
        return [each for each in (made if isinstance(made, tuple) else (made,)) if isinstance(each, Tensor)]

    def other_tokens(self, chosen_at: int) -> Tensor:
        """(T, K) chosen for other hidden states with the same ids."""
        kept = self._tokens
        self._tokens = self._normal(tuple(kept.shape))
        try:
            outputs = self.run()
        finally:
            self._tokens = kept
        return outputs[chosen_at].reshape(TOKENS, -1)

    def choice_bias(self, logits_at: int, width: int) -> tuple[str, str] | None:
        """The one tensor that changes the choice and not the logits."""
        before = self.run()
        found = []
        for place, name, tensor in self._vectors():
            kept = tensor.clone()
            tensor.view(-1).copy_(torch.linspace(-4, 4, tensor.numel()))
            after = self.run()
            tensor.copy_(kept)
            same_logits = torch.equal(before[logits_at], after[logits_at])
            if same_logits and not torch.equal(_ranked(before, width), _ranked(after, width)):
                found.append((place, name))
        if len(found) > 1:
            raise LayoutError(f"{self._name}: more than one tensor changes the choice of experts: {found}")
        return found[0] if found else None

    def _vectors(self) -> Iterator[tuple[str, str, Tensor]]:
        for name, tensor in [*self._router.named_parameters(), *self._router.named_buffers()]:
            if tensor.numel() == max(tensor.shape, default=0) and "bias" in name:
                yield "router", name, tensor.data
        for name, tensor in self._beside.items():
            yield "block", name, tensor

    def _take(self, parameter: inspect.Parameter, block: nn.Module) -> None:
        """Find an argument by its name: ids of tokens, or a tensor of the block."""
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            return
        if parameter.name == "input_ids":
            self.takes_ids = True
            self._arguments["input_ids"] = self._ids_1T
        elif hasattr(block, parameter.name):
            value = getattr(block, parameter.name)
            if isinstance(value, Tensor):
                value = self._beside[parameter.name] = torch.zeros(value.shape, dtype=torch.float32)
            self._arguments[parameter.name] = value
        elif parameter.default is parameter.empty:
            raise LayoutError(
                f"{self._name}: its forward needs {parameter.name!r}, which its block {type(block).__name__} does not "
                "have"
            )

    def _copy(self, router: nn.Module) -> nn.Module:
        memo: dict[int, object] = {}
        for name, parameter in router.named_parameters():
            memo[id(parameter)] = nn.Parameter(self._filled(name, parameter), requires_grad=False)
        for name, buffer in router.named_buffers():
            memo[id(buffer)] = self._filled(name, buffer)
        copied = copy.deepcopy(router, memo)
        for module in copied.modules():
            module._forward_hooks.clear()
            module._forward_pre_hooks.clear()
        return copied

    def _filled(self, name: str, tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            # A table from a token's id to its experts.
            return torch.randint(2, tuple(tensor.shape), generator=self._random).to(tensor.dtype)
        if tensor.numel() > max(tensor.shape, default=1):
            return self._normal(tuple(tensor.shape)) * (2 / math.sqrt(tensor.shape[-1]))
        made = torch.zeros if "bias" in name else torch.ones
        return made(tensor.shape, dtype=torch.float32)

    def _normal(self, shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=self._random, dtype=torch.float32)


def _logits(router: nn.Module, outputs: list[Tensor], stated: int | None) -> tuple[int, Tensor]:
    """Position and (T, W) of the logits: where the model states them, else the first output of real numbers."""
    at = next((at for at, each in enumerate(outputs) if each.is_floating_point()), None) if stated is None else stated
    if at is None or at >= len(outputs) or outputs[at].numel() % TOKENS:
        raise LayoutError(f"{type(router).__name__}: no logits in its output {[tuple(each.shape) for each in outputs]}")
    return at, outputs[at].reshape(TOKENS, -1).float()


def _chosen(outputs: list[Tensor], width: int) -> tuple[int, Tensor, Tensor] | None:
    """Position of the chosen experts, (T, K) of them and of their weights; None if no output has whole numbers."""
    for at, each in enumerate(outputs):
        if not each.is_floating_point():
            chosen_TK = each.reshape(TOKENS, -1)
            weights = [other.reshape(TOKENS, -1).float() for other in outputs
                       if other.is_floating_point() and other.numel() == each.numel()]  # fmt: skip
            # With K = W, logits and weights have the same shape, and weights come last.
            return (at, chosen_TK, weights[-1]) if weights else None
    return None


def _by_weights(router: nn.Module, outputs: list[Tensor], logits_at: int, width: int) -> tuple[Tensor, Tensor]:
    """(T, K) chosen and their weights, from weights (T, W) that are zero for all other experts."""
    for at, each in enumerate(outputs):
        if at != logits_at and each.numel() == TOKENS * width:
            weights_TW = each.reshape(TOKENS, width).float()
            counts = set(weights_TW.ne(0).sum(dim=1).tolist())
            if len(counts) == 1 and (count := counts.pop()):
                weights_TK, chosen_TK = weights_TW.topk(count, dim=1)
                return chosen_TK, weights_TK
    raise LayoutError(
        f"{type(router).__name__}: no chosen experts in its output {[tuple(each.shape) for each in outputs]}"
    )


def _ranked(outputs: list[Tensor], width: int) -> Tensor:
    found = _chosen(outputs, width)
    return torch.zeros(0) if found is None else found[1].sort(dim=1).values


def _scoring(logits_TW: Tensor, chosen_TK: Tensor, weights_TK: Tensor) -> Scoring | None:
    """The formula whose scores are the weights, up to one factor for all tokens or one for each."""
    used_T = weights_TK.ne(0).all(dim=1)  # a choice without weight computes nothing (Zaya's skip)
    for exact in (True, False):
        for name, score in SCORES.items():
            ratio_TK = (weights_TK / _of_chosen(score, logits_TW, chosen_TK))[used_T]
            like_TK = (ratio_TK[:1, :1] if exact else ratio_TK[:, :1]).expand_as(ratio_TK)
            if (exact or ratio_TK.shape[1] > 1) and torch.allclose(ratio_TK, like_TK, rtol=_CLOSE):
                return name
    return None


def _weighing(logits_TW: Tensor, chosen_TK: Tensor, weights_TK: Tensor) -> Weighing:
    """Weights that are the scores, times one factor for all tokens, were not renormalised."""
    used_T = weights_TK.ne(0).all(dim=1)
    for name, score in SCORES.items():
        ratio_TK = (weights_TK / _of_chosen(score, logits_TW, chosen_TK))[used_T]
        if torch.allclose(ratio_TK, ratio_TK[:1, :1].expand_as(ratio_TK), rtol=_CLOSE):
            # `given` scores are probabilities of all experts.
            sums = name in ("softmax", "given") and chosen_TK.shape[1] < logits_TW.shape[1]
            return "all" if sums else "chosen" if name in ("softmax", "given") else "own"
    return "chosen"


def _scoring_of_two(trial: Trial, logits_at: int, width: int, chosen_TK: Tensor) -> Scoring | None:
    """The formula where a token has one expert, whose weight may be normalised to 1: that of two experts shows it."""
    if chosen_TK.shape[1] > 1:
        return None
    with _TopTwo(width):
        outputs = trial.run()
    found = _chosen(outputs, width)
    if found is None or found[1].shape[1] != 2:
        return None
    return _scoring(outputs[logits_at].reshape(TOKENS, -1).float(), found[1], found[2])


class _TopTwo(TorchFunctionMode):
    """Inside, a choice of the greatest of `width` numbers is one of the greatest two."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self._width = width

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: Collection[type],
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        given = dict(kwargs or {})
        first = args[0] if args else None
        if func in (torch.topk, Tensor.topk) and isinstance(first, Tensor) and first.shape[-1] == self._width:
            if len(args) > 1 and args[1] == 1:
                args = (first, 2, *args[2:])
            elif given.get("k") == 1:
                given["k"] = 2
        return func(*args, **given)


def chosen_of(router: nn.Module, outputs: list[Tensor], logits_at: int, width: int) -> tuple[Tensor, Tensor]:
    """(T, K) of the experts in the outputs of a trial, and of their weights."""
    found = _chosen(outputs, width)
    return _by_weights(router, outputs, logits_at, width) if found is None else found[1:]


def formulas(router: nn.Module, outputs: list[Tensor], logits_at: int, width: int) -> tuple[Scoring | None, Weighing]:
    """What gives the weights of the chosen experts in the outputs of a trial."""
    chosen_TK, weights_TK = chosen_of(router, outputs, logits_at, width)
    logits_TW = outputs[logits_at].reshape(TOKENS, -1).float()
    return _scoring(logits_TW, chosen_TK, weights_TK), _weighing(logits_TW, chosen_TK, weights_TK)


def _of_chosen(score: Callable[[Tensor], Tensor], logits_TW: Tensor, chosen_TK: Tensor) -> Tensor:
    return score(logits_TW).gather(1, chosen_TK)
