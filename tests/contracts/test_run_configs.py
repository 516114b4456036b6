"""Run configs for H100s say what the planner says of the jobs that they name."""

import pytest

from llama_stack_provider_moe.ground import strict_yaml
from llama_stack_provider_moe.spec.pipelines import PipelineSpec
from tests.support import planned_configs, planned_pipelines

# Those whose models are quickest to plan for; `python -m tests.support.planned_configs` writes all.
PLANNED = ["job_templates/granite_moe_sft.json", "job_templates/mixtral_4bit_dpo.json"]


@pytest.mark.parametrize("path", planned_configs.run_configs(), ids=lambda path: path.stem)
def test_every_job_has_its_line(path: planned_configs.Path) -> None:
    told = path.read_text(encoding="utf-8").split(planned_configs.FIRST)[1].split(planned_configs.LAST)[0]
    names = [planned_configs.Path(template).stem for template in planned_configs.templates(path)]
    assert [line.split(":")[0].strip("# ") for line in told.splitlines()[::2]] == names
    assert all(line.endswith("GB, fits") for line in told.splitlines()[::2])


def test_there_is_one_for_one_four_and_eight_gpus() -> None:
    assert {"h100_one_gpu", "h100_four_gpus", "h100_eight_gpus"} <= {
        path.stem for path in planned_configs.run_configs()
    }


@pytest.mark.parametrize("template", PLANNED)
def test_the_comment_is_what_the_planner_says(template: str) -> None:
    (path,) = [path for path in planned_configs.run_configs() if template in planned_configs.templates(path)]
    told = planned_configs.line(template)
    assert told in path.read_text(encoding="utf-8"), f"run `python -m tests.support.planned_configs`; it says {told}"


@pytest.mark.parametrize("part", ["math", "routers"])
def test_the_table_of_a_pipeline_is_what_the_planner_says(part: str) -> None:
    told = planned_pipelines.line(part)
    assert told in planned_pipelines.PAGE.read_text(encoding="utf-8"), (
        f"run `python -m tests.support.planned_pipelines`; it says {told}"
    )


def test_the_hours_of_the_pipeline_fit_into_twelve() -> None:
    pipeline = PipelineSpec.model_validate(strict_yaml.parse(planned_pipelines.TEMPLATE.read_bytes()))
    options = [part.job["options"] for part in pipeline.parts if "options" in part.job]
    assert sum(each["max_hours"] for each in options) == 11.5
    for each in options:
        assert (each["lr_scheduler"], each["autosave_minutes"], each["early_stopping_patience"]) == ("cosine", 10, 1)
