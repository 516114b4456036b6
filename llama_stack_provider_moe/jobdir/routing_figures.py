"""How the routers of a model used their experts, as the `routing` events of a job have it."""

import math
from collections.abc import Sequence

from pydantic import BaseModel, Field


class LayerRouting(BaseModel):
    """How one layer's router used its experts: a table of all of them. Figures have four significant digits."""

    layer: int
    share: list[float] = Field(description="Share of the routed tokens (top-k slots) per expert; the sum is 1.")
    min: float
    max: float
    cv: float = Field(description="Coefficient of variation of `share`.")
    dead: int = Field(description="Number of experts that got no token.")
    load_entropy: float = Field(description="Entropy of the mean routing probabilities, in nats.")
    token_entropy: float = Field(description="Mean over tokens of each token's routing entropy, in nats.")


class LayerFigures(BaseModel):
    """How every layer's router used its experts over one optimiser step's tokens: columns, with a value per layer."""

    experts: int = Field(description="Number of experts of a layer.")
    layer: list[int] = Field(description="Numbers of the layers with experts.")
    min: list[float] = Field(description="Share of the least used expert.")
    max: list[float] = Field(description="Share of the most used expert.")
    cv: list[float] = Field(description="Coefficient of variation of the experts' shares.")
    dead: list[int] = Field(description="Number of experts that got no token.")
    load_entropy: list[float] = Field(description="Entropy of the mean routing probabilities, in nats.")
    token_entropy: list[float] = Field(description="Mean over tokens of each token's routing entropy, in nats.")

    def over_layers(self) -> dict[str, float]:
        """Return worst and mean values over layers: shares of the routed tokens, entropies in nats."""
        return {
            "min_share": min(self.min),
            "max_share": max(self.max),
            "max_cv": max(self.cv),
            "dead_experts": sum(self.dead),
            "load_entropy": sum(self.load_entropy) / len(self.layer),
            "token_entropy": sum(self.token_entropy) / len(self.layer),
        }


def figures_of(tables: Sequence[LayerRouting], experts: int | None = None) -> LayerFigures | None:
    """Return the figures of tables as columns; None without any table.

    Args:
        tables: one of each layer.
        experts: number of experts of a layer; None: the tables have the share of each.
    """
    if not tables:
        return None
    return LayerFigures(
        experts=len(tables[0].share) if experts is None else experts,
        layer=[each.layer for each in tables],
        min=[each.min for each in tables],
        max=[each.max for each in tables],
        cv=[each.cv for each in tables],
        dead=[each.dead for each in tables],
        load_entropy=[each.load_entropy for each in tables],
        token_entropy=[each.token_entropy for each in tables],
    )


def mutual_information(sets: Sequence[Sequence[LayerRouting]]) -> float:
    """Return the mutual information of set and expert in nats, the mean over layers, with equal weight for each set.

    In a layer, it is the entropy of the mean share of each expert, less the mean of the sets' entropies (at least 0).
    """
    by_layer = list(zip(*sets, strict=True))
    return sum(map(_information, by_layer)) / len(by_layer)


def _information(sets: Sequence[LayerRouting]) -> float:
    mean = [sum(shares) / len(sets) for shares in zip(*(each.share for each in sets), strict=True)]
    return _entropy(mean) - sum(_entropy(each.share) for each in sets) / len(sets)


def _entropy(shares: Sequence[float]) -> float:
    return -sum(share * math.log(share) for share in shares if share > 0)
