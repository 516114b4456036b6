"""The figures of docs/guides/expert-surgery.md are those of the newest result file."""

from tests.contracts.doc_blocks import ROOT
from tests.contracts.test_benchmark_page import newest

PAGE = (ROOT / "docs" / "guides" / "expert-surgery.md").read_text(encoding="utf-8")
WAYS = ("before", "reap", "usage", "chance", "worst")


def test_losses_without_a_quarter_of_the_experts() -> None:
    found = newest("pruning")
    figures = " | ".join(f"{found['mean'][way]:.3f}" for way in WAYS)
    assert f"| {figures} |" in PAGE
    assert f"mean of {found['shape']['seeds']} seeds" in PAGE
