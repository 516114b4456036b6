"""10,000 rows with images, pushed and trained on: memory is that of 500 rows, in the server and in the job."""

from pathlib import Path

import pytest

from benchmarks import epoch_images

# A row of a data set takes some bytes in the job (its place and length), and none of its pixels.
SERVER_MIB, JOB_MIB = 60, 150


@pytest.mark.slow
@pytest.mark.e2e
def test_memory_does_not_grow_with_the_rows(tmp_path: Path) -> None:
    few, many = epoch_images.run(tmp_path, epoch_images.ROWS)
    for found, count in ((few, 500), (many, 10_000)):
        assert found["rows"] == found["rows_trained_on"] == found["images"] == count
        assert found["steps"] == -(-count // epoch_images.BATCH), "every row, once"
    assert many["server_peak_mib"] - few["server_peak_mib"] < SERVER_MIB
    assert many["job_peak_mib"] - few["job_peak_mib"] < JOB_MIB
