"""Lists of recipes that can't import the specs: those of the dashboard's pages and of the client."""

import json
import re
from pathlib import Path
from typing import get_args

from llama_stack_provider_moe.client import calls
from llama_stack_provider_moe.control.server.dataset_profiles import WRITING
from llama_stack_provider_moe.spec import WritingSpec
from llama_stack_provider_moe.spec.training_jobs import TrainingRecipe

PAGES = Path(__file__).parents[2] / "llama_stack_provider_moe" / "control" / "dashboard" / "static"
RECIPES = set(get_args(TrainingRecipe))
ANSWERING = {get_args(spec.model_fields["recipe"].annotation)[0] for spec in get_args(WritingSpec)}


def listed(name: str) -> set[str]:
    (found,) = re.findall(rf"^export const {name} = (\[.*\]);$", (PAGES / "recipes.js").read_text(), re.MULTILINE)
    return set(json.loads(found))


def test_the_pages_offer_for_each_recipe_what_the_server_does() -> None:
    assert listed("PROFILED") == RECIPES
    assert listed("WRITE_TEXT") == RECIPES - {"reward"}, "a reward model is a classifier"
    assert listed("WRITE_ANSWERS") == ANSWERING == set(WRITING)


def test_no_other_page_has_a_list_of_its_own() -> None:
    for path in PAGES.glob("*.js"):
        if path.name != "recipes.js":
            assert not re.search(r'\["(sft|grpo)", *"', path.read_text(encoding="utf-8")), path.name


def test_the_client_profiles_for_each_recipe() -> None:
    assert set(get_args(calls.Recipe)) == RECIPES
