"""How far two models' logits are apart, and what a load check found, as figures and as words."""

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import BaseModel, Field
from torch import Tensor

from llama_stack_provider_moe.export.probe import Arithmetic
from llama_stack_provider_moe.export.servers import Statement
from llama_stack_provider_moe.spec import DType


class Gap(BaseModel):
    """How far two models are apart at the recorded places."""

    greatest: float = Field(description="Of all differences of logits.")
    mean: float = Field(description="Of their absolute values.")
    share: float = Field(description="`mean` by the mean distance of a logit from the others of its position.")


class LoadCheck(BaseModel):
    """What was measured; whatever fails raises instead."""

    kind: Literal["adapter", "model"]
    positions: int
    arithmetic: Arithmetic = Field(description="Of the job.")
    here: Arithmetic = Field(description="Of `as_trained`: the job's where this machine has it.")
    as_trained: Gap
    as_trained_tolerance: float
    plain: Gap
    plain_tolerance: float
    plain_against: Literal["recorded", "16-bit adapter model"]
    rounding_of_base: Gap | None = Field(default=None, description="16-bit adapter model to the quantised, recorded.")
    effect: Gap | None = Field(default=None, description="What the adapter does: the plain model with it, to without.")
    tensors: int = Field(description="Of the adapter, found in the model as they are in the file.")
    router_biases: int
    servers: list[Statement] = Field(default=[], description="Which servers are known to apply the adapter.")

    def text(self) -> str:
        """For a person."""
        what = f"{self.tensors} tensors" + (f", {self.router_biases} routers' biases" if self.router_biases else "")
        lines = [
            f"loaded again ({what}), {self.positions} positions compared",
            f"as trained ({_words(self.here)}): logits differ by {_told(self.as_trained, self.as_trained_tolerance)}",
            f"plain {'transformers and PEFT' if self.kind == 'adapter' else 'transformers'} ({self.arithmetic.dtype}): "
            f"{_told(self.plain, self.plain_tolerance)}, against the {self.plain_against}",
        ]
        if self.rounding_of_base is not None:
            lines.append(
                f"the 16-bit base under this adapter is {_told(self.rounding_of_base)} from the "
                f"{self.arithmetic.quantize_bits}-bit one it was trained on; not judged"
            )
        if self.effect is not None:
            lines.append(f"the adapter moves logits by {_told(self.effect)}")
            if not self.tells:
                lines.append(
                    "that is less than the plain model's tolerance, which here could not tell it from the base"
                )
        return "\n".join([*lines, *(statement.text() for statement in self.servers)])

    @property
    def tells(self) -> bool:
        """Whether the plain model, without the adapter, would have failed."""
        return self.effect is None or self.effect.share > self.plain_tolerance


class MergedCheck(BaseModel):
    """A merged folder beside the adapter model it was made of."""

    positions: int
    dtype: DType = Field(description="Of both models' passes.")
    weights: DType = Field(description="Of the merged matrices on disk.")
    gap: Gap
    tolerance: float

    def text(self) -> str:
        """For a person."""
        return (
            f"merged weights ({self.weights}, run in {self.dtype}) and the adapter on its base: logits differ by "
            f"{_told(self.gap, self.tolerance)}, {self.positions} positions"
        )


def gap(one: Sequence[Tensor], other: Sequence[Tensor]) -> Gap:
    """Between two models' values at the same places; the spread is that of `other`."""
    first, second = torch.cat(list(one)).double(), torch.cat(list(other)).double()
    apart = (first - second).abs()
    spread = (second - second.mean(dim=1, keepdim=True)).abs().mean().item()
    mean = apart.mean().item()
    return Gap(greatest=apart.max().item(), mean=mean, share=mean / max(spread, torch.finfo(torch.float32).tiny))


def _words(arithmetic: Arithmetic) -> str:
    parts = [arithmetic.dtype, arithmetic.device]
    if arithmetic.quantize_bits is not None:
        parts.append(f"{arithmetic.quantize_bits}-bit base")
    if arithmetic.experts_implementation is not None:
        parts.append(f"experts {arithmetic.experts_implementation}")
    return ", ".join(parts)


def _told(found: Gap, tolerance: float | None = None) -> str:
    limit = "" if tolerance is None else f", at most {tolerance:.0e} allowed"
    return f"{found.greatest:.2g} at most, {found.share:.2g} of their spread on average{limit}"
