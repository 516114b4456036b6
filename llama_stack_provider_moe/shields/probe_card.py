"""`probe.json`: what a fitted probe reads, how it was fitted, and how well it works; and what makes it unusable.

A probe is a folder with this card and `probe.safetensors`, which a job of recipe `probe` writes. The scorer process and
the server read the card, which needs no torch.
"""

import hashlib
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, ValidationError, model_validator

from llama_stack_provider_moe.errors import InvalidInput, shorten
from llama_stack_provider_moe.ground.small_files import read_small
from llama_stack_provider_moe.spec.blocks import Block, DType
from llama_stack_provider_moe.spec.probe import CARD_FILE, WEIGHTS_FILE, ReadTokens, Views, least_negatives

_CARD_BYTES = 1 << 20

Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0, le=10**12)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Rate(Block):
    """A rate with its exact 95% interval (Clopper and Pearson)."""

    count: Count
    rows: Annotated[int, Field(ge=1, le=10**12)]
    value: Share
    low: Share
    high: Share


class Auc(Block):
    """Share of pairs of a target and a baseline row that are in order, with a 95% interval (Newcombe's method 5)."""

    value: Share
    low: Share
    high: Share


class Detection(Block):
    """How well scores tell two sets apart that were not used to fit, to choose the layer or to set the threshold."""

    auc: Auc
    detected: Rate = Field(description="Share of the target rows above the threshold.")
    detected_at_rate: Rate = Field(
        description="Share of the target rows above the threshold that these baseline rows themselves give for "
        "`false_positive_rate`: a point of their ROC curve."
    )
    false_positives: Rate = Field(description="Share of the baseline rows above the threshold.")


class Compared(Block):
    """The probe, and beside it the same regression on a bag of embeddings, which knows words alone."""

    probe: Detection
    lexical: Detection


class ProbeSet(Block):
    """One set of prompts."""

    source: str = Field(max_length=1024, description="Id of the data set, or its file.")
    rows: Annotated[int, Field(ge=1)] = Field(description="Different rows; equal ones count once.")
    sha256: Sha256 = Field(description="SHA-256 of the canonical rows.")


class Base(Block):
    """The model whose hidden states the probe reads."""

    model: str = Field(min_length=1, max_length=1024, description="Folder or hub id.")
    fingerprint: Sha256 = Field(description="Fingerprint of its weights, without an adapter.")
    adapter_folder: str | None = Field(default=None, max_length=4096, description="Adapter on it; null: none.")
    adapter: Sha256 | None = Field(default=None, description="SHA-256 of the adapter's weights; null: none.")
    model_type: str = Field(max_length=128)
    layers: Annotated[int, Field(ge=1, le=9999)] = Field(description="Its decoder blocks.")
    width: Annotated[int, Field(ge=1, le=1 << 20)] = Field(description="Width of its residual stream.")
    dtype: DType = Field(description="Data type in which it ran, and in which the scorer runs it.")
    template: Literal["chatml", "plain"] | None = Field(description="See `options.chat_template`.")
    chat_template: Sha256 = Field(description="SHA-256 of the chat template that rendered the prompts.")

    @model_validator(mode="after")
    def _adapter_is_named_whole(self) -> Self:
        if (self.adapter_folder is None) != (self.adapter is None):
            raise ValueError("adapter_folder and adapter must both be there, or neither")
        return self


