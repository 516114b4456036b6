"""What a sweep is asked to do: one job, and the values of its settings to try."""

import itertools
import json
import math
import random
import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from llama_stack_provider_moe.spec.blocks import BUILT_AT_ONCE, JOB_ID_PATTERN, Block
from llama_stack_provider_moe.spec.notify import SweepNotify

MAX_VALUES = 1000
MAX_SETTINGS = 16
# Figures of an evaluation on held-out rows. TRL writes them with `eval_` in front, which may be written here as well.
METRICS = (
    "validation_loss", "loss", "perplexity", "mean_token_accuracy", "rewards/accuracies", "rewards/margins", "reward",
    "kl", "completions/mean_length", "completions/clipped_ratio",
)  # fmt: skip
_EVERY = ("validation_loss", "loss", "perplexity")
_OF_RECIPE = {
    "sft": (*_EVERY, "mean_token_accuracy"),
    "dpo": (*_EVERY, "rewards/accuracies", "rewards/margins"),
    "kto": (*_EVERY, "rewards/margins"),
    "reward": (*_EVERY, "rewards/accuracies", "rewards/margins"),
    "distill": ("validation_loss", "perplexity", "completions/mean_length", "completions/clipped_ratio"),
    # The mean reward by grader too, `rewards/NAME/mean`; the loss of a policy says nothing, and the one on held-out
    # prompts is their reward, negated.
    "grpo": ("validation_loss", "perplexity", "reward", "kl", "completions/mean_length", "completions/clipped_ratio"),
}
_OF_GRADER = re.compile(r"rewards/([A-Za-z0-9][A-Za-z0-9 ._-]{0,63})/mean")
# Settings that name a job instead of changing it.
_NOT_SWEPT = ("job_uuid", "recipe", "labels", "note", "notify", "metadata")

SettingPath = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*(\.[a-z0-9_]+){0,7}$", max_length=200)]
type Chosen = dict[str, Any]


class Halving(Block):
    """Early ending of jobs that do worse than others at the same evaluation, by a pruner of Optuna."""

    pruner: Literal["successive_halving", "hyperband"] = Field(
        default="successive_halving",
        description="successive_halving: Optuna's SuccessiveHalvingPruner (ASHA); hyperband: its HyperbandPruner, "
        "which begins to end jobs at different evaluations, and needs many jobs.",
    )
    min_evaluations: int = Field(
        default=1, ge=1, le=10_000, description="Number of evaluations after which jobs are first compared."
    )
    reduction_factor: int = Field(
        default=2, ge=2, le=100, description="Of so many jobs that are compared, one goes on; the others end."
    )


