"""The table of recipes agrees with the types that name them, and each recipe has a module that runs it."""

import ast
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args

import pytest

from llama_stack_provider_moe.spec import JOB_SPEC, Recipe, TrainingRecipe, TrainingSpec
from llama_stack_provider_moe.spec.recipes import RECIPES


def test_the_table_has_the_names_that_type_checkers_know() -> None:
    assert tuple(RECIPES) == get_args(Recipe)
    assert tuple(recipe.name for recipe in RECIPES.values()) == get_args(Recipe)
    assert tuple(recipe.name for recipe in RECIPES.values() if recipe.trains) == get_args(TrainingRecipe)
    assert tuple(recipe.spec for recipe in RECIPES.values() if recipe.trains) == get_args(TrainingSpec)


@pytest.mark.parametrize("name", RECIPES)
def test_a_job_is_validated_by_its_recipes_class(name: str) -> None:
    named = {"retain": {"dataset_id": "b"}, "target_layers": "1"}
    blocks: dict[str, dict[str, Any]] = {
        "circuit_breaker": {"circuit_breaker": named},
        "routing_analysis": {"data": {"sets": {"a": "a", "b": "b"}}},
        "ablation_measure": {"data": {"sets": {"target": "a", "baseline": "b"}}},
        "probe": {"data": {"sets": {"target": "a", "baseline": "b"}}},
        "ablation": {"measurements": "a", "ablate": [{"layer": 1, "measurement": 1}]},
        "mix": {"method": "btx", "branches": [{"name": "a", "model": "a"}, {"name": "b", "model": "b"}]},
        "surgery": {"surgery": {"action": "prune", "drop": {"all": "1"}}},
        "export": {"of": "a", "export": {"merged": True}},
        "grpo": {"reward": [{"grader": {"type": "length", "name": "short", "most": 9}}]},
        "distill": {"teacher": "t"},
    }
    body: dict[str, Any] = {"recipe": name, "model": "m", "data": {"dataset_id": "a"}} | blocks.get(name, {})
    if name in ("export", "playground", "ablation", "mix"):
        del body["data"]
    assert type(JOB_SPEC.validate_python(body)) is RECIPES[name].spec


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_has_a_module_with_run(name: str) -> None:
    """Read, not imported: recipes import torch."""
    found = find_spec(RECIPES[name].module)
    assert found is not None
    assert found.origin is not None
    tree = ast.parse(Path(found.origin).read_text(encoding="utf-8"))
    assert "run" in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_replay_of_the_old_policys_routes_needs_steps_that_share_a_generation() -> None:
    reward = [{"grader": {"type": "length", "name": "short", "most": 9}}]
    body: dict[str, Any] = {"recipe": "grpo", "model": "m", "data": {"dataset_id": "a"}, "reward": reward}
    with pytest.raises(ValueError, match="routing_replay: 'policy' has no effect where one step learns"):
        JOB_SPEC.validate_python(body | {"rl": {"routing_replay": "policy"}})
    for rl in ({"routing_replay": "policy", "n_iterations": 2}, {"routing_replay": "rollout"}):
        assert JOB_SPEC.validate_python(body | {"rl": rl}).rl.routing_replay == rl["routing_replay"]
