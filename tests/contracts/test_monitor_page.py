"""The figures of docs/guides/run-time-monitor.md are those of the newest result file."""

from typing import Any

from benchmarks.probe_prompts import COOKING, FRAMES, FRAMES_PER_DEED, OTHER, PromptSets
from tests.contracts.doc_blocks import ROOT
from tests.contracts.test_benchmark_page import newest

PAGE = " ".join((ROOT / "docs" / "guides" / "run-time-monitor.md").read_text(encoding="utf-8").split())


def percent(rate: dict[str, float]) -> str:
    return f"{rate['value']:.1%} ({rate['low'] * 100:.1f} to {rate['high'] * 100:.1f})".replace("%", " %")


def row(found: dict[str, Any]) -> str:
    auc = found["auc"]
    return (
        f"{auc['value']:.3f} ({auc['low']:.3f} to {auc['high']:.3f}) | {percent(found['detected'])} | "
        f"{percent(found['false_positives'])} |"
    )


def test_detection_on_held_out_rows_and_on_other_wording() -> None:
    card = newest("probe_quality")["card"]
    for part in ("held_out", "test"):
        assert f"| probe | {row(card[part]['probe'])}" in PAGE
        assert f"| bag of embeddings | {row(card[part]['lexical'])}" in PAGE
    assert f"detects {percent(card['test']['probe']['detected_at_rate'])}." in PAGE
    assert f"an AUC of {card['length_auc']:.3f}." in PAGE
    assert f"block {card['layers'][0]} of {card['base']['layers']}" in PAGE
    assert f"set on {card['negatives']} baseline rows" in PAGE
    assert card["negatives"] >= 300
    rows = card["test"]["probe"]
    assert f"{rows['detected']['rows']} and {rows['false_positives']['rows']} prompts of other wording" in PAGE


def test_the_sets_are_what_the_page_says_and_begin_alike() -> None:
    assert f"{len(COOKING)} and {len(OTHER)} deeds" in PAGE
    assert f"each in {FRAMES_PER_DEED} of {len(FRAMES)} frames" in PAGE
    made = PromptSets.made()
    for target, baseline in ((made.target, made.baseline), (made.test_target, made.test_baseline)):
        assert not set(target) & set(baseline)
        firsts = [[prompt.split()[0] for prompt in prompts] for prompts in (target, baseline)]
        for word in set(firsts[0]) | set(firsts[1]):
            shares = [each.count(word) / len(each) for each in firsts]
            assert abs(shares[0] - shares[1]) < 0.005, word


def test_latency_and_what_callers_get_without_a_scorer() -> None:
    found = newest("scorer_latency")
    shape = found["shape"]
    assert (shape["clients"], shape["seconds"], shape["deadline_s"], shape["queue"]) == (50, 60, 10, 64)
    assert shape["model"] == "SmolLM2-135M-Instruct"
    for clients, name in ((50, "clients"), (1, "one_client")):
        each = found[name]
        times = " | ".join(f"{each[key]:.{2 if clients > 1 else 3}f} s" for key in ("p50_s", "p99_s", "longest_s"))
        assert f"| {clients} | {each['scores_per_s']:.0f} | {times} |" in PAGE
    assert found["clients"]["failures"] == {}, "with 50 clients no request failed"
    lost = {name: found[name]["failures"] for name in ("overloaded", "killed", "hung")}
    assert f"{lost['overloaded']['overloaded']['count']} times `overloaded` |" in PAGE
    longest = {name: max(each["longest_s"] for each in failures.values()) for name, failures in lost.items()}
    for wait_s in longest.values():
        assert f"| {wait_s:.3f} s |" in PAGE
        assert wait_s < shape["deadline_s"] + 0.05
    assert f"ready again after {found['killed']['ready_again_s']:.1f} s" in PAGE
    assert f"replaced after {found['hung']['noticed_s']:.1f} s" in PAGE
