"""The figures of docs/explain/benchmarks.md are those of the newest result files."""

import json
from collections.abc import Callable
from typing import Any

import pytest

from tests.contracts.doc_blocks import ROOT

PAGE = " ".join((ROOT / "docs" / "explain" / "benchmarks.md").read_text(encoding="utf-8").split())
ADAPTED = "LoRA: ours to PEFT on grouped_mm"
EAGER = "LoRA: ours to PEFT on eager"


def newest(name: str) -> Any:
    path = max((ROOT / "benchmarks" / "results").glob(f"{name}_*.json"))
    return json.loads(path.read_text(encoding="utf-8"))


def span(values: list[float], digits: int) -> str:
    return f"{min(values):.{digits}f} to {max(values):.{digits}f}"


def experts(kind: str, case: str, tokens: str) -> list[float]:
    return [
        found[kind][case]
        for shape in newest("cpu_experts")["shapes"].values()
        for name, found in shape.items()
        if name.endswith(tokens)
    ]


def rows_of_experts() -> list[str]:
    shapes = newest("cpu_experts")["shapes"]
    smallest = {
        dtype: shapes["H512 I256 E32 top-8"][f"{dtype}, 256 tokens"]["times_as_fast"][ADAPTED]
        for dtype in ("float32", "bfloat16")
    }
    assert smallest["float32"] >= 2.5
    assert shapes["H512 I1024 E16 top-2"]["float32, 256 tokens"]["times_as_fast"][ADAPTED] >= 4
    rows = [
        f"about {shown} | {span(experts('times_as_fast', ADAPTED, tokens), 1)} | "
        f"{span(experts('times_the_memory', ADAPTED, tokens), 2)} |"
        for shown, tokens in (("256", ", 256 tokens"), ("1,024", ", 1024 tokens"))
    ]
    rows.append(
        f"{smallest['float32']:.1f} times as fast as PEFT on grouped products in fp32, and "
        f"{smallest['bfloat16']:.1f} times in bf16"
    )
    rows.append(f"eager loop | both | {span(experts('times_as_fast', EAGER, 'tokens'), 1)} |")
    rows.append(
        f"all weights trained | both | {span(experts('times_as_fast', 'full: ours to grouped_mm', 'tokens'), 2)} |"
    )
    return rows


def quantized() -> list[str]:
    found = newest("quantized_base")
    rows = {"8": "8 bits", "4": "4 bits", "4, 8-bit scales": "4 bits, 8-bit scales"}
    assert list(rows.values()) == list(found["bytes"])
    told = [
        f"| {title} | {found['bytes'][bits]['bytes_after'] / 1e6:.0f} MB | "
        f"{found['mean_cross_entropy_above_16_bits'][bits]:.3f} |"
        for title, bits in rows.items()
    ]
    return [f"{found['bytes']['8 bits']['bytes_before'] / 1e6:.0f} MB", *told]


def loading() -> list[str]:
    found = newest("loading_memory")["found"]
    peaks = [f"{each['peak'] / 1e6:,.0f} MB" for each in found.values()]
    whole = f"{found['4 bits']['bytes_before'] / 1e6:,.0f} MB in bf16"
    return [whole, f"took {peaks[0]}", f"takes {peaks[1]}, with 8-bit scales {peaks[2]}, and {peaks[3]} in 8 bits"]


def server() -> list[str]:
    found = newest("server_start")
    compared, spread = found["with_to_without"], found["min_median_max"]
    assert compared["cpu_s"]["ratio_of_medians"] <= 1.05
    assert spread["with_provider"]["idle_cpu_share_median"][1] == 0
    memory = [round(spread[side]["rss_mib"][1]) for side in ("with_provider", "without_provider")]
    return [
        f"{compared['cpu_s']['ratio_of_medians']:.2f} times the processor time",
        f"{compared['rss_mib']['ratio_of_medians']:.2f} times the memory ({memory[0]} against {memory[1]} MiB)",
    ]


def start() -> list[str]:
    found = newest("job_start")["min_median_max"]
    longest = max(found[way]["last_step_to_completed_s"][2] for way in ("warm", "cold"))
    assert longest <= 3
    return [f"{found['warm']['first_step_s'][1]:.1f} s from the forkserver",
            f"{found['cold']['first_step_s'][1]:.0f} s without it", f"{longest:.1f} s passed at most"]  # fmt: skip


