"""The activation between an expert's two projections."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

Kind = Literal["silu", "clamped", "other"]


@dataclass(frozen=True)
class Gate:
    """How (S, J), what the up projection gives, becomes (S, I); J is 2 I where there is a gate.

    Attributes:
        function: it, as the model has it; no randomness and no parameters in it, for backward runs it again.
        kind: which formula `function` is. silu: silu(gate) * up, the gate in the first half (SwiGLU, Shazeer 2020,
            arXiv 2002.05202). clamped: gpt-oss's, (clamp(up) + 1) * gate' * sigmoid(alpha gate') with
            gate' = min(gate, limit), gate and up in turns (arXiv 2508.10925). other: no kernel knows it.
        alpha: of clamped.
        limit: of clamped.
    """

    function: Callable[[Tensor], Tensor]
    kind: Kind = "other"
    alpha: float = 0.0
    limit: float = 0.0
