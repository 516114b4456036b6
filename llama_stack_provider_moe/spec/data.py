"""The `data` block: which rows a job trains on, from one data set or from several domains, and how to read them."""

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

from pydantic import Field, StringConstraints, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticKnownError

from llama_stack_provider_moe.errors import InvalidInput
from llama_stack_provider_moe.spec.blocks import Block, RowFormat

DOMAIN_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9_-]{0,31}$"
MOST_DOMAINS = 16
MOST_PASSES = 1000  # over one domain's rows in one epoch
_ROUNDING = 1e-6  # of a number of rows, from the division of ratios
Exhausted = Literal["repeat", "stop"]


DomainName = Annotated[str, StringConstraints(pattern=DOMAIN_PATTERN)]
Ratio = Annotated[float, Field(gt=0, le=1000)]


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
    domain_column: str | None = Field(
        default=None,
        min_length=1,
        max_length=100,
        description="Column of the rows that names the domain of each: figures by domain as with `domains`, from one "
        "data set. Recipes sft and dpo.",
    )
    domain_ratios: dict[DomainName, Ratio] | None = Field(
        default=None,
        min_length=2,
        max_length=MOST_DOMAINS,
        description="Ratio of each value of `domain_column`, as `domains[].ratio`; a row with another value is "
        "refused. Left out: every value is a domain, and an epoch uses each row once.",
    )
    exhausted: Exhausted = Field(
        default="repeat",
        description="End of an epoch with `domains` or `domain_ratios`. repeat: once every row of every domain was "
        "used, while smaller domains repeat; stop: once one domain has no row left.",
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

    @field_validator("domain_ratios")
    @classmethod
    def _values_differ(cls, ratios: dict[str, float] | None) -> dict[str, float] | None:
        seen: dict[str, str] = {}
        for value in ratios or {}:
            if (first := seen.setdefault(value.casefold(), value)) != value:
                raise ValueError(f"{value!r} and {first!r} differ only in case; expected one spelling")
        return ratios

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
        if self.packed and (self.domains or self.domain_column):
            beside = "domains" if self.domains else "domain_column"
            raise ValueError(f"packed: true is not valid beside data.{beside}: figures by domain need rows of one "
                             "domain each")  # fmt: skip
        if self.domain_ratios is not None and self.domain_column is None:
            raise ValueError("domain_ratios: has no effect without data.domain_column, the column with these values")
        if self.domains is None:
            if self.exhausted != "repeat" and self.domain_ratios is None:
                raise ValueError(f"exhausted: {self.exhausted!r} has no effect without data.domains or "
                                 "data.domain_ratios; leave it out")  # fmt: skip
            return self
        for name in ("validation_dataset_id", "columns", "domain_column"):
            if getattr(self, name) is not None:
                instead = f"expected data.domains.N.{name}" if name != "domain_column" else "leave one of the two out"
                raise ValueError(f"{name}: is not valid beside data.domains; {instead}")
        if self.format != "auto":
            raise ValueError(f"format: {self.format!r} is not valid beside data.domains; expected "
                             "data.domains.N.format")  # fmt: skip
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


def ratios_of(data: Data, rows: Mapping[str, int]) -> list[float]:
    """The ratio of each domain; of a column without `domain_ratios` the numbers of rows, so that each is used once.

    Args:
        data: a block with domains or a column of them.
        rows: training rows of each domain, by name.
    """
    if data.domains is not None:
        return [domain.ratio for domain in data.domains]
    return [rows[name] if data.domain_ratios is None else data.domain_ratios[name] for name in rows]


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


def require_few_passes(data: Data, rows: Mapping[str, int]) -> None:
    """Check that no epoch repeats a domain's rows more than `MOST_PASSES` times.

    Args:
        data: a block with domains or a column of them.
        rows: training rows of each domain, by name.

    Raises:
        InvalidInput: an epoch would.
    """
    ratios = ratios_of(data, rows)
    counts = epoch_counts([*rows.values()], ratios, data.exhausted)
    for index, ((name, there), ratio, count) in enumerate(zip(rows.items(), ratios, counts, strict=True)):
        if count > MOST_PASSES * there:
            raise InvalidInput(
                f"data.domains.{index}.ratio" if data.domains else f"data.domain_ratios.{name}", ratio,
                f"a ratio with which an epoch repeats the {there:,} row(s) of {name!r} at most {MOST_PASSES:,} "
                f"times, not {count / there:,.0f}: lower it, add rows, or set data.exhausted to 'stop'",
            )  # fmt: skip
