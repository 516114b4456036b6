"""Laws of the first step, for every family: before anything is learnt, policy and reference are equal.

A fresh adapter adds nothing, so DPO's loss is ln 2 and its margins are 0, and a circuit breaker's states have cosine 1
with the base's and no distance from them. Whatever differs between the two passes (dropout, noise, another routing,
another kernel) breaks one of these.
"""

import math

import pytest

from llama_stack_provider_moe.compute.worker.main import COMPLETED
from tests.support import tiny_models
from tests.support.training_support import Workshop, dpo_rows, sft_rows, workshop

__all__ = ["workshop"]

# In fp32 on a CPU, summed log-probabilities of some -100 and states of some 1; Phi-MoE's routers, when they draw at
# random, make 2e-3 of the first and 1e-3 of the second.
LOGPS_TOLERANCE, STATES_TOLERANCE = 1e-4, 1e-4
ONE_STEP = {"max_steps_per_epoch": 1}


@pytest.mark.parametrize("ahead", [False, True], ids=["together", "ahead"])
@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_a_preferences_first_loss_is_ln_2(workshop: Workshop, family: str, ahead: bool) -> None:
    rows, held_out = dpo_rows(4), dpo_rows(2, 50)
    training = {**ONE_STEP, "batch_size": 4}
    run = workshop.run(
        "dpo", family, rows, held_out, training=training, options={"precompute_ref_log_probs": ahead}
    )  # fmt: skip
    assert run.exit_code == COMPLETED, run.reason
    metrics = run.events("step")[0].metrics
    loss = metrics.get("preference_loss", metrics["loss"])  # logged separately if there is a balance loss
    assert loss == pytest.approx(math.log(2), abs=LOGPS_TOLERANCE)
    assert run.held_out("validation_loss")[0] == pytest.approx(math.log(2), abs=LOGPS_TOLERANCE)
    for name in ("rewards/margins", "rewards/chosen", "rewards/rejected"):
        assert run.steps(name)[0] == pytest.approx(0, abs=LOGPS_TOLERANCE), name
        assert run.held_out(name)[0] == pytest.approx(0, abs=LOGPS_TOLERANCE), name
        assert abs(run.held_out(name)[-1]) > LOGPS_TOLERANCE, "it differs from the reference"


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_a_breakers_first_states_are_the_bases(workshop: Workshop, family: str) -> None:
    """At the last block, so that the experts of earlier blocks run."""
    block = {"target_layers": "1"}
    run = workshop.run(
        "circuit_breaker", family, sft_rows(4), sft_rows(2, 50), training=ONE_STEP, circuit_breaker=block,
        optimizer={"lr": 2e-2},
    )  # fmt: skip
    assert run.exit_code == COMPLETED, run.reason
    step, held_out = run.events("step")[0].metrics, run.events("evaluation")[0].metrics
    for name in ("cosine/break/1", "cosine/retain/1"):
        assert step[name] == pytest.approx(1, abs=STATES_TOLERANCE), name
        assert held_out[name] == pytest.approx(1, abs=STATES_TOLERANCE), name
    assert step["reroute_loss"] == pytest.approx(1, abs=STATES_TOLERANCE)
    assert step["retain_loss"] == pytest.approx(0, abs=STATES_TOLERANCE)
    for name in ("distance/break", "distance/retain"):
        assert held_out[name] == pytest.approx(0, abs=STATES_TOLERANCE), name
        assert run.held_out(name)[-1] > 1e-3, "it differs from its base"
