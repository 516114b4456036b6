"""What distilling takes, by the planner: a teacher's weights, and logits of both models where they compare."""

from pathlib import Path
from typing import Any

import pytest

from llama_stack_provider_moe.compute.planning.estimated_time import flops_a_token
from llama_stack_provider_moe.compute.planning.plan_command import planned
from llama_stack_provider_moe.compute.planning.planner import Machine, Planner
from llama_stack_provider_moe.compute.planning.teacher import teacher_memory
from llama_stack_provider_moe.compute.planning.throughput import count_flops
from llama_stack_provider_moe.errors import MoeError
from llama_stack_provider_moe.spec import JOB_SPEC
from tests.compute.planning.test_planner import CONFIG, job
from tests.support import tiny_models

LOGITS = 8 * 64 * 384  # rows x tokens x vocabulary


def test_the_adapter_off_takes_only_logits() -> None:
    found = teacher_memory(job(distill={}), CONFIG)
    assert found is not None
    assert (found.copies, found.weights, found.logits) == (0, 0, LOGITS * 2)
    assert found.compared == LOGITS * 20
    assert teacher_memory(job(), CONFIG) is None


def test_another_model_takes_its_weights(tmp_path: Path) -> None:
    other = tiny_models.build("llama", tmp_path / "other")
    found = teacher_memory(job(distill={"model": str(other)}), CONFIG)
    assert found is not None
    assert found.weights == 2 * sum(each.numel() for each in tiny_models.model("llama").parameters())


def test_on_policy_distillation_compares_answers_a_tile_at_a_time(tmp_path: Path) -> None:
    other = tiny_models.build("llama", tmp_path / "other")
    changes: dict[str, Any] = {"recipe": "distill", "teacher": str(other), "resources": {"gpus": 1},
                               "options": {"max_length": 64}}  # fmt: skip
    body = job().model_dump(mode="json", exclude={"recipe", "distill", "options", "resources"}) | changes
    spec = JOB_SPEC.validate_python(body | {"generation": {"max_completion_length": 40}})
    found = teacher_memory(spec, CONFIG)  # type: ignore[arg-type]
    assert found is not None
    assert found.weights == 2 * sum(each.numel() for each in tiny_models.model("llama").parameters())
    assert (found.copies, found.logits) == (0, 8 * 40 * 384 * 2)
    assert found.compared == 256 * 384 * 48, "of 320 tokens"
    planner = Planner(CONFIG, Machine("cuda", 80 * 10**9))
    plain, held = (planner.estimate(each, "ddp") for each in (job(resources={"gpus": 1}), spec))  # type: ignore[arg-type]
    assert held[1] - plain[1] == found.weights


def test_a_plan_finds_a_teacher_of_the_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOE_STATE_DIR", str(tmp_path))
    for name in ("student", "before"):
        tiny_models.build("granitemoe", tmp_path / "models" / name)
    body = {"recipe": "distill", "model": "student", "teacher": "before", "data": {"dataset_id": "rows"},
            "generation": {"max_completion_length": 16}, "options": {"max_length": 64},
            "resources": {"gpus": 0}}  # fmt: skip
    plan: Any = planned(body, 16 * 10**9)
    assert plan["plan"]["verdict"] == "fits"
    (tmp_path / "models" / "before" / "config.json").write_text("{}")
    with pytest.raises(MoeError, match=r"^teacher: the config of "):
        planned(body, 16 * 10**9)


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_the_plan_counts_it(device: str) -> None:
    planner = Planner(CONFIG, Machine(device, 80 * 10**9))  # type: ignore[arg-type]
    one = {"resources": {"gpus": 1}}
    plain, held = (planner.estimate(job(**one, **more), "ddp") for more in ({}, {"distill": {}}))
    assert held[1] == plain[1], "no further weights"
    double = planner.estimate(job(**one, distill={}, training={"batch_size": 16}), "ddp")
    assert double[0].terms.working - held[0].terms.working >= LOGITS * (2 + 20), "both models' logits grow"
    plain, copied = (planner.estimate(job(**one, adapter=None, **more), "ddp") for more in ({}, {"distill": {}}))
    weights = 2 * sum(each.numel() for each in tiny_models.model("mixtral", hidden_size=512, intermediate_size=1024)
                      .parameters())  # fmt: skip
    assert copied[1] - plain[1] == pytest.approx(weights, rel=0.01)


def test_the_time_has_the_pass_of_a_teacher_of_its_own_size(tmp_path: Path) -> None:
    """A teacher counted as large as the model, whatever it was."""
    planner = Planner(CONFIG, Machine("cuda", 80 * 10**9))
    plain = flops_a_token(planner, job())
    same = flops_a_token(planner, job(distill={})) - plain
    for layers in (1, 4):
        other = tiny_models.build("llama", tmp_path / f"{layers} layers", num_hidden_layers=layers)
        taught = flops_a_token(planner, job(distill={"model": str(other)})) - plain
        teacher = tiny_models.model("llama", num_hidden_layers=layers).requires_grad_(False)
        assert taught * 64 == pytest.approx(count_flops(teacher, None).of([64]))
        assert taught < same / 2


def test_no_strategy_divides_it() -> None:
    planner = Planner(CONFIG, Machine("cuda", 80 * 10**9))
    options = {option.strategy: option for option in planner.plan(job(distill={})).options}
    assert options["ddp"].verdict == "fits"
    for name in ("fsdp", "ep"):
        assert options[name].verdict == "refused"
        assert "a distill block, whose teacher is not divided" in str(options[name].refused)
