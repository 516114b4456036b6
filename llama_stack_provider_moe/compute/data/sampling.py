"""Which rows an epoch uses, and in what order: `max_steps_per_epoch` limits an epoch, not the whole run."""

import math
from collections.abc import Iterator

import torch
from torch.utils.data import Sampler

from llama_stack_provider_moe.spec import Training


class EpochSampler(Sampler[int]):
    """The row indices of one epoch: a permutation that depends only on (seed, epoch), or the data set's order.

    An epoch's order does not depend on what ran before it, so a resumed run sees the same rows.

    Args:
        rows: of the data set.
        most: the maximum number of rows in an epoch.
        shuffle: whether to permute the rows.
        seed: of the permutations.
    """

    def __init__(self, rows: int, most: int, shuffle: bool, seed: int) -> None:
        self.rows = rows
        self.most = most
        self.shuffle = shuffle
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch; accelerate calls this before each one."""
        self.epoch = epoch

    def __len__(self) -> int:
        return min(self.rows, self.most)

    def __iter__(self) -> Iterator[int]:
        if not self.shuffle:
            return iter(range(len(self)))
        generator = torch.Generator().manual_seed(folded((self.seed << 16) + self.epoch))
        return iter(torch.randperm(self.rows, generator=generator)[: len(self)].tolist())


def folded(seed: int) -> int:
    """Fold a seed to 32 bits, because torch's CPU generator reads no more; seeds below 2**32 do not change."""
    high, low = divmod(seed, 2**32)
    return (low + high * 0x9E3779B1) % 2**32  # an odd factor, so that neighbouring high halves are far apart


def rows_a_step(training: Training, processes: int = 1) -> int:
    """Rows of one optimiser step in all processes."""
    return training.batch_size * training.gradient_accumulation_steps * processes


def rows_an_epoch(training: Training, rows: int, processes: int = 1) -> int:
    """Rows of one epoch with the limit applied, at most `rows`."""
    if not training.max_steps_per_epoch:
        return rows
    return min(rows, training.max_steps_per_epoch * rows_a_step(training, processes))


def steps_an_epoch(training: Training, rows: int, processes: int = 1) -> int:
    """Optimiser steps of one epoch; a smaller last batch is a step too."""
    return math.ceil(rows_an_epoch(training, rows, processes) / rows_a_step(training, processes))
