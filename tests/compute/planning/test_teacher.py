"""What distilling takes, by the planner: a teacher's weights, and logits of both models where they compare."""

from pathlib import Path

import pytest

from llama_stack_provider_moe.compute.planning.planner import Machine, Planner
from llama_stack_provider_moe.compute.planning.teacher import teacher_memory
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


def test_no_strategy_divides_it() -> None:
    planner = Planner(CONFIG, Machine("cuda", 80 * 10**9))
    options = {option.strategy: option for option in planner.plan(job(distill={})).options}
    assert options["ddp"].verdict == "fits"
    for name in ("fsdp", "ep"):
        assert options[name].verdict == "refused"
        assert "a distill block, whose teacher is not divided" in str(options[name].refused)
