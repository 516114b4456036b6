"""What an analysis of measurements says, as `directions.json` has it."""

from typing import Literal

from pydantic import Field

from llama_stack_provider_moe.compute.ablation.measurements import Provenance
from llama_stack_provider_moe.spec.blocks import Block

DIRECTIONS_FILE = "directions.json"


class LayerFigures(Block):
    """How well the direction after one decoder block tells the sets apart; t and b are the sets' means, r = t - b."""

    layer: int
    cosine: float = Field(description="Cosine of the two means.")
    signal_to_noise: float = Field(description="|r| / max(|t|, |b|).")
    purity: float = Field(description="Share of r's length that is orthogonal to b: |projected r| / |r|.")
    separation: float = Field(
        description="d' on rows that did not make the direction: difference of the sets' mean scores, divided by the "
        "root mean square of their standard deviations."
    )
    auc: float = Field(
        description="Share of pairs of a target and a baseline row that their scores put in the right order; neither "
        "row made the direction."
    )
    stability: float = Field(description="Cosine of the projected directions of the two halves of the rows.")
    reach: float = Field(description="Mean cosine of the projected direction with those after all other blocks.")
    quality: float = Field(
        description="max(0, 2 auc - 1) * max(0, stability) * max(0, reach): 1 if the direction orders all pairs, both "
        "halves of the rows give it, and it is the same after every block."
    )


class Agreement(Block):
    """Cosines of directions after two decoder blocks; row and column are block numbers."""

    plain: list[list[float]]
    projected: list[list[float]]
    biprojected: list[list[float]] = Field(
        description="Row m, column l: cosine of the projected direction after m with the biprojected one that is taken "
        "out of block l. Near 1, the mean at l has no part in it."
    )


class DirectionsReport(Block):
    """The result of `moe-train ablate analyze`."""

    kind: Literal["ablation_directions"] = "ablation_directions"
    version: Literal[1] = 1
    provenance: Provenance
    layers: list[LayerFigures]
    recommended: list[int] = Field(description="Decoder blocks whose directions to try first, the best first.")
    agreement: Agreement
