"""The order of an epoch for a job that generates: whole generations, in which each prompt stands once per answer."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import batched

from torch.utils.data import Sampler

from llama_stack_provider_moe.compute.data.sampling import EpochSampler, rows_a_step
from llama_stack_provider_moe.spec import RL, Training


@dataclass(frozen=True)
class Generations:
    """The generations of an epoch.

    Attributes:
        prompts: of one generation.
        answers: to each prompt.
        micro_batches: that learn from one generation, of one process.
        steps: optimiser steps that learn from one generation.
        count: of an epoch. Prompts that would not fill another one are left out of the epoch.
    """

    prompts: int
    answers: int
    micro_batches: int
    steps: int
    count: int

    @staticmethod
    def of(rl: RL, training: Training, prompts: int, processes: int) -> "Generations":
        """The generations of an epoch over so many prompts."""
        each = rows_a_step(training, processes) * rl.steps_per_generation // rl.n_generations
        steps = rl.steps_a_generation
        count = prompts // each
        if training.max_steps_per_epoch:
            count = min(count, training.max_steps_per_epoch // steps)
        return Generations(each, rl.n_generations, steps * training.gradient_accumulation_steps, steps, count)

    @staticmethod
    def of_a_step(training: Training, prompts: int, processes: int) -> "Generations":
        """The generations of an epoch over so many prompts, if each step learns from one answer to each of its own."""
        each = rows_a_step(training, processes)
        count = prompts // each
        if training.max_steps_per_epoch:
            count = min(count, training.max_steps_per_epoch)
        return Generations(each, 1, training.gradient_accumulation_steps, 1, count)


class GroupSampler(Sampler[int]):
    """Indices of prompts: those of a generation, each `answers` times, and all that once for each micro-batch.

    TRL's loader reads a whole generation for every micro-batch, and generates from the first alone.

    Args:
        order: of an epoch's prompts.
        generations: of an epoch.
    """

    def __init__(self, order: EpochSampler, generations: Generations) -> None:
        self.order, self.generations = order, generations

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch; accelerate calls this before each one."""
        self.order.set_epoch(epoch)

    def __len__(self) -> int:
        made = self.generations
        return made.count * made.prompts * made.answers * made.micro_batches

    def __iter__(self) -> Iterator[int]:
        made = self.generations
        for number, prompts in enumerate(batched(self.order, made.prompts)):
            if number == made.count:
                return
            for _ in range(made.micro_batches):
                for prompt in prompts:
                    yield from [prompt] * made.answers
