"""The figures of the demo of domain experts in its guide are those of the newest run that was kept."""

from tests.contracts.doc_blocks import ROOT
from tests.contracts.test_benchmark_page import newest

PAGE = " ".join((ROOT / "docs" / "guides" / "domain-experts.md").read_text(encoding="utf-8").split())
DOMAINS = ("sums", "cooking", "code", "mean")
EVERY = 5  # layers, one row for each so many


def test_losses_and_mutual_information() -> None:
    found = newest("demo_domains")
    for name, losses in found["losses"].items():
        assert f"| {name} | {' | '.join(f'{losses[domain]:.3f}' for domain in DOMAINS)} |" in PAGE
    layers = list(zip(*found["mutual_information"].values(), strict=True))
    for at in layers[::EVERY]:
        figures = " | ".join(f"{each[key]:.3f}" for each in at for key in ("found", "random_router"))
        assert f"| {at[0]['layer']} | {figures} |" in PAGE
    for name, by_layer in found["mutual_information"].items():
        above = sum(each["found"] > each["random_router"] for each in by_layer)
        assert f"{name}: {above} of {len(by_layer)} layers" in PAGE
    assert f"{found['wall_s'] / 60:.1f} minutes" in PAGE