class SweepSpec(Block):
    """A sweep: jobs that differ in some settings, compared by a held-out figure."""

    model_config = BUILT_AT_ONCE

    sweep_uuid: str | None = Field(
        default=None,
        pattern=JOB_ID_PATTERN,
        max_length=120,
        description="Name of the sweep; its jobs get a number behind it. Left out: the server chooses one.",
    )
    job: dict[str, Any] = Field(description="Job that all jobs of the sweep begin from, as in `POST jobs`.")
    parameters: dict[SettingPath, Annotated[list[Any], Field(min_length=1, max_length=MAX_VALUES)]] = Field(
        min_length=1,
        max_length=MAX_SETTINGS,
        description="Values to try, by setting (`optimizer.lr`); every combination is a job.",
    )
    random: int | None = Field(
        default=None, ge=1, le=10_000, description="Number of combinations to draw at random; left out: all of them."
    )
    seed: int = Field(default=0, ge=0, lt=2**32, description="Seed of the draw; the same seed draws the same.")
    max_parallel: int = Field(default=1, ge=1, le=64, description="Maximum number of its jobs that run at once.")
    metric: str = Field(
        default="validation_loss",
        description=f"Figure on the held-out rows that ranks the jobs: {', '.join(METRICS)}, or rewards/NAME/mean of a "
        "grader; or with `eval_` in front.",
    )
    direction: Literal["minimize", "maximize"] = Field(
        default="minimize", description="Whether a smaller or a larger figure is better; a reward needs maximize."
    )
    halving: Halving | None = Field(
        default=None, description="Early ending of jobs that do worse; left out: each job runs to its end."
    )
    notify: SweepNotify | None = Field(
        default=None,
        description="Whom to tell once, when all its jobs have ended; `job.notify` is about each. Left out: nobody.",
    )

    @field_validator("metric", mode="after")
    @classmethod
    def _is_measured(cls, metric: str) -> str:
        name = metric.removeprefix("eval_")
        if name not in METRICS and _OF_GRADER.fullmatch(name) is None:
            raise ValueError(f"{metric[:80]!r} is not valid; expected one of {', '.join(METRICS)}, or "
                             "rewards/NAME/mean of a grader")  # fmt: skip
        return metric

    @field_validator("parameters", mode="after")
    @classmethod
    def _values_differ(cls, parameters: dict[str, list[Any]]) -> dict[str, list[Any]]:
        for path, values in parameters.items():
            if path.partition(".")[0] in _NOT_SWEPT:
                raise ValueError(f"{path}: can't be swept; expected a setting that changes the training")
            try:
                spelled = [json.dumps(value, sort_keys=True) for value in values]
            except RecursionError:
                raise ValueError(f"{path}: a value is nested too deeply") from None
            if len(set(spelled)) < len(spelled):
                raise ValueError(f"{path}: a value is given twice; expected each once")
        for one, other in itertools.permutations(parameters, 2):
            if other.startswith(f"{one}."):
                raise ValueError(f"{other}: is a part of {one}, which is swept too; expected one of them")
        return parameters

    @field_validator("job", mode="after")
    @classmethod
    def _has_no_name(cls, job: dict[str, Any]) -> dict[str, Any]:
        if job.get("job_uuid") is not None:
            raise ValueError("job_uuid: is not for a sweep, whose jobs get the sweep's name and a number; leave it out")
        return job

    @model_validator(mode="after")
    def _not_more_than_there_are(self) -> "SweepSpec":
        if self.random is not None and self.random > self.count:
            raise ValueError(f"random: {self.random} is not valid; expected at most {self.count}, the number of "
                             "combinations")  # fmt: skip
        return self

    @model_validator(mode="after")
    def _rewards_are_maximized(self) -> "SweepSpec":
        name = self.metric.removeprefix("eval_")
        if self.direction == "minimize" and (name == "reward" or _OF_GRADER.fullmatch(name) is not None):
            raise ValueError(f"direction: 'minimize' is not valid with metric {self.metric!r}, because a larger reward "
                             "is better; expected 'maximize'")  # fmt: skip
        return self

    @property
    def count(self) -> int:
        """Number of combinations, before any are drawn."""
        return math.prod(len(values) for values in self.parameters.values())

    @property
    def jobs(self) -> int:
        """Number of jobs of the sweep."""
        return self.count if self.random is None else self.random

    def combinations(self) -> list[Chosen]:
        """Return the value of each swept setting, for each job; in the order of the values as they were given."""
        drawn = range(self.count)
        if self.random is not None:
            drawn_at_random = random.Random(self.seed).sample(drawn, self.random)  # of so many, none is written out
            return [self._combination(number) for number in sorted(drawn_at_random)]
        return [self._combination(number) for number in drawn]

    def _combination(self, number: int) -> Chosen:
        """Return a combination by its number; the last setting varies fastest."""
        found: Chosen = {}
        for path, values in reversed(self.parameters.items()):
            number, place = divmod(number, len(values))
            found[path] = values[place]
        return {path: found[path] for path in self.parameters}


def metrics_of(recipe: str, graders: Sequence[str] = ()) -> list[str]:
    """Return the figures on held-out rows that a job of a recipe has; with `graders`, its graders' too."""
    return [*_OF_RECIPE.get(recipe, _EVERY), *(f"rewards/{name}/mean" for name in graders)]


def described(chosen: Chosen) -> str:
    """Return a combination as text, for errors and lists: `optimizer.lr=0.0001, adapter.rank=8`."""
    return ", ".join(f"{path}={json.dumps(value)[:60]}" for path, value in chosen.items())


def body_of(job: dict[str, Any], chosen: Chosen) -> dict[str, Any]:
    """Return a job's body with the chosen values in it; `job` is not changed.

    Raises:
        ValueError: a path leads through something that is not a block.
    """
    body = dict(job)
    for path, value in chosen.items():
        *blocks, last = path.split(".")
        block = body
        for depth, name in enumerate(blocks, 1):
            inner = block.get(name)
            if inner is not None and not isinstance(inner, dict):
                raise ValueError(f"{path}: leads through {'.'.join(blocks[:depth])}, which is not a block")
            inner = dict(inner or {})
            block[name] = inner
            block = inner
        block[last] = value
    return body
