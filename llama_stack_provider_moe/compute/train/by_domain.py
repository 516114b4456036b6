"""Figures of each domain of a job's data: the loss of a step, and the sums of an evaluation.

TRL's trainers give one loss for a micro-batch. The log-probabilities of its tokens are in the model's output, which a
hook sees; each row's sum goes to its domain.
"""

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from llama_stack_provider_moe.compute.data.domains import Domains
from llama_stack_provider_moe.compute.runtime.peers import Peers
from llama_stack_provider_moe.compute.train.held_out import HeldOut


class TokenFigures(Protocol):
    """What TRL's output head returns (see `models.heads`); T tokens are predicted.

    Attributes:
        log_probs: (B, T), 0 where nothing is learnt.
        label_mask: (B, T), whether the token is learnt.
    """

    log_probs: Tensor
    label_mask: Tensor


class DomainLosses:
    """The loss of each domain over a step's tokens, in nats per token.

    Args:
        model: the trained model.
        domains: of its rows.
    """

    def __init__(self, model: nn.Module, domains: Domains) -> None:
        self._names = domains.names
        self._sums_2D: Tensor | None = None  # negative log-likelihood and tokens of the step; on the device
        self._seen: TokenFigures | None = None
        model.register_forward_hook(self._see)

    def _see(self, model: nn.Module, inputs: object, outputs: TokenFigures) -> None:
        if torch.is_grad_enabled():
            self._seen = outputs

    def add(self, domain_B: Tensor) -> None:
        """Add the micro-batch that the model has just seen; `domain_B` has the domain of each row."""
        assert self._seen is not None, "the model ran with gradients"
        seen, self._seen = self._seen, None
        with torch.no_grad():
            nll_B = -seen.log_probs.detach().double().sum(dim=1)
            sums_2B = torch.stack([nll_B, seen.label_mask.sum(dim=1).double()])
            sums_2D = sums_2B.new_zeros(2, len(self._names))
            sums_2D.index_add_(1, domain_B.to(sums_2B.device), sums_2B)
            self._sums_2D = sums_2D if self._sums_2D is None else self._sums_2D + sums_2D

    def forget(self) -> None:
        """Let go of the last output: of a micro-batch that does not count."""
        self._seen = None

    def take(self, peers: Peers) -> dict[str, float]:
        """`loss/DOMAIN` over all processes since the last call, for each domain that had tokens."""
        width = len(self._names)
        mine = [0.0] * 2 * width if self._sums_2D is None else self._sums_2D.flatten().tolist()
        self._sums_2D = None
        summed = peers.sums(mine)
        return {
            f"loss/{name}": nll / tokens
            for name, nll, tokens in zip(self._names, summed[:width], summed[width:], strict=True)
            if tokens > 0
        }


def masks(names: Sequence[str], domain_B: Tensor, mask_BT: Tensor) -> dict[str, Tensor]:
    """Masks (B, T) of the tokens of each domain in a batch, by name.

    Args:
        names: of all domains.
        domain_B: the domain of each row; of pairs, of each pair.
        mask_BT: 1 for tokens that are no padding; the rows of pairs are all chosen answers, then all rejected ones.
    """
    of_rows_B = domain_B.repeat(mask_BT.shape[0] // domain_B.shape[0])
    return {names[index]: mask_BT * (of_rows_B == index).unsqueeze(-1) for index in sorted(set(of_rows_B.tolist()))}


def figures_of(held_out: HeldOut, by_domain: Mapping[str, HeldOut], peers: Peers) -> dict[str, float]:
    """The figures of all held-out rows over all processes, and `NAME/DOMAIN` for each domain's."""
    figures = held_out.over(peers).figures()
    for domain, sums in by_domain.items():
        figures |= {f"{name}/{domain}": value for name, value in sums.over(peers).figures().items()}
    return figures


def held_out_by(domains: Domains | None) -> dict[str, HeldOut]:
    """Empty sums of an evaluation for each domain that has held-out rows; the same in every process."""
    if domains is None:
        return {}
    return {name: HeldOut() for name, rows in zip(domains.names, domains.held_out, strict=True) if rows}
