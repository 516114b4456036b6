"""The figures of docs/guides/expert-surgery.md are those of the newest result file."""

from tests.contracts.doc_blocks import ROOT
from tests.contracts.test_benchmark_page import newest

PAGE = (ROOT / "docs" / "guides" / "expert-surgery.md").read_text(encoding="utf-8")
TABLES = (("before", "reap", "usage", "chance", "worst"), ("merge-outputs", "merge-weights", "merge-router_logits"))


def test_losses_without_a_quarter_of_the_experts() -> None:
    found = newest("pruning")
    for ways in TABLES:
        figures = " | ".join(f"{found['mean'][way]:.3f}" for way in ways)
        assert f"| {figures} |" in PAGE
    looked = [found["mean"][way] for way in ("reap", "usage", *TABLES[1])]
    assert max(looked) - min(looked) <= 0.005, "the page says that they can't be ranked"
    assert min(found["mean"][way] for way in TABLES[1]) > found["mean"]["reap"], "merging was not better"
    assert f"mean of {found['shape']['seeds']} seeds" in PAGE
