"""The plan of GLM-4.5-Air, 107 B parameters, from its config alone."""

import shutil
from pathlib import Path

import pytest
import torch

from llama_stack_provider_moe.compute.ablation.apply import dry_run
from llama_stack_provider_moe.compute.ablation.apply_report import BYTES_PER_S, text
from llama_stack_provider_moe.compute.ablation.measurements import (
    SETS,
    MeasuredSet,
    MeasuredStates,
    Measurements,
    Provenance,
)
from tests.support.ablation_models import plan

CONFIG = Path(__file__).parents[2] / "configs" / "glm-4.5-air.json"
BLOCKS, WIDTH, EXPERTS = 46, 4096, 128
MIB = 1 << 20


def test_glm_4_5_air(tmp_path: Path) -> None:
    """By hand: attention writes from 96 heads of 128, block 0 is dense, others have 128 experts and a shared one."""
    shutil.copyfile(CONFIG, tmp_path / "config.json")
    drawn = torch.Generator().manual_seed(0)
    states = [
        MeasuredStates(
            torch.randn(BLOCKS, WIDTH, generator=drawn, dtype=torch.float64),
            torch.randn(2, BLOCKS, WIDTH, generator=drawn, dtype=torch.float64),
            torch.randn(8, BLOCKS, generator=drawn),
        )
        for _ in SETS
    ]
    provenance = Provenance(
        model="glm", fingerprint="", adapter=None, model_type="glm4_moe", layers=BLOCKS, width=WIDTH, position=-1,
        dtype="bf16", quantize_bits=None, chat_template="",
        sets={name: MeasuredSet(source=name, rows=8, sha256="") for name in SETS},
        router_norms=dict.fromkeys(range(1, BLOCKS), "post_attention_layernorm"), normed_outputs=[],
    )  # fmt: skip
    wanted = plan(f"0-{BLOCKS - 1}", 30, ablate_individual_experts=True)
    report = dry_run(str(tmp_path), wanted, Measurements(provenance, *states))
    size: dict[str, int] = {}
    count: dict[str, int] = {}
    for each in report.touched:
        size[each.kind] = size.get(each.kind, 0) + each.bytes
        count[each.kind] = count.get(each.kind, 0) + 1
    assert count == {"attention": 46, "dense": 1, "experts": 45, "shared": 45, "router": 45}
    expert = 2 * WIDTH * 1408
    assert size == {
        "attention": 46 * 96 * MIB, "dense": 2 * WIDTH * 10944, "experts": 45 * EXPERTS * expert,
        "shared": 45 * expert, "router": 45 * MIB,
    }  # fmt: skip
    assert {each.experts for each in report.touched if each.kind == "experts"} == {EXPERTS}
    assert report.largest_bytes == 2 * 96 * MIB, "an output projection in fp32; experts go one by one"
    assert report.bytes == pytest.approx(213.7e9, rel=0.005), "106.9 B parameters in bf16"
    assert report.seconds == pytest.approx(report.bytes / BYTES_PER_S)
    assert report.missed == ["block 0 has no router to edit", "block 0 has no routed experts to edit"]
    assert "would edit 182 tensors" in text(report)