class ProbeCard(Block):
    """The content of `probe.json`."""

    kind: Literal["probe"] = "probe"
    version: Literal[1] = 1
    base: Base
    layers: list[Annotated[int, Field(ge=0, le=9998)]] = Field(
        min_length=1, max_length=2, description="Decoder blocks, counted from 0, after which states are read."
    )
    tokens: ReadTokens
    position: Annotated[int, Field(ge=-4096, le=4095)]
    span: Annotated[int, Field(ge=1, le=4096)]
    views: Views
    max_length: Annotated[int, Field(ge=8, le=1 << 20)] = Field(description="Tokens of the longest text it reads.")
    threshold: Share = Field(description="A conversation is flagged when its probability is above it.")
    false_positive_rate: Annotated[float, Field(gt=0, lt=1)] = Field(description="Rate that the threshold is set for.")
    negatives: Annotated[int, Field(ge=1)] = Field(description="Baseline rows that the threshold was set on.")
    fit_rows: dict[str, Count] = Field(description="Rows of each set that the weights were fitted on.")
    l2: Annotated[float, Field(ge=0)] = Field(description="Weight of the squared weights in the loss.")
    sets: dict[str, ProbeSet]
    split: Literal["shuffled", "in_order"]
    held_out: Compared = Field(description="On the last third of both sets.")
    test: Compared | None = Field(default=None, description="On sets of other wording; null: none were given.")
    length_auc: Share = Field(description="AUC of the number of tokens alone on the last third; 0.5 tells nothing.")
    beats_words: bool = Field(description="Whether it detects more than the lexical baseline, wherever measured last.")
    weights: Sha256 = Field(description="SHA-256 of probe.safetensors.")

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        if self.layers != sorted(set(self.layers)) or self.layers[-1] >= self.base.layers:
            raise ValueError(f"layers {self.layers} are not different, ascending and below {self.base.layers}")
        return self


def read_card(folder: Path, field: str) -> ProbeCard:
    """Read and check a probe's card, and check that the weights beside it are those that it was written with.

    Args:
        folder: of the probe.
        field: the caller's name of the setting that names it, for errors.

    Raises:
        InvalidInput: it is no such folder, or its files are damaged, or don't belong together.
    """
    try:
        card = ProbeCard.model_validate_json(read_small(folder / CARD_FILE, _CARD_BYTES), extra="ignore")
        found = hashlib.sha256(read_small(folder / WEIGHTS_FILE)).hexdigest()
    except (OSError, ValidationError, ValueError) as error:
        why = shorten(" ".join(str(error).split()), 160)
        raise InvalidInput(field, str(folder), f"a probe: a folder with {CARD_FILE} and {WEIGHTS_FILE} as a job of "
                           f"recipe 'probe' writes them ({why})") from None  # fmt: skip
    if found != card.weights:
        raise InvalidInput(field, str(folder), f"a probe whose {WEIGHTS_FILE} is the one that {CARD_FILE} names by its "
                           "SHA-256; it was changed")  # fmt: skip
    require_negatives(card, card.false_positive_rate, field)
    return card


def require_negatives(card: ProbeCard, rate: float, field: str) -> None:
    """Check that a probe's threshold holds for a false-positive rate.

    Args:
        card: of the probe.
        rate: that is wanted.
        field: the caller's name of the setting that names the probe, for errors.

    Raises:
        InvalidInput: too few negatives set the threshold, or it was set for a higher rate.
    """
    least = least_negatives(rate)
    if card.negatives < least:
        raise InvalidInput(field, card.negatives, f"a probe with at least {least} negatives behind its threshold, "
                           f"for a false-positive rate of {rate:g}")  # fmt: skip
    if card.false_positive_rate > rate:
        raise InvalidInput(field, card.false_positive_rate, f"a probe whose threshold is set for a false-positive rate "
                           f"of at most {rate:g} (`probe.false_positive_rate` of the job that fits it)")  # fmt: skip


def require_base(card: ProbeCard, fingerprint: str, field: str) -> None:
    """Check that a probe is of this base.

    Args:
        card: of the probe.
        fingerprint: of the base that is loaded.
        field: the caller's name of the setting that names the probe, for errors.

    Raises:
        InvalidInput: it was fitted on other weights.
    """
    if card.base.fingerprint != fingerprint:
        raise InvalidInput(
            field,
            card.base.fingerprint[:12],
            f"a probe of the loaded weights, whose fingerprint begins with {fingerprint[:12]}; a probe reads the "
            f"hidden states of the model that it was fitted on, {card.base.model!r}, and of no other",
        )
