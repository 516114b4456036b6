"""Laws of the GRPO recipe, on tiny models."""

import json
import os
import signal
from collections import Counter
from itertools import batched
from statistics import mean, stdev
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from llama_stack_provider_moe.compute.recipes.grpo.shuffled import shuffled
from llama_stack_provider_moe.compute.worker.main import COMPLETED, FAILED, STOPPED
from llama_stack_provider_moe.ground import liveness
from llama_stack_provider_moe.jobdir.samples import GeneratedSample
from tests.support.alike import curve
from tests.support.training_support import Run, Workshop, prompt_rows, workshop

__all__ = ["workshop"]


def samples(run: Run) -> dict[int, list[GeneratedSample]]:
    """Step -> the answers that it learns from first."""
    files = sorted(run.folder.samples.glob("*.jsonl"))
    return {
        int(file.stem): [GeneratedSample.model_validate_json(line) for line in file.read_text().splitlines()]
        for file in files
    }


def grader(kind: str, **fields: Any) -> dict[str, Any]:
    return {"grader": {"type": kind, "name": "graded", **fields}}


HAS_E = grader("regex", pattern="e")


@pytest.fixture(scope="module")
def run(workshop: Workshop) -> Run:
    return workshop.run(
        "grpo", "qwen3_moe", training={"batch_size": 16}, rl={"n_generations": 4, "beta": 0.1}, reward=[HAS_E]
    )


def test_advantages_are_rewards_less_their_groups_mean_over_its_deviation(run: Run) -> None:
    """Eq. 3 of arXiv 2402.03300, with the deviation of a sample, and 1e-4 against division by 0."""
    assert run.exit_code == COMPLETED, run.reason
    found = samples(run)
    assert sorted(found) == [1, 2, 3, 4]
    spread = 0
    for answers in found.values():
        for group in batched(answers, 4):
            assert len({each.prompt for each in group}) == 1
            rewards = [each.reward for each in group]
            assert rewards == [float("e" in each.completion) for each in group]
            wanted = [(each - mean(rewards)) / (stdev(rewards) + 1e-4) for each in rewards]
            assert [each.advantage for each in group] == pytest.approx(wanted, abs=1e-5)
            spread += len(set(rewards)) > 1
    assert spread > 4
    assert run.steps("reward")[0] == pytest.approx(mean(each.reward or 0 for each in found[1]))


LOSSES = {
    "dapo": lambda answers: -sum(a.advantage * a.tokens for a in answers) / sum(a.tokens for a in answers),
    "grpo": lambda answers: -mean(a.advantage for a in answers),
    "dr_grpo": lambda answers: -sum(a.advantage * a.tokens for a in answers) / (len(answers) * 6),
    "gspo": lambda answers: -mean(a.advantage for a in answers),
}


@pytest.mark.parametrize("loss", LOSSES)
def test_the_loss_of_a_first_pass_is_the_papers_with_a_ratio_of_1(workshop: Workshop, loss: str) -> None:
    """The loss is that of the samples, whatever the micro-batches: those of a step count by their tokens or answers."""
    found = workshop.run(
        "grpo", "granitemoe", training={"batch_size": 4, "gradient_accumulation_steps": 2},
        rl={"n_generations": 4, "loss": loss}, reward=[grader("regex", pattern="e|t")],
    )  # fmt: skip
    assert found.exit_code == COMPLETED, found.reason
    for step, answers in samples(found).items():
        assert found.steps("policy_loss")[step - 1] == pytest.approx(LOSSES[loss](answers), abs=2e-5)
    if loss == "dr_grpo":
        answers = samples(found)[1]
        assert all(abs(a.advantage - ((a.reward or 0) - mean(b.reward or 0 for b in answers if b.group == a.group)))
                   < 1e-6 for a in answers)  # fmt: skip


