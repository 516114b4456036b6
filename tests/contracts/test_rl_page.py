"""The figures of the reinforcement learning demo in its guide are those of the newest run that was kept."""

from statistics import fmean

from tests.contracts.doc_blocks import ROOT
from tests.contracts.test_benchmark_page import newest

PAGE = " ".join((ROOT / "docs" / "guides" / "grpo.md").read_text(encoding="utf-8").split())


def interval(found: dict[str, float], form: str) -> str:
    return f"{found['value']:{form}} ({found['low']:{form}} to {found['high']:{form}})"


def test_the_table_of_the_demo() -> None:
    found = newest("demo_rl")
    assert f"to {found['prompts']} held-out prompts" in PAGE
    assert f"took {found['wall_s'] / 60:.1f} minutes on two cores" in PAGE
    for name, words in (("base", "before training"), ("trained", "rewarded"), ("control", "control")):
        kl = interval(found["kl"][name], ".3f") if name in found["kl"] else "0"
        rate, perplexity = interval(found["rate"][name], ".0%"), interval(found["perplexity"][name], ".2f")
        assert f"| {words} | {rate} | {kl} | {perplexity} |" in PAGE
    before, after = found["words"]["base"], found["words"]["trained"]
    assert f"{fmean(after):.1f} words on average after training, {fmean(before):.1f} before" in PAGE
    assert f"{after.count(0)} of {len(after)} are empty" in PAGE


def test_the_demo_reached_its_goals() -> None:
    found = newest("demo_rl")
    assert found["command"] == "make demo-rl"
    rates = {name: each["value"] for name, each in found["rate"].items()}
    assert rates["trained"] - rates["base"] >= 0.3
    assert rates["trained"] - rates["control"] >= 0.3
    assert found["wall_s"] < 12 * 60
