"""A GRPO job's data set must fill a generation with the rows that are not held out."""

from typing import Any

import pytest

from llama_stack_provider_moe.spec import JOB_SPEC
from llama_stack_provider_moe.spec.generation import held_out_of
from llama_stack_provider_moe.spec.row_sources import RowSource


def train(batch: int, accumulation: int, per_generation: int, answers: int, split: float, **data: Any) -> RowSource:
    body = {
        "recipe": "grpo", "model": "m", "data": {"dataset_id": "a", **data},
        "training": {"batch_size": batch, "gradient_accumulation_steps": accumulation},
        "rl": {"n_generations": answers, "steps_per_generation": per_generation},
        "options": {"validation_split": split}, "reward": [{"grader": {"type": "length", "name": "x", "most": 9}}],
    }  # fmt: skip
    return JOB_SPEC.validate_python(body).row_sources()[0]


@pytest.mark.parametrize("split", [0.0, 0.001, 0.05, 0.1, 0.15, 0.25, 1 / 3, 0.5])
@pytest.mark.parametrize(("sizes", "prompts"), [((4, 1, 1, 4), 1), ((8, 4, 1, 8), 4), ((32, 8, 4, 4), 256)])
def test_the_least_number_of_rows_is_the_first_that_fills_a_generation(
    split: float, sizes: tuple[int, int, int, int], prompts: int
) -> None:
    least = train(*sizes, split).least
    assert least - held_out_of(least, split) >= prompts
    assert all(
        rows - held_out_of(rows, split) < prompts for rows in range(max(1, prompts), least) if split and rows > 1
    )
    assert least == prompts or split


def test_an_error_has_the_numbers() -> None:
    assert train(8, 4, 1, 8, 0.1).why_least == (
        "at least 5 rows: 4 fill one generation (training.batch_size 8 x gradient_accumulation_steps 4 x "
        "rl.steps_per_generation 1 / rl.n_generations 8), and 1 are held out (options.validation_split 0.1)"
    )


def test_a_validation_data_set_leaves_all_rows_to_train_on() -> None:
    source = train(8, 4, 1, 8, 0.1, validation_dataset_id="b")
    assert source.least == 4
    assert "held out" not in source.why_least


@pytest.mark.parametrize("strategy", ["fsdp", "ep"])
def test_several_processes_need_whole_models(strategy: str) -> None:
    body: dict[str, Any] = {
        "recipe": "grpo", "model": "m", "data": {"dataset_id": "a"}, "training": {"batch_size": 2},
        "reward": [{"grader": {"type": "length", "name": "x", "most": 9}}],
        "resources": {"gpus": 0, "processes": 2},
    }  # fmt: skip
    assert JOB_SPEC.validate_python(body).resources.ranks == 2
    body["resources"]["strategy"] = "ddp"
    JOB_SPEC.validate_python(body)
    body["resources"]["strategy"] = strategy
    with pytest.raises(ValueError, match=f"resources.strategy: '{strategy}' is not valid with recipe 'grpo', whose"):
        JOB_SPEC.validate_python(body)
