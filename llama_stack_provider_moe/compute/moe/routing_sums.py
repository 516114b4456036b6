"""How routers used their experts, as sums over tokens that stay on the device until one transfer reads all of them.

Shapes: E experts, L layers, K rows of sums: one for each layer, and one for each layer of each part of the tokens.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

ALL = ""  # the part that has all tokens
FIGURES = 7  # of each row, see `RoutingSums.read`

type Key = tuple[str, int]  # part, layer


@dataclass(frozen=True)
class LayerRouting:
    """How the router of one layer used its experts; shares and entropies (nats) over the tokens that count.

    `share` is empty where it was not read.
    """

    layer: int
    share: list[float]
    min: float
    max: float
    cv: float
    dead: int
    load_entropy: float
    token_entropy: float


@dataclass(frozen=True)
class RoutingFigures:
    """What was read of sums; layers and parts without tokens are left out.

    Attributes:
        layers: each layer, over all tokens.
        parts: part -> its layers.
        mutual_information: of part and expert in nats, with equal weight for each part, the mean over layers; None with
            less than two parts.
    """

    layers: list[LayerRouting]
    parts: dict[str, list[LayerRouting]] = field(default_factory=dict)
    mutual_information: float | None = None


@dataclass
class Tally:
    """Sums over the tokens of one layer, kept on the device until they are read."""

    counts_E: Tensor
    probs_E: Tensor
    entropy: Tensor
    tokens: Tensor

    def __add__(self, other: "Tally") -> "Tally":
        return Tally(
            self.counts_E + other.counts_E,
            self.probs_E + other.probs_E,
            self.entropy + other.entropy,
            self.tokens + other.tokens,
        )


def packed(tallies: Sequence[Tally], device: torch.device) -> Tensor:
    """Return tallies as one tensor (K, 2E + 2) in double precision, for sums over processes."""
    columns = (
        torch.stack([each.counts_E.to(device) for each in tallies]),
        torch.stack([each.probs_E.to(device) for each in tallies]),
        torch.stack([each.entropy.to(device) for each in tallies]).unsqueeze(1),
        torch.stack([each.tokens.to(device) for each in tallies]).unsqueeze(1),
    )
    return torch.cat(columns, dim=1).double()


@dataclass(frozen=True)
class RoutingSums:
    """Sums of some layers and parts, on one device.

    Attributes:
        keys: part and layer of each row; every part has the same layers.
        packed_KS: see `packed`.
    """

    keys: tuple[Key, ...]
    packed_KS: Tensor

    @classmethod
    def of(
        cls, tallies: Mapping[Key, Tally], keys: Sequence[Key], num_experts: int, device: torch.device
    ) -> "RoutingSums":
        """Return the sums of these keys; those without a tally have seen no token.

        Args:
            tallies: what was counted.
            keys: part and layer of each row.
            num_experts: E.
            device: holds the result.
        """
        nothing = Tally(*(torch.zeros(shape, device=device) for shape in ((num_experts,), (num_experts,), (), ())))
        if not keys:
            return cls((), torch.zeros(0, 2 * num_experts + 2, dtype=torch.float64, device=device))
        return cls(tuple(keys), packed([tallies.get(key, nothing) for key in keys], device))

    @property
    def experts(self) -> int:
        """E, the experts that a router chooses from."""
        return (self.packed_KS.shape[1] - 2) // 2

    def __add__(self, other: "RoutingSums") -> "RoutingSums":
        assert self.keys == other.keys, "sums of the same layers and parts"
        return RoutingSums(self.keys, self.packed_KS + other.packed_KS)

    def read(self, with_shares: bool = True) -> RoutingFigures:
        """Return the figures. This waits for the device once, whatever the number of layers and parts.

        Args:
            with_shares: also the share of every expert.
        """
        if not self.keys:
            return RoutingFigures([])
        experts = self.experts
        counts_KE, probs_KE = self.packed_KS[:, :experts], self.packed_KS[:, experts : 2 * experts]
        entropy_K, tokens_K = self.packed_KS[:, -2], self.packed_KS[:, -1]
        share_KE = counts_KE / counts_KE.sum(dim=1, keepdim=True)  # NaN where no token was seen
        figures_KF = torch.stack(
            [
                tokens_K,
                share_KE.amin(dim=1),
                share_KE.amax(dim=1),
                share_KE.std(dim=1, unbiased=False) * experts,
                (counts_KE == 0).sum(dim=1).double(),
                torch.special.entr(probs_KE / tokens_K.unsqueeze(1)).sum(dim=1),
                entropy_K / tokens_K,
            ],
            dim=1,
        )
        wanted = [figures_KF.flatten(), self._mutual_information(share_KE, tokens_K).reshape(1)]
        values: list[float] = torch.cat([*wanted, share_KE.flatten()] if with_shares else wanted).tolist()
        first_share = FIGURES * len(self.keys) + 1
        found: dict[str, list[LayerRouting]] = {}
        for row, (part, layer) in enumerate(self.keys):
            tokens, least, most, cv, dead, load_entropy, token_entropy = values[FIGURES * row : FIGURES * (row + 1)]
            if tokens > 0:
                at = first_share + row * experts
                share = values[at : at + experts]
                found.setdefault(part, []).append(
                    LayerRouting(layer, share, least, most, cv, int(dead), load_entropy, token_entropy)
                )
        layers = found.pop(ALL, [])
        return RoutingFigures(layers, found, values[first_share - 1] if len(found) > 1 else None)

    def _mutual_information(self, share_KE: Tensor, tokens_K: Tensor) -> Tensor:
        """Entropy of the mean share of each expert, less the mean of the parts' entropies; the mean over layers."""
        rows = [row for row, (part, _) in enumerate(self.keys) if part != ALL]
        parts = len({self.keys[row][0] for row in rows})
        if parts < 2:
            return torch.zeros((), dtype=torch.float64, device=share_KE.device)
        share_PLE = share_KE[rows].nan_to_num().reshape(parts, -1, self.experts)
        has_tokens_PL = (tokens_K[rows] > 0).double().reshape(parts, -1)
        count_L = has_tokens_PL.sum(dim=0).clamp(min=1)
        mean_LE = share_PLE.sum(dim=0) / count_L.unsqueeze(-1)
        of_parts_L = torch.special.entr(share_PLE).sum(dim=(0, 2)) / count_L
        layers = (has_tokens_PL.sum(dim=0) > 0).sum().clamp(min=1)
        found: Tensor = (torch.special.entr(mean_LE).sum(dim=1) - of_parts_L).sum() / layers
        return found
