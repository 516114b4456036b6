"""Branch, train, mix: models that one base became on a domain each become the experts of one model.

`compute.methods.mixing` has the formulas.
"""

import re
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from llama_stack_provider_moe.spec.any_job import AnyJob
from llama_stack_provider_moe.spec.blocks import Block, OneProcess, RowFormat
from llama_stack_provider_moe.spec.routing import MOST_SETS, SET_PATTERN, AnalysisTraining
from llama_stack_provider_moe.spec.row_sources import RowSource

MixMethod = Literal["btx", "bar"]
RouterStart = Literal["random", "domains", "branches"]
MIX_FILE = "mix.json"
MOST_BRANCHES = MOST_SETS
ANCHOR = "anchor"


class Branch(Block):
    """One branch: a model that `model` became on one domain."""

    name: str = Field(
        description="Name of its domain, by which `leave_out`, mix.json and messages name the expert: 1 to 32 letters, "
        "digits, '_' and '-', the first a letter or a digit."
    )
    model: str = Field(
        min_length=1,
        max_length=1024,
        description="The trained model, whole (not an adapter): the result of one of your jobs (`JOB`, `JOB/merged`), "
        "a hub id, or a folder, as for `model`.",
    )
    weight: float = Field(
        default=1.0,
        ge=0,
        le=1000,
        description="Its weight in the mean of what the branches share; weights are divided by their sum. 0: the "
        "branch gives its expert alone.",
    )
    dataset_id: str | None = Field(
        default=None,
        min_length=1,
        max_length=512,
        description="Rows of its domain, with `router` domains; on the command line a file.",
    )
    trained_on: str | None = Field(
        default=None,
        min_length=1,
        max_length=512,
        description="What it was trained on, in your words, for mix.json; left out: what its job says.",
    )

    @field_validator("name")
    @classmethod
    def _is_short(cls, name: str) -> str:
        if not re.fullmatch(SET_PATTERN, name) or name == ANCHOR:
            raise ValueError(f"{name!r} is not valid as a name; expected 1 to 32 letters, digits, '_' and '-', the "
                             f"first a letter or a digit, and not {ANCHOR!r}")  # fmt: skip
        return name


class MixOptions(Block):
    """How the rows of `router` domains are read."""

    max_length: int = Field(
        default=1024, ge=8, le=1 << 20, description="Maximum number of tokens of a row; the first ones are used."
    )
    chat_template: Literal["chatml", "plain"] | None = Field(
        default=None, description="Chat template to use; default: the model's own."
    )
    format: RowFormat = Field(default="auto", description="Form of the rows, as in other jobs.")


