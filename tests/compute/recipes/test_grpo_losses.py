"""What GRPO's steps compute, against derivations by hand in plain Python: double precision, no torch, no code of TRL's.

Each job learns twice from every generation, at a rate so high that ratios leave 1 by far. The value of each step's
loss and its derivative by each token's log-probability are compared, so that a token clipped on the wrong side is seen.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import mean, stdev
from typing import Any, NamedTuple

import pytest
import torch
from transformers import AutoModelForCausalLM

from llama_stack_provider_moe.compute.recipes.grpo import GRPO
from llama_stack_provider_moe.compute.recipes.grpo.held_out import HeldOutRewards
from llama_stack_provider_moe.compute.worker.main import COMPLETED
from llama_stack_provider_moe.graders.panel import Graded
from llama_stack_provider_moe.graders.samples import Sample
from llama_stack_provider_moe.jobdir.samples import GeneratedSample
from tests.support.training_support import Workshop, prompt_rows, workshop

__all__ = ["workshop"]

BETA, LONGEST, MICRO_BATCHES = 0.05, 6, 2
REWARD = [
    {"grader": {"type": "length", "name": "long", "unit": "characters", "least": 25, "margin": 25}, "weight": 2.0},
    {"grader": {"type": "regex", "name": "has e", "pattern": "e"}, "weight": 0.5},
]


class Answer(NamedTuple):
    """One answer in a micro-batch, its padding taken off."""

    new: list[float]  # log-probability of each token now
    old: list[float]  # by the model that wrote it
    reference: list[float]  # by the model before training
    advantage: float
    slopes: list[float]  # of the job's loss, by `new`

    @property
    def ratios(self) -> list[float]:
        return [math.exp(new - old) for new, old in zip(self.new, self.old, strict=True)]


class MicroBatch(NamedTuple):
    """What the job computed of a micro-batch."""

    answers: list[Answer]
    loss: float
    prompts: list[list[int]]
    completions: list[list[int]]


Piece = tuple[float, float]  # a token's part of the loss, and its derivative by the token's log-probability


def clipped(ratio: float, advantage: float, low: float, high: float) -> Piece:
    """-min(r A, clip(r, 1 - low, 1 + high) A); dr/dlogp = r, and 0 where the clipped one is the smaller."""
    bounded = min(max(ratio, 1 - low), 1 + high)
    if bounded * advantage < ratio * advantage:
        return -bounded * advantage, 0.0
    return -ratio * advantage, -ratio * advantage


def tokenwise(answer: Answer, low: float, high: float) -> list[Piece]:
    """GRPO, arXiv 2402.03300; asymmetric in DAPO, arXiv 2503.14476."""
    return [clipped(ratio, answer.advantage, low, high) for ratio in answer.ratios]


def geometric(answer: Answer) -> float:
    """The ratio of an answer: the geometric mean of its tokens'."""
    return math.exp(mean(new - old for new, old in zip(answer.new, answer.old, strict=True)))


def of_sequence(answer: Answer, low: float, high: float) -> list[Piece]:
    """GSPO, arXiv 2507.18071."""
    return [clipped(geometric(answer), answer.advantage, low, high)] * len(answer.new)


def weighted(answer: Answer, low: float, high: float) -> list[Piece]:
    """CISPO, arXiv 2506.13585: a bounded weight without a gradient, times A log p."""
    weights = [min(ratio, high) * answer.advantage for ratio in answer.ratios]
    return [(-weight * new, -weight) for weight, new in zip(weights, answer.new, strict=True)]


def gated(answer: Answer, low: float, high: float) -> list[Piece]:
    """SAPO, arXiv 2511.20347: 4/t sigmoid(t (r - 1)) A, t 1 for advantages above 0, else 1.05."""
    t = 1.0 if answer.advantage > 0 else 1.05
    gates = [(ratio, 1 / (1 + math.exp(-t * (ratio - 1)))) for ratio in answer.ratios]
    return [(-4 / t * gate * answer.advantage, -4 * gate * (1 - gate) * ratio * answer.advantage)
            for ratio, gate in gates]  # fmt: skip


def estimates(answer: Answer) -> list[Piece]:
    """The estimate p_ref/p - log(p_ref/p) - 1 of arXiv 2402.03300, which is never below 0."""
    differences = [ref - new for ref, new in zip(answer.reference, answer.new, strict=True)]
    return [(math.exp(each) - each - 1, 1 - math.exp(each)) for each in differences]


