"""The number of tokens of each row of a tokenised data set, read from Arrow's offsets."""

from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

CHUNK = 4096
ANSWERS = ("chosen_ids", "rejected_ids", "completion_ids")


def lengths_of(rows: Dataset) -> Tensor:
    """The tokens of each row, (R,); of a pair, those of the prompt with its longer answer."""
    return torch.cat([_of_chunk(chunk, rows) for chunk in rows.with_format("arrow").iter(batch_size=CHUNK)])


def _of_chunk(chunk: Any, rows: Dataset) -> Tensor:  # pyarrow has no types
    if answers := [_column(chunk, name) for name in ANSWERS if name in rows.column_names]:
        return _column(chunk, "prompt_ids") + torch.stack(answers).amax(dim=0)
    return _column(chunk, "prompt_ids" if "prompt_ids" in rows.column_names else "input_ids")


def _column(chunk: Any, name: str) -> Tensor:
    return torch.tensor([length for part in chunk[name].chunks for length in part.value_lengths().to_pylist()])
