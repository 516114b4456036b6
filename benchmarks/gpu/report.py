"""What the figures mean: ratios of variants, the project's targets hit or missed, a table, and a chart."""

from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks.gpu.shapes import Pass

Found = dict[str, Any]
OURS = "triton"
BASELINES = ("eager", "grouped_mm", "liger", "torch", "quack")
BOTH: Pass = "forward+backward"
TARGET_CASE = "Qwen3-30B-A3B, LoRA r=16, 8192 tokens, balanced"
TARGET_DEVICE = "H200"
# what -> at least (a memory ratio: at most)
TARGETS = {
    "share of the dense rate, forward": 0.60,
    "share of the dense rate, forward+backward": 0.55,
    "times as fast as PEFT on grouped_mm": 2.0,
    "times as fast as torch split LoRA": 1.4,
    "times as fast as eager": 25.0,
    "peak memory of PEFT's on grouped_mm": 0.5,
    "times as fast as the best baseline, at the worst case": 1.0,
}
AT_MOST = ("peak memory of PEFT's on grouped_mm",)


def ms(case: Found, variant: str, what: Pass = BOTH) -> float | None:
    """The median, of a variant that ran and did not fail."""
    one = case["variants"].get(variant, {"status": "skipped"})
    return one["ms"][what]["median"] if one["status"] == "ok" else None


def ratios(case: Found) -> dict[str, Any]:
    """The speed of ours as a multiple of each baseline's, and its memory as a share of theirs."""
    ours = case["variants"].get(OURS, {"status": "skipped"})
    if ours["status"] != "ok":
        return {}
    found: dict[str, Any] = {"times_as_fast_as": {}, "of_the_peak_memory_of": {}}
    for baseline in BASELINES:
        for what in ("forward", BOTH):
            if (theirs := ms(case, baseline, what)) is not None:
                ratio = theirs / ours["ms"][what]["median"]
                found["times_as_fast_as"].setdefault(baseline, {})[what] = round(ratio, 3)
        if ms(case, baseline) is not None and ours["peak_mib"] is not None:
            peak = case["variants"][baseline]["peak_mib"]
            found["of_the_peak_memory_of"][baseline] = round(ours["peak_mib"] / peak, 3)
    return found


