"""The figures of the ablation demo in its guide are those of the newest run that was kept."""

from tests.contracts.doc_blocks import ROOT
from tests.contracts.test_benchmark_page import newest

PAGE = " ".join((ROOT / "docs" / "guides" / "ablation.md").read_text(encoding="utf-8").split())


def percent(value: float, form: str = ".0f") -> str:
    return f"{value * 100:{form}} %"


def test_the_frontier_and_what_the_chosen_plan_did() -> None:
    found = newest("demo_ablation")
    assert f"which took {found['wall_s'] / 60:.1f} minutes" in PAGE
    best = found["analysis"]
    assert (
        f"The best quality is {best['quality']:.3f}, at block {best['layer']}, with an AUC of {best['auc']:g}" in PAGE
    )
    tried = found["frontier"]
    assert f"| Answers in French, of {tried['prompts']} prompts | Perplexity of {tried['rows']} everyday" in PAGE
    assert f"| none | | {percent(tried['base']['rate'])} | {tried['base']['perplexity']:.2f} |" in PAGE
    for plan in tried["plans"]:
        blocks = f"{plan['first']} to {tried['last_block']}"
        perplexity = f"{plan['perplexity']:.2f} ({percent(plan['rise'], '+.1f')})"
        assert f"| {blocks} | {plan['scale']:g} | {percent(plan['rate'])} | {perplexity} |" in PAGE
    assert f"here {found['chosen']['scale']:g} from block {found['chosen']['first']} on" in PAGE
    held_out = found["held_out"]
    before, after = percent(held_out["before"]), percent(held_out["after"])
    assert f"of {held_out['prompts']} held-out French prompts with other forms and subjects, {before} were" in PAGE
    assert f"{before} were answered in French before and {after} after" in PAGE
    for gate, job in found["jobs"].items():
        figures = f"{percent(job['rise'], '+.1f')} | {job['kl']:.4f} | {percent(job['routing_shift'], '.1f')}"
        assert f"| {gate} | {figures} |" in PAGE


def test_the_demo_reached_the_goals_of_its_guide() -> None:
    found = newest("demo_ablation")
    assert found["held_out"]["after"] <= 0.5 * found["held_out"]["before"]
    assert all(job["rise"] < 0.05 for job in found["jobs"].values())
    assert found["wall_s"] < 6 * 60
