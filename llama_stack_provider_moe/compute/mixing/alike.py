"""Whether branches were trained from one base, as their weights say: compared on a piece of every matrix.

Averaging weights of models that were not trained from one base gives a broken model, whatever their shapes. Fine-tuning
turns a matrix by a small angle; matrices of two models that began from different random numbers are orthogonal.
"""

import math

import torch

from llama_stack_provider_moe.compute.export.tensors import TensorEntry
from llama_stack_provider_moe.compute.mixing.sources import Source, Sources
from llama_stack_provider_moe.errors import InvalidInput, ModelError
from llama_stack_provider_moe.ground import liveness

# Cosine of a branch's matrices and the base's. Training by jobs of this package stays above 0.9, other models near 0.
LEAST_COSINE = 0.5
_PIECE = 2048  # numbers


def cosine_to_base(branch: Source, base: Source) -> float:
    """Cosine of the two models' matrices, from a piece in the middle of each: 1 for equal models.

    Raises:
        InvalidInput: it is below `LEAST_COSINE`.
        ModelError: a piece has numbers that are not finite.
    """
    product = squares = base_squares = 0.0
    names = [name for name, entry in base.entries.items() if len(entry.shape) > 1]
    for name in liveness.counted(f"comparing {branch.name}", names, len(names), "tensors"):
        there, here = _middle(branch.entries[name]), _middle(base.entries[name])
        if not math.isfinite(float(there @ there)):
            raise ModelError(f"{branch.field}: {name} in {branch.shown} has numbers that are not finite")
        product += float(there @ here)
        squares += float(there @ there)
        base_squares += float(here @ here)
    lengths = math.sqrt(squares * base_squares)
    cosine = product / lengths if lengths > 0 else math.nan
    if not cosine >= LEAST_COSINE:
        raise InvalidInput(branch.field, branch.shown, f"a model that was trained from `model`; the cosine of "
                           f"their matrices is {cosine:.3f}, below {LEAST_COSINE}")  # fmt: skip
    return cosine


def require_frozen_anchors(sources: Sources) -> None:
    """Raise unless expert 0 of each branch is the base's, as a piece of each of its matrices says.

    Raises:
        InvalidInput: a branch trained its anchor.
    """
    names = [name for name in sources.base.entries if f".{sources.rule.block}.experts.0." in name]
    for branch in sources.branches:
        for name in names:
            if not torch.equal(_middle(branch.entries[name]), _middle(sources.base.entries[name])):
                raise InvalidInput(branch.field, branch.shown, f"a model with the first expert of `model`, its "
                                   f"frozen anchor; {name} differs")  # fmt: skip


def _middle(entry: TensorEntry) -> torch.Tensor:
    total = math.prod(entry.shape)
    count = min(total, _PIECE)
    return entry.read((total - count) // 2, count).double()
