"""A job learns what only its images say, and nothing where they are shuffled (`benchmarks.images` has the chart)."""

import pytest

from benchmarks.images import COLOURS, measure


@pytest.mark.slow
def test_colours_are_named_only_with_the_right_images() -> None:
    found = measure(count=192, epochs=5, held_out=100)
    assert found["images in place"][-1] >= 0.9
    assert abs(found["images shuffled"][-1] - 1 / len(COLOURS)) < 0.15
