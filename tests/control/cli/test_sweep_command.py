"""`moe-train sweep`: what it refuses before it asks a server."""

from pathlib import Path

from tests.support.cli_support import moe_train, template_at


def test_jobs_end_early_in_one_way_only(tmp_path: Path) -> None:
    words = ["--grid", "optimizer.lr=0.1,0.2", "--halving", "--hyperband", "--url", "http://127.0.0.1:9"]
    done = moe_train("sweep", str(template_at(tmp_path)), *words)
    assert done.code != 0
    assert "--hyperband: True is not valid; expected one way to end jobs early; --halving is another" in done.err
