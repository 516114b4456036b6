"""The recipes by name. The union `JobSpec` lists them; whatever needs their names or their classes reads this table."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import get_args

from llama_stack_provider_moe.spec import EditingSpec, ExportSpec, InferenceJob, JobSpec, Recipe, TrainingSpec

_PACKAGE = "llama_stack_provider_moe.compute.recipes"


@dataclass(frozen=True)
class RecipeEntry:
    """One recipe.

    Attributes:
        name: the value of a job's field `recipe`.
        spec: the class that validates its jobs.
        trains: whether its jobs train weights.
    """

    name: Recipe
    spec: type[TrainingSpec | InferenceJob | EditingSpec | ExportSpec]
    trains: bool

    @property
    def module(self) -> str:
        """Full name of the module whose `run` runs its jobs. It imports torch."""
        return f"{_PACKAGE}.{self.name}"


def _entries() -> dict[str, RecipeEntry]:
    union, _ = get_args(JobSpec)
    found: dict[str, RecipeEntry] = {}
    for spec in get_args(union):
        (name,) = get_args(spec.model_fields["recipe"].annotation)
        found[name] = RecipeEntry(name, spec, trains=spec in get_args(TrainingSpec))
    return found


RECIPES: Mapping[str, RecipeEntry] = _entries()
