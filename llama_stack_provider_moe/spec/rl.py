"""The `rl` block: how a GRPO job generates answers, and what it learns from their rewards.

Each prompt gets a group of answers; an answer's advantage is its reward less the group's mean (GRPO, arXiv 2402.03300).
"""

from typing import Literal

from pydantic import Field

from llama_stack_provider_moe.spec.generation import Generation
from llama_stack_provider_moe.spec.rl_engines import Engine, TransformersEngine

RLLoss = Literal["dapo", "grpo", "dr_grpo", "bnpo", "cispo", "sapo", "gspo"]
# The upper bound of the ratio where `epsilon_high` is left out; other losses have the lower bound's.
EPSILON_HIGH: dict[str, float] = {"dapo": 0.28, "cispo": 5.0, "gspo": 4e-4}
EPSILON: dict[str, float] = {"gspo": 3e-4}


class RL(Generation):
    """How answers are generated, and what is learnt from their rewards."""

    engine: Engine = Field(
        default_factory=TransformersEngine,
        description="What generates answers: a block whose `type` is transformers, vllm_server or vllm_colocate.",
    )
    n_generations: int = Field(default=4, ge=2, le=1024, description="Answers to each prompt: the size of a group.")
    steps_per_generation: int = Field(
        default=1,
        ge=1,
        le=1024,
        description="Optimiser steps that share the answers of one generation, each with its own part of them.",
    )
    n_iterations: int = Field(
        default=1, ge=1, le=64, description="Number of times that each answer is learnt from; above 1, ratios are "
        "clipped against the model that wrote it."
    )  # fmt: skip
    beta: float = Field(
        default=0.0,
        ge=0,
        le=10,
        description="Weight of the KL divergence from the model before training; 0: it is not computed.",
    )
    loss: RLLoss = Field(
        default="dapo",
        description="Policy loss. dapo: mean over all tokens (arXiv 2503.14476); grpo: mean over each answer's tokens "
        "first (arXiv 2402.03300); dr_grpo: divided by the largest length (arXiv 2503.20783); bnpo: mean over the "
        "tokens of a micro-batch; cispo: clipped weights, so that every token has a gradient (arXiv 2506.13585); "
        "sapo: soft gates in place of clipping (arXiv 2511.20347); gspo: one ratio for a whole answer (arXiv "
        "2507.18071).",
    )
    epsilon: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="Distance below 1 at which ratios are clipped; left out: 0.2, for gspo 0.0003. Not for sapo, nor "
        "cispo.",
    )
    epsilon_high: float | None = Field(
        default=None,
        gt=0,
        le=100,
        description="Distance above 1 at which ratios are clipped; left out: 0.28 for dapo, 0.0004 for gspo, else "
        "`epsilon`; for cispo the largest weight, 5.0. Not for sapo.",
    )
    scale_rewards: Literal["group", "batch", "none"] | None = Field(
        default=None,
        description="What advantages are divided by: the standard deviation of the group's rewards, or the batch's, or "
        "nothing. Left out: group, for dr_grpo none.",
    )
    combine: Literal["sum", "normalize"] = Field(
        default="sum",
        description="How several rewards become one. sum: weighted and summed; normalize: each has its group's mean "
        "taken out and is divided by its deviation first, so that none drowns the others (then `scale_rewards` has no "
        "effect).",
    )
    mask_truncated: bool = Field(
        default=False,
        description="Overlong filter: learn nothing from answers that reach `max_completion_length` (arXiv "
        "2503.14476).",
    )
    routing_replay: Literal["off", "rollout", "policy"] = Field(
        default="off",
        description="Experts that training uses for each token of an answer. off: those that routers choose in each "
        "pass; rollout: those chosen while the answer was generated (R3, arXiv 2510.11370); policy: those of the old "
        "policy's pass over the answer, in all steps that learn from it (R2, arXiv 2507.18071). Their weights are by "
        "the logits of the training pass.",
    )
    shuffle_rewards: bool = Field(
        default=False,
        description="Control: each answer learns from the reward of a random answer of its group, so that nothing can "
        "be learnt from the graders. Held-out answers keep their own rewards.",
    )
    no_spread_generations: int = Field(
        default=20,
        ge=1,
        le=1_000_000,
        description="Generations in a row whose groups all have equal rewards after which the job stops, because "
        "nothing is learnt; it warns after half of them.",
    )

    @property
    def epsilons(self) -> tuple[float, float]:
        """The distances below and above 1 at which ratios are clipped."""
        low = EPSILON.get(self.loss, 0.2) if self.epsilon is None else self.epsilon
        high = EPSILON_HIGH.get(self.loss, low) if self.epsilon_high is None else self.epsilon_high
        return low, high

    @property
    def scale(self) -> Literal["group", "batch", "none"]:
        """What advantages are divided by."""
        return self.scale_rewards or ("none" if self.loss == "dr_grpo" else "group")

    @property
    def steps_a_generation(self) -> int:
        """Optimiser steps from one generation to the next."""
        return self.steps_per_generation * self.n_iterations