def divergence(answer: Answer, whole: bool) -> list[Piece]:
    """These estimates times the ratio, whose derivative counts too (arXiv 2512.02556).

    The derivative is then ratio x log(p/p_ref), that of the divergence itself. `whole`: with the ratio of the answer.
    """
    found = estimates(answer)
    if whole:
        ratio = geometric(answer)
        mine = ratio * mean(value for value, _ in found)
        return [(ratio * value, ratio * slope + mine) for value, slope in found]
    return [
        (ratio * value, ratio * (new - ref))
        for ratio, (value, _), new, ref in zip(answer.ratios, found, answer.new, answer.reference, strict=True)
    ]


# A token's weight, by its answer, its micro-batch, and the micro-batches of its step.
type Weight = Callable[[Answer, MicroBatch, list[MicroBatch]], float]


def tokens(*batches: MicroBatch) -> int:
    return sum(len(answer.new) for batch in batches for answer in batch.answers)


def each_token(answer: Answer, batch: MicroBatch, step: list[MicroBatch]) -> float:
    return 1 / tokens(*step)


def each_answer(answer: Answer, batch: MicroBatch, step: list[MicroBatch]) -> float:
    return 1 / len(answer.new) / sum(len(every.answers) for every in step)


def largest_length(answer: Answer, batch: MicroBatch, step: list[MicroBatch]) -> float:
    return 1 / LONGEST / sum(len(every.answers) for every in step)


def local(answer: Answer, batch: MicroBatch, step: list[MicroBatch]) -> float:
    return 1 / tokens(batch) / len(step)


class Case(NamedTuple):
    """A loss: its tokens' parts and weights, its limits as the job has them, and further settings of `rl`."""

    part: Callable[[Answer, float, float], list[Piece]]
    weight: Weight
    low: float
    high: float
    settings: dict[str, Any]
    scale: str


TIGHT = {"epsilon": 0.02, "epsilon_high": 0.05}
CASES = {
    "dapo": Case(tokenwise, each_token, 0.02, 0.05, TIGHT, "group"),
    "grpo": Case(tokenwise, each_answer, 0.03, 0.03, {"epsilon": 0.03, "scale_rewards": "batch"}, "batch"),
    "dr_grpo": Case(tokenwise, largest_length, 0.02, 0.05, TIGHT, "none"),
    "bnpo": Case(tokenwise, local, 0.02, 0.05, {**TIGHT, "combine": "normalize"}, "normalize"),
    "cispo": Case(weighted, each_token, 0, 1.05, {"epsilon_high": 1.05}, "group"),
    "sapo": Case(gated, each_answer, 0, 0, {}, "group"),
    "gspo": Case(of_sequence, each_answer, 3e-4, 4e-4, {}, "group"),
}


@contextmanager
def watched(patch: pytest.MonkeyPatch) -> Iterator[list[MicroBatch]]:
    """The micro-batches that jobs train on inside the `with`, in order."""
    found: list[MicroBatch] = []
    passes: list[torch.Tensor] = []
    ask, compute = GRPO._get_per_token_logps_and_entropies, GRPO.compute_loss

    def asked(self: GRPO, *arguments: Any, **keywords: Any) -> Any:
        passed = ask(self, *arguments, **keywords)
        passes.append(passed[0])
        return passed

    def computed(self: GRPO, model: Any, inputs: Any, *arguments: Any, **keywords: Any) -> Any:
        passes.clear()
        loss = compute(self, model, inputs, *arguments, **keywords)
        if self.model.training:
            (new,) = passes
            (slopes,) = torch.autograd.grad(loss, new, retain_graph=True)
            found.append(taken(inputs, new, slopes, float(loss.detach())))
        return loss

    with patch.context() as patched:
        patched.setattr(GRPO, "_get_per_token_logps_and_entropies", asked)
        patched.setattr(GRPO, "compute_loss", computed)
        yield found


def taken(inputs: Any, new: torch.Tensor, slopes: torch.Tensor, loss: float) -> MicroBatch:
    kept = [mask.bool() for mask in inputs["completion_mask"]]

    def rows(values: torch.Tensor, masks: Any = kept) -> list[list[Any]]:
        return [row[mask].tolist() for row, mask in zip(values.detach(), masks, strict=True)]

    answers = map(Answer, rows(new), rows(inputs["old_per_token_logps"]), rows(inputs["ref_per_token_logps"]),
                  inputs["advantages"].tolist(), rows(slopes))  # fmt: skip
    prompts = rows(inputs["prompt_ids"], [mask.bool() for mask in inputs["prompt_mask"]])
    return MicroBatch(list(answers), loss, prompts, rows(inputs["completion_ids"]))