def test_kl_and_the_adapter(run: Run, workshop: Workshop) -> None:
    """The reference is the base: the divergence is 0 before the first step, and then not."""
    assert run.steps("kl")[0] == 0 < run.steps("kl")[-1]
    base = AutoModelForCausalLM.from_pretrained(workshop.model("qwen3_moe")).eval()
    ids = torch.arange(20)[None] + 40
    before = base(ids).logits
    tuned = PeftModel.from_pretrained(base, run.folder.adapter).eval()
    assert (tuned(ids).logits - before).abs().max() > 1e-3
    with tuned.disable_adapter():
        assert torch.equal(tuned(ids).logits, before)
    assert run.resolved["reference"] == "the adapter off"


def test_the_balance_loss_is_beside_the_policy_loss(run: Run) -> None:
    for step in run.events("step"):
        wanted = step.metrics["policy_loss"] + 0.001 * step.metrics["aux_loss"]
        assert step.metrics["loss"] == pytest.approx(wanted, abs=1e-5)
    assert [event.step for event in run.events("routing")] == [1, 2, 3, 4]


def test_held_out_prompts_are_answered_greedily_and_their_loss_is_their_reward(run: Run) -> None:
    before, after = run.events("evaluation")
    assert before.metrics["validation_loss"] == -before.metrics["reward"]
    assert {"reward", "kl", "entropy", "completions/mean_length"} <= after.metrics.keys()
    assert not any(name.startswith(("clip_ratio", "frac_")) for name in after.metrics)


@pytest.mark.parametrize(
    ("family", "whole"),
    [
        ("granitemoe", False), ("mixtral", True), ("phimoe", False), ("llama4_text", False), ("deepseek_v3", True),
        ("gpt_oss", False), ("glm4_moe", True), ("qwen3_5_moe", False), ("lfm2_moe", False), ("granitemoehybrid", True),
    ],
)  # fmt: skip
def test_families_learn_from_what_they_wrote(workshop: Workshop, family: str, whole: bool) -> None:
    """Where nothing has changed between two passes over the same answers, no ratio is clipped."""
    found = workshop.run(
        "grpo", family, prompt_rows(8), optimizer={"lr": 1e-12}, rl={"n_iterations": 2, "loss": "gspo"},
        reward=[HAS_E], options={"eval_before_training": False}, **({"adapter": None} if whole else {}),
    )  # fmt: skip
    assert found.exit_code == COMPLETED, found.reason
    assert max(found.steps("clip_ratio/region_mean")) == 0
    assert max(found.steps("grad_norm")) > 1e-4
    if not whole:
        assert any("experts" in name for name in found.adapter()) or family in ("lfm2_moe",)


def rises(workshop: Workshop, **rl: Any) -> Run:
    found = workshop.run(
        "grpo", "qwen3_moe", prompt_rows(64), adapter=None, optimizer={"lr": 3e-3}, reward=[HAS_E],
        training={"batch_size": 32, "n_epochs": 4}, rl={"n_generations": 8, "max_completion_length": 4, **rl},
        options={"eval_before_training": False},
    )  # fmt: skip
    assert found.exit_code == COMPLETED, found.reason
    return found


@pytest.mark.wide
def test_a_reward_rises_and_a_shuffled_one_does_not(workshop: Workshop) -> None:
    trained, control = rises(workshop), rises(workshop, shuffle_rewards=True)
    learnt, by_chance = trained.steps("reward"), control.steps("reward")
    assert mean(learnt[-8:]) > mean(learnt[:4]) + 0.3
    assert abs(mean(by_chance[-8:]) - mean(by_chance[:4])) < 0.2
    assert learnt[0] == by_chance[0], "the order of rewards changes no mean"
    assert trained.steps("frac_reward_zero_std")[0] == control.steps("frac_reward_zero_std")[0]
    # One of a group of 8 keeps its place in the mean.
    assert 0.78 < mean(control.steps("shuffled_rewards")) < 0.97
    warnings = [event.text for event in control.events("message") if event.level == "warning"]
    assert any("a control: each answer learns from the reward of a random answer" in text for text in warnings)
    assert control.resolved["rl"]["shuffle_rewards"]
    assert "shuffled_rewards" in control.manifest.summary
    kept = samples(control)  # of the last steps
    for group in batched(kept[min(kept)], 8):
        rewards = [each.reward or 0.0 for each in group]
        assert rewards == [float("e" in each.completion) for each in group], "an answer is shown with its own"
        wanted = [(each - mean(rewards)) / (stdev(rewards) + 1e-4) for each in rewards]
        assert sorted(each.advantage for each in group) == pytest.approx(sorted(wanted), abs=1e-5)
    assert control.held_out("reward")[-1] == -control.held_out("validation_loss")[-1]


