"""Scaling estimates: the notes agree with the code, and the code with calculations by hand."""

import pytest

from benchmarks import scaling_on_paper as paper
from tests.compute.planning.test_lora_report import PUBLISHED


def test_the_notes_are_current() -> None:
    text = paper.NOTES.read_text(encoding="utf-8")
    assert text == paper.embedded(text), "run `python -m benchmarks.scaling_on_paper --write`"


def test_sizes_are_the_published_ones() -> None:
    """Norms and biases are left out."""
    for stem in ("qwen3-30b-a3b", "mixtral-8x7b"):
        assert paper.model(stem, stem).total == pytest.approx(PUBLISHED[stem], rel=1e-4)
    assert paper.model("qwen3-30b-a3b", "").active == pytest.approx(3.0e9, rel=0.02)  # 3.3 billion with embeddings


def test_bytes_and_seconds_by_hand() -> None:
    small = paper.Model("small", hidden=10, moe_layers=3, experts=16, top_k=2, total=8000, active=1000, lora=400)
    lora, whole = paper.Case(small, "LoRA", "fsdp"), paper.Case(small, "all weights", "fsdp")
    assert paper.Case(small, "LoRA", "ddp").received(8) == {"reduced": 2 * 7 / 8 * 1600}
    assert lora.received(8) == {"gathered": 2 * 7 / 8 * 16000, "reduced": 2 * 7 / 8 * 1600}
    assert whole.received(8) == {"gathered": 2 * 7 / 8 * 16000, "reduced": 7 / 8 * 32000}
    apart = paper.Case(small, "LoRA", "ep").received(8)["tokens"]
    # Two of 16 experts, two of which are each process's: another one's is missed by the first with 14/16, then 13/15.
    assert apart == pytest.approx(6 * 7 * (1 - 14 / 16 * 13 / 15) * paper.TOKENS * 10 * 2 * 3)
    computing, moving = lora.seconds(8)
    assert computing == pytest.approx(6 * 1000 * paper.TOKENS / (0.4 * 989.4e12))
    assert moving == pytest.approx((2 * 7 / 8 * 17600) / 450e9 / 0.8), "within a node by NVLink alone"
    everywhere = 2 * 63 / 64 * 17600
    assert lora.seconds(64)[1] == pytest.approx(max(everywhere / 450e9, everywhere * 56 / 63 / 400e9) / 0.8)
    assert whole.seconds(8)[0] / computing == pytest.approx(4 / 3)
