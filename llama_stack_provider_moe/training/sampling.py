"""Which rows an epoch sees, and in what order: `max_steps_per_epoch` caps an epoch, never the run."""

import math
from collections.abc import Iterator

import torch
from torch.utils.data import Sampler

from llama_stack_provider_moe.spec import Training


class EpochSampler(Sampler[int]):
    """Row indices of one epoch: a permutation drawn from (seed, epoch) alone, or the data set's order; cut at the cap.

    That an epoch's order depends on nothing that ran before it is what lets a resumed run see the same rows.
    """

    def __init__(self, rows: int, most: int, shuffle: bool, seed: int) -> None:
        self.rows = rows
        self.most = most
        self.shuffle = shuffle
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by accelerate before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return min(self.rows, self.most)

    def __iter__(self) -> Iterator[int]:
        if not self.shuffle:
            return iter(range(len(self)))
        generator = torch.Generator().manual_seed((self.seed << 16) + self.epoch)
        return iter(torch.randperm(self.rows, generator=generator)[: len(self)].tolist())


def rows_a_step(training: Training, processes: int = 1) -> int:
    """Rows of one optimiser step, over all processes."""
    return training.batch_size * training.gradient_accumulation_steps * processes


def rows_an_epoch(training: Training, rows: int, processes: int = 1) -> int:
    """Rows of one epoch after the cap, at most `rows`."""
    if not training.max_steps_per_epoch:
        return rows
    return min(rows, training.max_steps_per_epoch * rows_a_step(training, processes))


def steps_an_epoch(training: Training, rows: int, processes: int = 1) -> int:
    """Optimiser steps of one epoch; a last, smaller batch is a step as well."""
    return math.ceil(rows_an_epoch(training, rows, processes) / rows_a_step(training, processes))