def test_all_orders_of_a_groups_rewards_are_equally_likely() -> None:
    rewards = torch.arange(6.0).view(6, 1)
    orders: Counter[tuple[float, ...]] = Counter()
    for step in range(3000):
        found, moved = shuffled(rewards, 3, 7, step)
        assert sorted(found[:3, 0].tolist()) == [0, 1, 2], "within the group"
        assert moved == pytest.approx((found != rewards).float().mean().item())
        orders[tuple(found[3:, 0].tolist())] += 1
    assert len(orders) == 6
    assert all(400 < count < 600 for count in orders.values())
    assert torch.equal(shuffled(rewards, 3, 7, 5)[0], shuffled(rewards, 3, 7, 5)[0]), "as a resumed job repeats it"


def test_a_reward_without_spread_ends_the_job_with_its_checkpoint(workshop: Workshop) -> None:
    found = workshop.run(
        "grpo", "qwen3_moe", training={"n_epochs": 5}, rl={"no_spread_generations": 4},
        reward=[grader("regex", pattern="never in an answer")],
    )  # fmt: skip
    assert found.exit_code == COMPLETED, found.reason
    assert found.manifest.stopped_by == "no_reward_spread"
    assert len(found.events("step")) == 4
    said = [event.text for event in found.events("message") if "equal within each group" in event.text]
    assert len(said) == 2
    assert "stops after 4" in said[0]
    assert found.manifest.artifacts[0].step == 4


@pytest.mark.parametrize("truncate", ["drop", "refuse"])
def test_answers_that_leave_prompts_no_room_are_an_error_with_both_settings(workshop: Workshop, truncate: str) -> None:
    found = workshop.run(
        "grpo", "qwen3_moe", rl={"max_completion_length": 62}, reward=[HAS_E],
        options={"max_length": 64, "truncate": truncate},
    )  # fmt: skip
    assert found.exit_code == FAILED
    assert "2 tokens, which rl.max_completion_length 62 leaves of options.max_length 64" in (found.reason or "")
    advice = "Lower rl.max_completion_length, raise options.max_length or options.max_dropped"
    assert (advice in (found.reason or "")) == (truncate == "drop")


def test_answers_that_all_reach_the_limit_are_no_spread_either(workshop: Workshop) -> None:
    found = workshop.run(
        "grpo", "qwen3_moe", training={"n_epochs": 5},
        rl={"no_spread_generations": 2, "mask_truncated": True, "max_completion_length": 2}, reward=[HAS_E],
    )  # fmt: skip
    assert found.manifest.stopped_by == "no_reward_spread", found.reason


def test_a_grader_that_fails_ends_the_job_with_its_name(workshop: Workshop) -> None:
    found = workshop.run("grpo", "qwen3_moe", reward=[grader("string_check", reference="{{item.missing}}",
                                                             operation="eq")])  # fmt: skip
    assert found.exit_code == FAILED
    assert "no answer to a held-out prompt got a reward; the last time: grader 'graded' gave no value: " \
        "unknown_name: {{item.missing}}: the row has no such column" in found.reason  # fmt: skip
    early = workshop.run("grpo", "qwen3_moe", reward=[grader("string_check", reference="{{item.missing}}",
                         operation="eq")], options={"eval_before_training": False})  # fmt: skip
    assert "grader 'graded' gave no value for 8 of the last 8 answers" in early.reason


def test_a_generation_needs_enough_prompts(workshop: Workshop) -> None:
    found = workshop.run("grpo", "qwen3_moe", prompt_rows(3), training={"batch_size": 8})
    assert "has 3 prompts to train on; expected at least 4" in found.reason


def test_old_answers_are_deleted(workshop: Workshop) -> None:
    found = workshop.run("grpo", "qwen3_moe", rl={"keep_samples": 16})
    assert sorted(samples(found)) == [3, 4]
    none = workshop.run("grpo", "qwen3_moe", rl={"keep_samples": 0})
    assert not none.folder.samples.exists()


