"""An edit as an adapter: on it is the edited model, off the model; what is no such edit is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from llama_stack_provider_moe.compute.ablation import measurements
from llama_stack_provider_moe.compute.ablation.apply import apply
from llama_stack_provider_moe.compute.ablation.apply_command import main
from llama_stack_provider_moe.compute.ablation.apply_report import APPLIED_FILE
from llama_stack_provider_moe.compute.ablation.lora import write_adapter
from llama_stack_provider_moe.errors import InvalidInput, MoeError
from tests.compute.ablation.test_apply import everywhere, subject, tensors
from tests.support.ablation_models import load, plan
from tests.support.family_subject import answer


@pytest.mark.parametrize("family", ["llama", "mixtral", "qwen2_moe", "granitemoeshared", "glm4_moe", "deepseek_v3"])
@pytest.mark.parametrize("sparsity", [0.0, 0.25])
def test_it_is_the_edited_model_and_can_be_switched_off(family: str, sparsity: float, tmp_path: Path) -> None:
    """Attention, dense and shared experts' layers of every block lose the direction."""
    folder, found = subject(family)
    wanted = plan(everywhere(family), scale=0.7, sparsity=sparsity, norm_preserving="off", gate_scale=0)
    done = apply(str(folder), wanted, found, tmp_path / "edited")
    report = write_adapter(str(folder), wanted, found, tmp_path / "adapter")
    base = load(folder)
    with torch.no_grad():
        before, edited = answer(base), answer(load(tmp_path / "edited"))
        adapted = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
        assert torch.allclose(answer(adapted), edited, atol=2e-5)
        with adapted.disable_adapter():
            assert torch.equal(answer(adapted), before)
    assert float((edited - before).abs().max()) > 1e-2
    assert {each.name for each in report.touched} == {each.name for each in done.touched}
    for one, other in zip(report.touched, done.touched, strict=True):
        assert one.along_after == pytest.approx(other.along_after, abs=1e-6)
    assert json.loads((tmp_path / "adapter" / APPLIED_FILE).read_bytes()) == report.model_dump(mode="json")
    names = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert names >= {"adapter_config.json", "adapter_model.safetensors", APPLIED_FILE}
    assert all(1 in each.shape for each in tensors(tmp_path / "adapter").values()), "rank 1"


@pytest.mark.parametrize(
    ("family", "changes", "told"),
    [
        ("llama", {}, "norm_preserving: 'column' is not valid; expected off with --output lora"),
        ("llama", {"norm_preserving": "row"}, "norm_preserving: 'row'"),
        ("mixtral", {"norm_preserving": "off", "ablate_individual_experts": True}, "ablate_individual_experts: True"),
        ("mixtral", {"norm_preserving": "off"}, "gate_scale: 0.5 is not valid; expected 0 with --output lora"),
        ("gpt_oss", {"norm_preserving": "off", "gate_scale": 0}, "is a bias that writes into the residual stream"),
    ],
)
def test_what_is_no_such_edit(family: str, changes: dict[str, Any], told: str, tmp_path: Path) -> None:
    folder, found = subject(family)
    with pytest.raises(MoeError) as caught:
        write_adapter(str(folder), plan("0-1", **changes), found, tmp_path / "out")
    assert told in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_the_command_writes_an_adapter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, found = subject("llama")
    measurements.write(found, tmp_path / "measured.safetensors")
    body = {"recipe": "ablation", "model": str(folder), "measurements": str(tmp_path / "measured.safetensors"),
            "norm_preserving": "off", "ablate": [{"layer": "0-1", "measurement": 1}]}  # fmt: skip
    (tmp_path / "plan.json").write_text(json.dumps(body))
    words = [str(tmp_path / "plan.json"), "--output", "lora", "--out", str(tmp_path / "out")]
    assert main(words) == 0
    assert "an adapter of rank 1 on 4 linear layers" in capsys.readouterr().err
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
    assert main(words) == 2
    (tmp_path / "plan.json").write_text(json.dumps(body | {"norm_preserving": "column"}))
    assert main([*words[:3], "--dry-run"]) == 2
    assert "norm_preserving" in capsys.readouterr().err


def test_a_folder_that_exists_is_left_alone(tmp_path: Path) -> None:
    folder, found = subject("llama")
    with pytest.raises(InvalidInput, match="a folder that does not exist yet"):
        write_adapter(str(folder), plan("0", norm_preserving="off"), found, tmp_path)
