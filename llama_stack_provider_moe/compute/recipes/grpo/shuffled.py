"""A control for reinforcement learning: the rewards of each group's answers, in random order.

Groups keep their rewards, so that every mean and spread that a job tells stays the truth. An answer's advantage no
longer depends on the answer: what still changes over such a job is not learnt from the graders.
"""

import random

import torch
from torch import Tensor

WARNING = (
    "rl.shuffle_rewards: a control: each answer learns from the reward of a random answer of its group, so that "
    "nothing can be learnt from the graders"
)
FIGURE = "shuffled_rewards"  # share of the answers that got the reward of another one


def shuffled(rewards: Tensor, group: int, seed: int, step: int) -> tuple[Tensor, float]:
    """Return rewards in random order within each group, and the share of rows that moved.

    All orders are equally likely, also those where some answers keep their own reward: without these, an answer's
    expected advantage would be the negative of its own, divided by `group - 1`.

    Args:
        rewards: (answers, graders), groups one after the other.
        group: answers of a group.
        seed: the job's.
        step: optimiser step that learns from them first; a resumed job repeats its order.
    """
    chance = random.Random(f"{seed} {step}")
    order = [first + at for first in range(0, len(rewards), group) for at in chance.sample(range(group), group)]
    moved = sum(new != old for new, old in enumerate(order)) / max(1, len(order))
    return rewards[torch.tensor(order, dtype=torch.long, device=rewards.device)], moved
