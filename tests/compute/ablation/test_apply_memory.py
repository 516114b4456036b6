"""An ablation holds a few copies of one matrix at a time, whatever the size of the checkpoint."""

from pathlib import Path

import pytest

from benchmarks import ablation_apply
from benchmarks.merge import Shape


@pytest.mark.wide
def test_memory_stays_near_the_largest_matrix(tmp_path: Path) -> None:
    """A checkpoint of 110 MB in several files; with what a process has anyhow taken off."""
    shape = Shape(layers=6, hidden=1024, inner=1536, experts=2)
    total = ablation_apply.write_all(tmp_path, shape)
    assert total > 110e6
    found = ablation_apply.in_another_process(tmp_path, shape.layers)
    largest = found["largest_matrix_bytes_in_fp32"]
    assert largest == shape.hidden * shape.inner * 4
    # As read, in fp32 before and after, and what allocator and libraries take beside it, as in merging.
    assert found["peak_bytes_above_start"] < 4 * largest + 8e6 < total / 3
    assert found["edited_tensors"] == shape.layers * (1 + 1 + shape.experts)
