"""The `data` block: which rows a job trains on, from one data set or from several domains, and how to read them."""

import math
from collections.abc import Sequence
from typing import Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticKnownError

from llama_stack_provider_moe.errors import InvalidInput
from llama_stack_provider_moe.spec.blocks import Block, RowFormat

DOMAIN_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9_-]{0,31}$"
MOST_DOMAINS = 16
MOST_PASSES = 1000  # over one domain's rows in one epoch
_ROUNDING = 1e-6  # of a number of rows, from the division of ratios
Exhausted = Literal["repeat", "stop"]


class Domain(Block):
    """One of several data sets that a job trains on, with figures of its own."""

    name: str = Field(pattern=DOMAIN_PATTERN, description="Name of the domain in figures and charts.")
    dataset_id: str = Field(
        min_length=1, max_length=512, description="Data set with the rows: one that you uploaded, or the host's."
    )
    validation_dataset_id: str | None = Field(
        default=None,
        min_length=1,
        max_length=512,
        description="Id of its held-out data set; left out: `options.validation_split` of its rows are held out.",
    )
    format: RowFormat = Field(default="auto", description="Format of these rows, as `data.format`.")
    columns: dict[str, str] | None = Field(
        default=None, max_length=32, description="Columns of this data set under other names, as `data.columns`."
    )
    ratio: float = Field(
        default=1.0,
        gt=0,
        le=1000,
        description="Weight of the domain: its share of an epoch's rows is its ratio divided by the sum of all ratios.",
    )


class Data(Block):
    """Which rows to use, and how to read them."""

    # Before `dataset_id`, whose check needs it.
    domains: list[Domain] | None = Field(
        default=None,
        min_length=2,
        max_length=MOST_DOMAINS,
        description="Data sets to mix, in place of `dataset_id`; each has a name, a ratio and figures of its own. "
        "Recipes sft and dpo.",
    )
    exhausted: Exhausted = Field(
        default="repeat",
        description="End of an epoch with `domains`. repeat: once every row of every domain was used, while smaller "
        "domains repeat; stop: once one domain has no row left.",
    )
    dataset_id: str | None = Field(
        default=None,
        min_length=1,
        max_length=512,
        validate_default=True,
        description="Data set with the rows: one that you uploaded, or the host's; required unless there are "
        "`domains`.",
    )
    validation_dataset_id: str | None = Field(
        default=None,
        min_length=1,
        max_length=512,
        description="Id of the held-out data set; left out: `options.validation_split` of the rows are held out.",
    )
    format: RowFormat = Field(
        default="auto",
        description="Format of the rows. auto: each row's columns decide; instruct and dialog: any format with single "
        "turns or with messages; else the format's name (docs/guides/data.md).",
    )
    columns: dict[str, str] | None = Field(
        default=None,
        max_length=32,
        description="Columns of the data under other names, by the format's name for them, e.g. {prompt: question, "
        "completion: answer}; left out: the data has the format's names.",
    )
    shuffle: bool = Field(default=True, description="Shuffle the training rows before every epoch.")
    packed: bool = Field(
        default=False, description="Fill sequences of `options.max_length` tokens with several rows each; SFT only."
    )
    train_on_input: bool = Field(
        default=False, description="Compute the loss on prompt tokens too, not only on the answers; SFT only."
    )

    @field_validator("domains")
    @classmethod
    def _names_differ(cls, domains: list[Domain] | None) -> list[Domain] | None:
        seen: dict[str, int] = {}
        for index, domain in enumerate(domains or []):
            # Names are also file names, and some file systems do not tell `Code` from `code`.
            first = seen.setdefault(domain.name.casefold(), index)
            if first != index:
                raise ValueError(f"{index}.name: {domain.name!r} is also the name of domain {first}; expected another, "
                                 "whatever the case")  # fmt: skip
        return domains

    @field_validator("dataset_id")
    @classmethod
    def _one_or_the_other(cls, dataset_id: str | None, info: ValidationInfo) -> str | None:
        if "domains" not in info.data:  # not valid, which is its own error
            return dataset_id
        domains = info.data["domains"]
        if dataset_id is None and domains is None:
            raise PydanticKnownError("missing")
        if dataset_id is not None and domains is not None:
            raise ValueError(f"{dataset_id!r} is not valid beside data.domains, each of which names its data set; "
                             "leave one of the two out")  # fmt: skip
        return dataset_id

    @model_validator(mode="after")
    def _no_setting_is_without_effect(self) -> "Data":
        if self.domains is None:
            if self.exhausted != "repeat":
                raise ValueError(f"exhausted: {self.exhausted!r} has no effect without data.domains; leave it out")
            return self
        for name in ("validation_dataset_id", "columns"):
            if getattr(self, name) is not None:
                raise ValueError(f"{name}: is not valid beside data.domains; expected data.domains.N.{name}")
        if self.format != "auto":
            raise ValueError(f"format: {self.format!r} is not valid beside data.domains; expected "
                             "data.domains.N.format")  # fmt: skip
        if self.packed:
            raise ValueError("packed: true is not valid beside data.domains: figures by domain need rows of one domain "
                             "each")  # fmt: skip
        return self

    @property
    def training_ids(self) -> list[str]:
        """Ids of the training data sets, in order."""
        if self.domains is not None:
            return [domain.dataset_id for domain in self.domains]
        assert self.dataset_id is not None, "it was checked"
        return [self.dataset_id]

    def parts(self, part: Literal["train", "validation"]) -> list[str]:
        """Names of the files with the training or validation rows of each data set (`RowSource.part`)."""
        return [part] if self.domains is None else [f"{part}-{domain.name}" for domain in self.domains]

    @property
    def has_validation_sets(self) -> bool:
        """Whether every training data set has a held-out data set beside it."""
        if self.domains is not None:
            return all(domain.validation_dataset_id is not None for domain in self.domains)
        return self.validation_dataset_id is not None


def epoch_counts(rows: Sequence[int], ratios: Sequence[float], exhausted: Exhausted) -> list[int]:
    """The rows of each domain in one epoch, at least one.

    >>> epoch_counts([100, 10], [3, 1], "repeat"), epoch_counts([100, 10], [3, 1], "stop")
    ([100, 34], [30, 10])

    Args:
        rows: training rows of each domain.
        ratios: of the domains.
        exhausted: see `Data.exhausted`.
    """
    # The number of rows of each domain for one unit of ratio; the domain that ends the epoch has all its rows used.
    used = [count / ratio for count, ratio in zip(rows, ratios, strict=True)]
    if exhausted == "repeat":
        return [math.ceil(max(used) * ratio - _ROUNDING) for ratio in ratios]
    return [max(1, math.floor(min(used) * ratio + _ROUNDING)) for ratio in ratios]


def require_few_passes(data: Data, rows: Sequence[int]) -> None:
    """Check that no epoch repeats a domain's rows more than `MOST_PASSES` times.

    Args:
        data: a block with domains.
        rows: training rows of each domain.

    Raises:
        InvalidInput: an epoch would.
    """
    domains = data.domains or []
    counts = epoch_counts(rows, [domain.ratio for domain in domains], data.exhausted)
    for index, (domain, count, there) in enumerate(zip(domains, counts, rows, strict=True)):
        if count > MOST_PASSES * there:
            raise InvalidInput(
                f"data.domains.{index}.ratio", domain.ratio,
                f"a ratio with which an epoch repeats the {there:,} row(s) of {domain.name!r} at most {MOST_PASSES:,} "
                f"times, not {count / there:,.0f}: lower it, add rows, or set data.exhausted to 'stop'",
            )  # fmt: skip
