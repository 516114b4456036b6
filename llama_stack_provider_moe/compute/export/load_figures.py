"""The distance between two models' logits and the results of a load check, as figures and in words."""

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import BaseModel, Field
from torch import Tensor

from llama_stack_provider_moe.compute.export.probe import Arithmetic, Probe
from llama_stack_provider_moe.compute.export.servers import Statement
from llama_stack_provider_moe.errors import AdapterError
from llama_stack_provider_moe.spec import DType


class Gap(BaseModel):
    """The distance between two models at the recorded positions."""

    greatest: float = Field(description="Largest difference of logits.")
    mean: float = Field(description="Mean absolute difference of logits.")
    share: float = Field(
        description="`mean` divided by the logits' mean absolute deviation within their position; of a classifier, "
        "between texts."
    )


class LoadCheck(BaseModel):
    """The measurements of a load check that passed; a failed check raises an error instead."""

    kind: Literal["adapter", "model"]
    positions: int
    arithmetic: Arithmetic = Field(description="Arithmetic of the job.")
    here: Arithmetic = Field(description="Arithmetic of `as_trained`: the job's, as far as this machine supports it.")
    as_trained: Gap
    as_trained_tolerance: float
    plain: Gap
    plain_tolerance: float
    plain_against: Literal["recorded", "16-bit adapter model"]
    rounding_of_base: Gap | None = Field(
        default=None, description="Distance of the 16-bit adapter model from the quantised, recorded one."
    )
    effect: Gap | None = Field(
        default=None, description="Effect of the adapter: distance of the plain model with it from the one without."
    )
    effect_of_image: Gap | None = Field(
        default=None, description="Distance between the plain model's answers about two images; null: trained on text."
    )
    tensors: int = Field(description="Number of adapter tensors that are equal in the model and in the file.")
    router_biases: int
    servers: list[Statement] = Field(default=[], description="What is known about servers that apply the adapter.")

    def text(self) -> str:
        """The result in words."""
        what = f"{self.tensors} tensors" + (f", {self.router_biases} router biases" if self.router_biases else "")
        lines = [
            f"loaded again ({what}), {self.positions} positions compared",
            f"as trained ({_words(self.here)}): logits differ by "
            f"{_gap_text(self.as_trained, self.as_trained_tolerance)}",
            f"plain {'transformers and PEFT' if self.kind == 'adapter' else 'transformers'} ({self.arithmetic.dtype}): "
            f"{_gap_text(self.plain, self.plain_tolerance)}, against the {self.plain_against}",
        ]
        if self.rounding_of_base is not None:
            lines.append(
                f"with the 16-bit base, logits differ by {_gap_text(self.rounding_of_base)} from those with the "
                f"{self.arithmetic.quantize_bits}-bit base of the training; this is not judged"
            )
        if self.effect is not None:
            lines.append(f"the adapter moves logits by {_gap_text(self.effect)}")
            if not self.detects_missing_adapter:
                lines.append(
                    "that is less than the plain model's tolerance, so the plain check can't tell it from the base here"
                )
        if self.effect_of_image is not None:
            lines.append(_image_text(self.effect_of_image))
        return "\n".join([*lines, *(statement.text() for statement in self.servers)])

    @property
    def detects_missing_adapter(self) -> bool:
        """Whether the plain model without the adapter would have failed the check."""
        return self.effect is None or self.effect.share > self.plain_tolerance


class MergedCheck(BaseModel):
    """Comparison of a merged folder with the adapter model that it was made from."""

    positions: int
    dtype: DType = Field(description="Dtype of both models' passes.")
    weights: DType = Field(description="Dtype of the merged matrices on disk.")
    gap: Gap
    tolerance: float
    effect_of_image: Gap | None = Field(default=None, description="See `LoadCheck`; that of the merged folder.")

    def text(self) -> str:
        """The result in words."""
        images = "" if self.effect_of_image is None else f"; {_image_text(self.effect_of_image)}"
        return (
            f"merged weights ({self.weights}, run in {self.dtype}) and the adapter on its base: logits differ by "
            f"{_gap_text(self.gap, self.tolerance)}, {self.positions} positions{images}"
        )


def gap(one: Sequence[Tensor], other: Sequence[Tensor]) -> Gap:
    """The distance between two models' values at the same positions; the spread is that of `other`."""
    first, second = torch.cat(list(one)).double(), torch.cat(list(other)).double()
    apart = (first - second).abs()
    spread = (second - second.mean(dim=1, keepdim=True)).abs().mean().item()
    if spread == 0:  # a classifier of one label has one number for each text
        spread = (second - second.mean(dim=0, keepdim=True)).abs().mean().item()
    mean = apart.mean().item()
    return Gap(greatest=apart.max().item(), mean=mean, share=mean / max(spread, torch.finfo(torch.float32).tiny))


def _image_text(effect: Gap) -> str:
    return f"two questions had images, through the saved processor; another image moves logits by {_gap_text(effect)}"


def _words(arithmetic: Arithmetic) -> str:
    parts = [arithmetic.dtype, arithmetic.device]
    if arithmetic.quantize_bits is not None:
        scales = " with 8-bit scales" if arithmetic.quantize_scales else ""
        parts.append(f"{arithmetic.quantize_bits}-bit base{scales}")
    if arithmetic.experts_implementation is not None:
        parts.append(f"experts {arithmetic.experts_implementation}")
    return ", ".join(parts)


def _gap_text(found: Gap, tolerance: float | None = None) -> str:
    limit = "" if tolerance is None else f", at most {tolerance:.0e} allowed"
    return f"{found.greatest:.2g} at most, {found.share:.2g} of their spread on average{limit}"


def effect_of_image(probe: Probe, found: Sequence[Tensor]) -> Gap | None:
    """The distance between the answers about two images; None for a probe without.

    Raises:
        AdapterError: the loaded model does not see which image it is asked about, and the trained one did.
    """
    here, recorded = probe.of_images(found), probe.of_images(probe.values())
    if here is None or recorded is None:
        return None
    effect, trained = gap(here[:1], here[1:]), gap(recorded[:1], recorded[1:])
    if effect.share < trained.share / 3:
        raise AdapterError(
            f"load check: another image moves the loaded model's logits by {effect.share:.2g} of their spread, and the "
            f"trained model's by {trained.share:.2g}: it does not see the images"
        )
    return effect