def advantages(group_of: list[list[GeneratedSample]], scale: str) -> list[float]:
    """Each answer's reward less its group's mean, over what `scale` says; deviations are those of samples."""
    if scale == "normalize":  # each reward by its group first, then the sums over the whole generation
        sums = []
        for group in group_of:
            parts = []
            for reward in REWARD:
                values = [each.rewards[reward["grader"]["name"]] or 0.0 for each in group]  # type: ignore[index]
                spread = stdev(values) + 1e-4
                parts.append([reward.get("weight", 1.0) * (value - mean(values)) / spread for value in values])
            sums += [math.fsum(each) for each in zip(*parts, strict=True)]  # type: ignore[arg-type]
        return [(each - mean(sums)) / (stdev(sums) + 1e-4) for each in sums]
    rewards = [[each.reward or 0.0 for each in group] for group in group_of]
    flat = [each for group in rewards for each in group]
    found = []
    for group in rewards:
        spread = {"group": stdev(group) + 1e-4, "batch": stdev(flat) + 1e-4, "none": 1.0}[scale]
        found += [(each - mean(group)) / spread for each in group]
    return found


@pytest.mark.parametrize("loss", CASES)
def test_a_step_is_the_papers(workshop: Workshop, monkeypatch: pytest.MonkeyPatch, loss: str) -> None:
    case, whole = CASES[loss], loss == "gspo"
    with watched(monkeypatch) as found:
        run = workshop.run(
            "grpo", "qwen3_moe", prompt_rows(4), reward=REWARD, optimizer={"lr": 3e-2},
            training={"batch_size": 4, "gradient_accumulation_steps": MICRO_BATCHES},
            moe={"router_aux_loss_coef": 0.0}, options={"eval_before_training": False},
            rl={"n_generations": 4, "n_iterations": 2, "beta": BETA, "loss": loss, "max_completion_length": LONGEST,
                **case.settings},
        )  # fmt: skip
    assert run.exit_code == COMPLETED, run.reason
    steps = [found[at : at + MICRO_BATCHES] for at in range(0, len(found), MICRO_BATCHES)]
    assert len(steps) == 4
    outside = {"low": 0, "high": 0, "inside": 0}
    for number, step in enumerate(steps):
        value = 0.0
        for batch in step:
            for answer in batch.answers:
                weight = case.weight(answer, batch, step)
                pieces = list(zip(case.part(answer, case.low, case.high), divergence(answer, whole), strict=True))
                value += weight * math.fsum(policy[0] + BETA * kl[0] for policy, kl in pieces)
                wanted = [weight * (policy[1] + BETA * kl[1]) for policy, kl in pieces]
                assert answer.slopes == pytest.approx(wanted, abs=1e-6)
                for ratio, (policy, _) in zip(answer.ratios, pieces, strict=True):
                    if answer.advantage:
                        side = "inside" if policy[1] else "high" if answer.advantage > 0 else "low"
                        outside[side] += number % 2
                    if number % 2 == 0:
                        assert ratio == pytest.approx(1, abs=1e-5), "the model that wrote it"
        assert math.fsum(batch.loss for batch in step) == pytest.approx(value, abs=1e-6)
        by_batch = [mean(kl for answer in batch.answers for kl, _ in divergence(answer, whole)) for batch in step]
        assert run.steps("kl")[number] == pytest.approx(mean(by_batch), abs=1e-6)
    assert outside["inside"] > 4
    if case.part in (tokenwise, of_sequence):
        assert min(outside.values()) > 4, "both sides are clipped, and each where it is to be"
    for step_number, file in ((0, "1"), (2, "3")):
        lines = (run.folder.samples / f"{file:0>9}.jsonl").read_text(encoding="utf-8").splitlines()
        answers = [GeneratedSample.model_validate_json(line) for line in lines]
        wanted = advantages([answers[:4], answers[4:]], case.scale)
        assert [each.advantage for each in answers] == pytest.approx(wanted, abs=1e-6)
        used = sorted(answer.advantage for batch in steps[step_number] for answer in batch.answers)
        assert used == pytest.approx(sorted(wanted), abs=1e-6)
    if loss == "dapo":
        check_the_reference(steps, workshop)


def check_the_reference(steps: list[list[MicroBatch]], workshop: Workshop) -> None:
    """Log-probabilities of the reference are those of the model from before, by plain transformers, unpadded."""
    base = AutoModelForCausalLM.from_pretrained(workshop.model("qwen3_moe")).eval()
    for batch in steps[-1]:
        for prompt, completion, answer in zip(batch.prompts, batch.completions, batch.answers, strict=True):
            with torch.inference_mode():
                logits = base(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
            wanted = logits.log_softmax(-1)[range(len(completion)), completion].tolist()
            assert answer.reference == pytest.approx(wanted, abs=1e-5)


def test_a_held_out_reward_of_zero_has_no_sign() -> None:
    found = HeldOutRewards()
    found.add_answers([Sample({}, "no", tokens=2)], [Graded({"right": 0.0}, {}, 0.0, {})])
    figures = found.figures()
    assert (figures["reward"], math.copysign(1, figures["reward"])) == (0, 1)