class MixPlan(Block):
    """Which branches become experts, and how the routers begin."""

    method: MixMethod = Field(
        description="btx: the branches are dense, and the MLPs of each become an expert (Branch-Train-MiX, arXiv "
        "2403.07816); bar: each is a model of two experts, of which the first, the anchor, stayed frozen, and the "
        "second becomes an expert beside the anchor (BAR, arXiv 2604.18473)."
    )
    branches: list[Branch] = Field(
        min_length=1, max_length=MOST_BRANCHES, description="Branches, in the order of their experts."
    )
    leave_out: list[str] = Field(
        default=[],
        max_length=MOST_BRANCHES,
        description="Names of branches to mix without: neither their experts nor their share of the mean is in the "
        "result.",
    )
    top_k: int = Field(default=2, ge=1, le=MOST_BRANCHES + 1, description="Number of experts that each token goes to.")
    router: RouterStart | None = Field(
        default=None,
        description="Weights that routers begin with. random; domains: from the mean router input of each domain's "
        "rows (`dataset_id`); branches: those that the branches learnt (bar only). Left out: random for btx, branches "
        "for bar.",
    )
    router_std: float = Field(
        default=0.02,
        gt=0,
        le=1,
        description="Standard deviation of router weights that are random or from domains; not used with branches.",
    )
    seed: int = Field(default=0, ge=0, lt=2**32, description="Seed of random routers.")

    @property
    def start(self) -> RouterStart:
        """Weights that routers begin with."""
        return self.router or ("branches" if self.method == "bar" else "random")

    @property
    def kept(self) -> list[int]:
        """Numbers of the branches that are mixed."""
        return [at for at, branch in enumerate(self.branches) if branch.name not in self.leave_out]

    @property
    def experts(self) -> list[str]:
        """Name of each expert of the result: a branch's, or `anchor`."""
        names = [self.branches[at].name for at in self.kept]
        return [ANCHOR, *names] if self.method == "bar" else names

    @model_validator(mode="after")
    def _each_branch_is_named_once(self) -> Self:
        names = [branch.name for branch in self.branches]
        for at, name in enumerate(names):
            if name in names[:at]:
                raise ValueError(f"branches.{at}.name: {name!r} is the name of branch {names.index(name)} too; "
                                 "expected each name once")  # fmt: skip
        for name in self.leave_out:
            if name not in names:
                raise ValueError(f"leave_out: {name!r} is not a branch; expected names out of {', '.join(names)}")
        return self

    @model_validator(mode="after")
    def _leaves_enough(self) -> Self:
        if len(self.experts) < 2:
            raise ValueError(f"leave_out: leaves {len(self.experts)} expert(s); expected at least 2 with method "
                             f"{self.method!r}")  # fmt: skip
        if self.top_k > len(self.experts):
            raise ValueError(f"top_k: {self.top_k} is not valid; expected 1 to {len(self.experts)}, the number of "
                             "experts")  # fmt: skip
        if not sum(self.branches[at].weight for at in self.kept):
            raise ValueError("branches: the weights of those that are mixed are all 0; expected one above 0")
        return self

    @model_validator(mode="after")
    def _router_has_what_it_needs(self) -> Self:
        if self.start == "branches" and self.method == "btx":
            raise ValueError("router: 'branches' is not valid with method 'btx', whose branches have no routers; "
                             "expected 'random' or 'domains'")  # fmt: skip
        if self.start == "domains" and len(self.kept) < 2:
            raise ValueError("router: 'domains' compares domains; expected two or more branches that are mixed")
        for at, branch in enumerate(self.branches):
            if self.start == "domains" and at in self.kept and branch.dataset_id is None:
                raise ValueError(f"branches.{at}.dataset_id: is missing; router 'domains' needs rows of each domain")
            if self.start != "domains" and branch.dataset_id is not None:
                raise ValueError(f"branches.{at}.dataset_id: is used with router 'domains' only; routers begin "
                                 f"{self.start!r}")  # fmt: skip
        return self


class MixSpec(AnyJob, MixPlan):
    """Mixes branches of one model into a Mixture-of-Experts model; trains nothing."""

    recipe: Literal["mix"] = Field(
        description="Branch, train, mix: branches of one model, each trained on a domain, become experts of one model."
    )
    training: AnalysisTraining = Field(default_factory=AnalysisTraining)
    options: MixOptions = Field(default_factory=MixOptions)
    resources: OneProcess = Field(default_factory=OneProcess)

    def without_gpu(self) -> "MixSpec":
        """The same job, without a GPU unless it asks for one, or runs rows through the model."""
        if self.resources.gpus is not None or self.start == "domains":
            return self
        return self.model_copy(update={"resources": self.resources.model_copy(update={"gpus": 0})})

    def row_sources(self) -> list[RowSource]:
        """The rows of each domain, for `router` domains."""
        return [
            RowSource(f"branches.{at}.dataset_id", dataset_id, self.options.format, part_of(branch.name),
                      answered=False)
            for at, branch in enumerate(self.branches)
            if at in self.kept and (dataset_id := branch.dataset_id) is not None
        ]  # fmt: skip


def part_of(name: str) -> str:
    """Name of a domain's rows in the job's folder."""
    return f"domain-{name}"