def step_ratios(runs: list[Found]) -> dict[str, dict[str, dict[str, float]]]:
    """Of each end-to-end run: how many times the tokens a second of one backend another has, and its peak memory."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    ran = [run for run in runs if run["status"] == "ok"]
    for one, other in product(ran, ran):
        order = ("triton", "torch", "peft")
        if one["run"] != other["run"] or order.index(one["backend"]) >= order.index(other["backend"]):
            continue
        ratios = {"tokens_per_s": round(one["tokens_per_s"] / other["tokens_per_s"], 3)}
        if one["peak_mib"] is not None:
            ratios["peak_memory"] = round(one["peak_mib"] / other["peak_mib"], 3)
        found.setdefault(one["run"], {})[f"{one['backend']} to {other['backend']}"] = ratios
    return found


def targets(cases: list[Found], device: str) -> dict[str, Any]:
    """Each of `TARGETS`: what was found, and whether it was hit; told where it was not measured.

    A case that ours failed counts as 0 times as fast.
    """
    measured: dict[str, float] = {}
    notes: dict[str, str] = {}
    main = next((case for case in cases if case["case"] == TARGET_CASE), None)
    if main is not None and main["ratios"]:
        share, fast = main["variants"][OURS]["share_of_dense"], main["ratios"]["times_as_fast_as"]
        measured["share of the dense rate, forward"] = share["forward"]
        measured["share of the dense rate, forward+backward"] = share[BOTH]
        for baseline, name in (("grouped_mm", "PEFT on grouped_mm"), ("torch", "torch split LoRA"), ("eager", "eager")):
            if baseline in fast:
                measured[f"times as fast as {name}"] = fast[baseline][BOTH]
        memory = main["ratios"]["of_the_peak_memory_of"]
        if "grouped_mm" in memory:
            measured["peak memory of PEFT's on grouped_mm"] = memory["grouped_mm"]
    worst = {
        case["case"]: min(ratio[BOTH] for ratio in case["ratios"]["times_as_fast_as"].values())
        for case in cases
        if case["ratios"].get("times_as_fast_as")
    }
    worst |= {case["case"]: 0.0 for case in cases if case["variants"].get(OURS, {}).get("status") == "failed"}
    if worst:
        name = "times as fast as the best baseline, at the worst case"
        measured[name] = min(worst.values())
        below = {case: ratio for case, ratio in worst.items() if ratio < TARGETS[name]}
        notes[name] = f"of {len(worst)} cases; below: {below or 'none'}"
    found: dict[str, Any] = {"set_for": TARGET_DEVICE, "apply_here": TARGET_DEVICE in device, "of": TARGET_CASE}
    for name, target in TARGETS.items():
        value = measured.get(name)
        if value is None:
            told = "not measured"
        else:
            told = "hit" if (value <= target if name in AT_MOST else value >= target) else "missed"
        bound = "at most" if name in AT_MOST else "at least"
        found[name] = {bound: target, "found": value, "is": told} | ({"note": notes[name]} if name in notes else {})
    return found


def table(result: Found) -> str:
    """For a terminal: a line a variant of a case, then end to end, then targets, then what was left out."""
    lines = [f"{'case':<62} {'variant':<11}{'fwd ms':>9}{'f+b ms':>9}{'p10..p90':>17}{'dense':>7}{'MiB':>9}  note"]
    for case in result["layers"]:
        for variant, one in case["variants"].items():
            lines.append(_line(case["case"], variant, one))
        for baseline, ratio in case["ratios"].get("times_as_fast_as", {}).items():
            lines.append(f"{'':<62}   {OURS} to {baseline}: {ratio['forward']:.2f} forward, {ratio[BOTH]:.2f} both")
    for one in result["end_to_end"]:
        if one["status"] == "ok":
            peak = "" if one["peak_mib"] is None else f", at most {one['peak_mib']:,.0f} MiB"
            told = f"{one['tokens_per_s']:,.0f} tokens/s, {one['step_ms']['median']:.1f} ms a step{peak}"
        else:
            told = f"{one['status']}: {one['why']}"
        lines.append(f"{one['run']:<62} {one['backend']:<11}{told}")
    for run, pairs in result["end_to_end_ratios"].items():
        lines += [f"{run:<62}   {pair}: {ratios}" for pair, ratios in pairs.items()]
    for name, target in result["targets"].items():
        if isinstance(target, dict):
            lines.append(f"target: {name}: {target}")
    lines += [f"skipped: {name}: {why}" for name, why in result["skipped"].items()]
    left = result["left_out"]
    lines.append(f"left out: {len(left)} case(s){': ' if left else ''}{'; '.join(left[:8])}"
                 f"{' ...' if len(left) > 8 else ''}")  # fmt: skip
    return "\n".join(lines)


def _line(case: str, variant: str, one: Found) -> str:
    start = f"{case:<62} {variant:<11}"
    if not one.get("ms"):
        return f"{start}{one['status']}: {one['why']}"
    forward, both = one["ms"]["forward"], one["ms"][BOTH]
    peak = "" if one["peak_mib"] is None else f"{one['peak_mib']:.0f}"
    note = "" if one["status"] == "ok" else f"{one['status']}: "
    return (
        f"{start}{forward['median']:>9.3f}{both['median']:>9.3f}{both['p10']:>9.3f}..{both['p90']:<7.3f}"
        f"{one['share_of_dense'][BOTH]:>6.0%}{peak:>9}  {note}{one.get('why', '')}"
    )


def chart(result: Found, path: Path) -> str | None:
    """Forward and backward by shape and variant, of the cases the targets are of; None, or why there is no chart."""
    if find_spec("matplotlib") is None:
        return "matplotlib is not installed"
    cases = [case for case in result["layers"] if case["mode"] == "LoRA" and case["routing"] == "balanced"]
    wanted = [case for case in cases if (case["tokens"], case["rank"]) == (8192, 16)] or cases
    if not wanted:
        return "no LoRA case with balanced routing was measured"
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(11, 5))
    variants = [name for name in (*BASELINES, OURS) if any(ms(case, name) is not None for case in wanted)]
    width = 0.8 / max(1, len(variants))
    for number, variant in enumerate(variants):
        places = [place for place, case in enumerate(wanted) if ms(case, variant) is not None]
        shown = [wanted[place]["variants"][variant]["ms"][BOTH] for place in places]
        heights = [one["median"] for one in shown]
        spread = [[one["median"] - one["p10"] for one in shown], [one["p90"] - one["median"] for one in shown]]
        axes.bar([place + number * width for place in places], heights, width, yerr=spread, label=variant, capsize=2)
    for place, case in enumerate(wanted):
        left, right = place - width / 2, place + len(variants) * width - width / 2
        label = "dense products" if place == 0 else "_"  # of a legend, once
        axes.hlines(case["dense_ms"][BOTH]["median"], left, right, "black", "dashed", label=label)
    middle = (len(variants) - 1) * width / 2
    axes.set_xticks([place + middle for place in range(len(wanted))], [case["shape"] for case in wanted])
    axes.set_yscale("log")
    axes.set_ylabel("forward and backward, ms (median, 10th to 90th percentile)")
    axes.set_title(f"{wanted[0]['mode']} r={wanted[0]['rank']}, {wanted[0]['tokens']} tokens, {result['device']}")
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return None
