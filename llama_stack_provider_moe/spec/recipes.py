"""The recipes by name. The union `JobSpec` lists them; whatever needs their names or their classes reads this table."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import get_args

from llama_stack_provider_moe.spec import EditingSpec, ExportSpec, InferenceJob, JobSpec, Recipe, TrainingSpec

_PACKAGE = "llama_stack_provider_moe.compute.recipes"
_WITH_IMAGES = ("sft", "dpo")


@dataclass(frozen=True)
class RecipeEntry:
    """One recipe.

    Attributes:
        name: the value of a job's field `recipe`.
        spec: the class that validates its jobs.
        trains: whether its jobs train weights.
        images: whether its rows may have images.
    """

    name: Recipe
    spec: type[TrainingSpec | InferenceJob | EditingSpec | ExportSpec]
    trains: bool
    images: bool

    @property
    def module(self) -> str:
        """Full name of the module whose `run` runs its jobs. It imports torch."""
        return f"{_PACKAGE}.{self.name}"


def _entries() -> dict[str, RecipeEntry]:
    union, _ = get_args(JobSpec)
    found: dict[str, RecipeEntry] = {}
    for spec in get_args(union):
        (name,) = get_args(spec.model_fields["recipe"].annotation)
        found[name] = RecipeEntry(name, spec, trains=spec in get_args(TrainingSpec), images=name in _WITH_IMAGES)
    return found


RECIPES: Mapping[str, RecipeEntry] = _entries()


def no_images(recipe: Recipe) -> str | None:
    """Return why the rows of a recipe have no images; None if they may have them."""
    if RECIPES[recipe].images:
        return None
    takers = " and ".join(name for name, entry in RECIPES.items() if entry.images)
    return f"recipe {recipe} takes text only, and {takers} take images"