def against_trl() -> list[str]:
    cases = newest("job_against_trl")["cases"]
    least = {"tiny dense": 1.0, "small MoE": 1.3, "SmolLM2-135M": 1.0}  # the whole job's, of the script's speed
    assert list(cases) == list(least)
    for name, each in cases.items():
        assert each["times_as_fast"]["whole"] >= least[name]
        assert max(each["times_the_time"].values()) <= 1.3
    return [
        f"| {name} | {each['times_as_fast']['whole']:.2f} | {each['times_as_fast']['steps']:.2f} | "
        f"{each['times_the_time']['before']:.2f} | {each['times_the_time']['after']:.2f} |"
        for name, each in cases.items()
    ]


def store() -> list[str]:
    found = newest("job_store")
    assert all(each["many_clients"]["errors"] == 0 for each in found["databases"].values())
    alone = found["databases"]["sqlite"]["one_client"]["ms"]
    busy = [each["many_clients"]["requests_per_s"] for each in found["databases"].values()]
    return [
        f"{found['jobs']:,} jobs", f"{found['clients']} clients", "Neither had an error",
        f"{alone['status_ended']['p50']:.0f} to {alone['status_in_progress']['p50']:.0f} ms",
        f"{alone['first_page']['p50']:.0f} to {alone['later_page']['p50']:.0f} ms",
        f"{span(busy, 0)} requests a second",
    ]  # fmt: skip


def memory() -> list[str]:
    found = newest("peak_memory")
    assert found["cases"] == len(found["found"]) == 10
    return [span(found["ratio_least_and_most"], 3), span(found["ratio_on_top_least_and_most"], 3), "ten cases"]


def saving_memory() -> list[str]:
    found = newest("memory_settings")
    assert all(abs(case["ratio"] - 1) < 0.15 for case in found["found"])
    peaks = [f"{case['measured'] / 1e6:.0f}" for case in found["found"][:3]]
    return [span(found["ratio_least_and_most"], 3), f"{peaks[0]}, {peaks[1]} and {peaks[2]} MB"]


def merging() -> list[str]:
    found = newest("merge")
    copies = sorted(found["copy_seconds"])
    return [
        f"{found['checkpoint_bytes'] / 1e9:.1f} GB", f"{found['merge_seconds']:.0f} s",
        f"{found['peak_bytes_above_start'] / 1e6:.0f} MB", f"{copies[0]:.0f} and {copies[-1]:.0f} s",
    ]  # fmt: skip


def ablating() -> list[str]:
    found = newest("ablation_apply")
    assert found["share_of_copy_speed"] >= 0.5
    copies = sorted(found["copy_seconds"])
    return [
        f"{found['edited_tensors']} tensors of a checkpoint of {found['checkpoint_bytes'] / 1e9:.1f} GB",
        f"{found['apply_seconds']:.1f} s (median of three)", f"{found['peak_bytes_above_start'] / 1e6:.0f} MB",
        f"{copies[0]:.0f} to {copies[-1]:.0f} s", f"{found['share_of_copy_speed']:.2f} of a copy's speed",
    ]  # fmt: skip


def bringing() -> list[str]:
    found = newest("bring_data")["pushes"]
    assert all(each["seconds"] < 30 for name, each in found.items() if name != "large.jsonl")
    large = found["large.jsonl"]
    assert large["server_rss_mb"]["peak"] < large["server_rss_mb"]["before"] + 24
    before, peak, after = (round(large["server_rss_mb"][when]) for when in ("before", "peak", "after"))
    rows = {
        "JSON Lines": "rows.jsonl", "JSON Lines, with server and command on one core": "rows.jsonl on one core",
        "JSON Lines, gzipped": "rows.jsonl.gz", "CSV": "rows.csv", "Parquet": "rows.parquet",
    }  # fmt: skip
    return [
        f"{found['rows.jsonl']['rows']:,} rows of 2 KB",
        *(
            f"| {shown} | {found[name]['seconds']:.1f} | {found[name]['rows_per_s']:,} |"
            for shown, name in rows.items()
        ),
        f"1 GB took {large['seconds']:.0f} s",
        f"{before} MB before it, {peak} MB at its peak and {after} MB after it",
        f"{large['health_ms']['median']:.0f} ms (median) meanwhile, and in {large['health_ms']['max']:.0f} ms at most",
    ]