def test_a_temperature_divides_the_logits_of_both_passes(workshop: Workshop) -> None:
    """With a second pass over the same answers and a rate of 0, ratios are 1 whatever the temperature."""
    found = workshop.run("grpo", "mixtral", optimizer={"lr": 1e-12}, rl={"temperature": 0.5, "n_iterations": 2})
    assert found.exit_code == COMPLETED, found.reason
    assert max(found.steps("clip_ratio/region_mean")) == 0


def test_the_gold_answer_and_columns_reach_graders(workshop: Workshop) -> None:
    rows = prompt_rows(8)
    for number, row in enumerate(rows):
        row["item"] |= {"gold": "e" if number % 2 else "never in an answer"}
    found = workshop.run("grpo", "qwen3_moe", rows, rows[:2], reward=[
        grader("string_check", reference="{{item.gold}}", operation="like")], options={"max_length": 64})  # fmt: skip
    assert found.exit_code == COMPLETED, found.reason
    assert json.loads(found.folder.spec.read_text())["reward"][0]["weight"] == 1
    assert {each.reward for answers in samples(found).values() for each in answers} == {0, 1}


@pytest.mark.parametrize(("replay", "whole"), [("rollout", True), ("policy", False)])
def test_routes_are_replayed_in_all_steps_of_a_generation(workshop: Workshop, replay: str, whole: bool) -> None:
    """The pass that follows a generation would choose the same experts; later ones, by other weights, some others."""
    found = workshop.run(
        "grpo", "qwen3_moe", prompt_rows(8), optimizer={"lr": 3e-2}, reward=[HAS_E], rl={
            "routing_replay": replay, "n_iterations": 4}, options={"eval_before_training": False},
        **({"adapter": None} if whole else {}),
    )  # fmt: skip
    assert found.exit_code == COMPLETED, found.reason
    changed = found.steps("routing/changed")
    assert changed[0] == changed[4] == 0
    assert max(changed) > 0
    assert found.resolved["rl"]["routing_replay"] == replay
    assert not any("routing/changed" in event.metrics for event in found.events("evaluation"))


@pytest.fixture(scope="module")
def unbroken(workshop: Workshop) -> Run:
    """Two steps learn from each of an epoch's four generations."""
    return workshop.run("grpo", "granitemoe", **BROKEN)


BROKEN: dict[str, Any] = {
    "rl": {"n_iterations": 2}, "reward": [HAS_E], "options": {"eval_before_training": False},
    "optimizer": {"lr": 1e-2},
}  # fmt: skip


@pytest.mark.parametrize(("generation", "step"), [(1, 0), (3, 4), (5, 8)])
def test_a_request_to_stop_ends_generating_within_a_token(
    workshop: Workshop, unbroken: Run, monkeypatch: pytest.MonkeyPatch, generation: int, step: int
) -> None:
    """Before the first step, among the steps of an epoch, and in the evaluation after it; each resumes bitwise."""
    advance, at = liveness.Counter.advance, []

    def advancing(counter: liveness.Counter, count: int = 1) -> None:
        advance(counter, count)
        if counter.work.stage == "generating":
            at.append(counter.work.done)
            if at.count(2) == generation and at[-1] == 2:
                os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(liveness.Counter, "advance", advancing)
    broken = workshop.run("grpo", "granitemoe", **BROKEN)
    assert broken.exit_code == STOPPED
    assert (at.count(2), at[-1]) == (generation, 2)
    assert [event.step for event in broken.events("cancelled")] == [step]
    assert not list(broken.folder.samples.glob(f"{step + 1:09d}*"))
    monkeypatch.undo()
    resumed = workshop.again(broken)
    assert resumed.exit_code == COMPLETED, resumed.reason
    assert curve(resumed) == curve(unbroken)
    assert samples(resumed) == samples(unbroken)
    theirs = unbroken.adapter()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in resumed.adapter().items())
    assert resumed.held_out("validation_loss") == unbroken.held_out("validation_loss")
