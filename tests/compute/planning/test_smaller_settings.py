"""The changes that a planner tries when a job does not fit."""

from llama_stack_provider_moe.compute.planning.smaller_settings import of_one_kind
from tests.compute.planning.test_planner import job


def test_adapters_in_bf16_are_proposed_for_every_optimiser_that_takes_them() -> None:
    for kind, coded in (("adamw", True), ("adamw_8bit", False), ("paged_adamw_8bit", False)):
        ladders = list(of_one_kind(job(optimizer={"optimizer_type": kind}), on_gpus=True))
        wanted = {"adapter.dtype": "bf16"} | ({"optimizer.optimizer_type": "adamw_8bit"} if coded else {})
        assert wanted in [each for ladder in ladders for each in ladder]
    for blocks in ({"optimizer": {"optimizer_type": "sgd"}}, {"training": {"dtype": "fp32"}}):
        ladders = list(of_one_kind(job(**blocks), on_gpus=True))
        assert not any("adapter.dtype" in each for ladder in ladders for each in ladder)