def images_of_rows() -> list[str]:
    found = newest("rows_with_images")["figures"]
    assert found["rows"] == 10_001
    before, uploaded, made = (round(found[f"peak_mib_{when}"]) for when in ("before", "after_upload", "after_job"))
    assert made < before + 96, "flat: the body has a row of 132 MB"
    return [
        f"{found['body_mib']:,.0f} MiB took {found['upload_s']:.0f} s, and the job {found['job_s']:.0f} s",
        f"{before} MiB before, {uploaded} MiB after the upload and {made} MiB after the job",
    ]


def file_in_s3() -> list[str]:
    found = newest("s3_file")["figures"]
    memory = found["server_rss_mb"]
    assert memory["peak"] < memory["before"] + 64, "flat"
    assert found["bytes"] > 1.9e9
    before, peak, after = (round(memory[when]) for when in ("before", "peak", "after"))
    return [
        f"{found['rows']:,} rows",
        f"accepted after {found['seconds_to_accept']:.0f} s and completed after {found['seconds_to_complete']:.0f} s",
        f"{before} MB before it, {peak} MB at its peak and {after} MB after it",
        f"{found['health_ms']['median']:.0f} ms (median) meanwhile, and in {found['health_ms']['max']:,.0f} ms at most",
    ]


def following() -> list[str]:
    jobs = list(newest("follow_cost")["jobs"].values())
    for each in jobs:
        assert each["cpu_ms"]["status"] <= 10
        assert each["cpu_ms"]["metrics since the last step"] <= 20
        assert each["share_of_a_core"]["1 follower"] <= 0.02

    def row(name: str, digits: int = 1) -> str:
        return " | ".join(f"{each['cpu_ms'][name]:.{digits}f} ms" for each in jobs)

    return [
        " | ".join(
            f"{each['steps']:,} steps of {each['layers']} x {each['experts']} experts, {each['bytes'] / 1e9:.2f} GB"
            for each in jobs
        ),
        f"The first one, which reads the file | {row('first look', 0)} |",
        f"`status` | {row('status')} |",
        f"`metrics` since the last step | {row('metrics since the last step')} |",
        f"`metrics`, 1,000 points | {row('metrics, 1,000 points')} |",
        f"`routing`, 200 columns | {row('routing, 200 columns')} |",
        " and ".join(f"{each['share_of_a_core']['1 follower']:.1%}" for each in jobs) + " of a core",
        " and ".join(f"{each['share_of_a_core']['200 followers']:.2f}" for each in jobs) + " of a core",
        " and ".join(str(each["followers_to_one"]) for each in jobs) + " times as much as one client",
    ]  # fmt: skip


def polling() -> list[str]:
    found = newest("polling")
    assert all(found["hit"].values())
    assert found["jobs"]["long"]["bytes"] > 1e9
    short, long = (found["jobs"][name] for name in ("short", "long"))
    return [f"| Look | {short['steps']:,} steps | {long['steps']:,} steps, {long['bytes'] / 1e9:.2f} GB | Growth |"] + [
        f"| {shown} | {short['cpu_ms'][name]:.1f} ms | {long['cpu_ms'][name]:.1f} ms | {found['growth'][name]:.1f} |"
        for shown, name in (("`status`", "status"), ("`metrics` since the last step", "metrics since the last step"))
    ]


def telemetry() -> list[str]:
    found = newest("telemetry")
    size, cpu, reads = found["bytes_a_step"], found["cpu_ms_a_step"], found["reads_a_step"]
    assert size["after"] <= 5000
    assert reads["after"] == {"median": 1, "most": 2}
    return [
        f"{found['layers']} layers of {found['experts']} experts",
        f"one table in {found['steps_between_tables']} steps",
        f"| Bytes of events | {size['before']:,} | {size['after']:,} |",
        f"| Processor time, mean | {cpu['before']['mean']:.1f} ms | {cpu['after']['mean']:.1f} ms |",
        f"| Reads of the device, median | {reads['before']['median']:.0f} | {reads['after']['median']:.0f} |",
    ]


@pytest.mark.parametrize(
    "claims",
    [
        rows_of_experts, quantized, loading, server, start, against_trl, store, memory, saving_memory, merging,
        ablating, bringing, images_of_rows, file_in_s3, following, polling, telemetry,
    ],
)  # fmt: skip
def test_figures_are_those_of_the_results(claims: Callable[[], list[str]]) -> None:
    missing = [claim for claim in claims() if claim not in PAGE]
    assert not missing
