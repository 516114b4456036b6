"""An edit as an adapter: on it is the edited model, off the model; what is no such edit is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from llama_stack_provider_moe.compute.ablation import measurements
from llama_stack_provider_moe.compute.ablation.apply import apply
from llama_stack_provider_moe.compute.ablation.apply_command import main
from llama_stack_provider_moe.compute.ablation.apply_report import APPLIED_FILE
from llama_stack_provider_moe.compute.ablation.edits import plan_edits
from llama_stack_provider_moe.compute.ablation.lora import bytes_of, write_adapter
from llama_stack_provider_moe.compute.moe.derive import find_layout
from llama_stack_provider_moe.errors import InvalidInput, MoeError
from tests.compute.ablation.test_apply import FAMILIES, everywhere, subject
from tests.support import tiny_models
from tests.support.ablation_models import load, plan
from tests.support.family_subject import answer


@pytest.mark.parametrize("family", [each for each in FAMILIES if each != "gpt_oss"])
def test_it_is_the_edited_model_and_can_be_switched_off(family: str, tmp_path: Path) -> None:
    """Everything that writes into the stream, and every router, in every block: with routed experts fused or single."""
    folder, found = subject(family)
    changes = {"scale": 0.7, "sparsity": 0.25, "norm_preserving": "off"}
    wanted = plan(everywhere(family), ablate_individual_experts=family in tiny_models.MOE, **changes)
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
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_bytes())
    assert (config["r"], config["lora_alpha"]) == (1, 1)


@pytest.mark.parametrize("family", ["mixtral", "granitemoeshared", "llama4_text"])
def test_only_the_named_experts_have_an_update(family: str, tmp_path: Path) -> None:
    folder, found = subject(family)
    choice = {"ablate_individual_experts": True, "expert_subset": [1, 2], "gate_scale": 0.0}
    wanted = plan("1", norm_preserving="off", **choice)
    apply(str(folder), wanted, found, tmp_path / "edited")
    write_adapter(str(folder), wanted, found, tmp_path / "adapter")
    written = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    edits = plan_edits(folder, wanted, found.provenance)
    assert bytes_of(edits) == sum(tensor.nbytes for tensor in written.values()), "the room that it needs"
    base = load(folder)
    layout = find_layout(base)
    assert layout is not None
    name = layout.path(1, f"{layout.experts_path}.{layout.down}")
    old, edited = base.get_parameter(name).detach().clone(), load(tmp_path / "edited").get_parameter(name)
    whole = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).merge_and_unload()
    merged = whole.get_parameter(name)
    assert torch.allclose(merged, edited, atol=1e-7)
    assert [not torch.equal(*pair) for pair in zip(old, merged, strict=True)] == [False, True, True, False]


@pytest.mark.parametrize(
    ("family", "changes", "told"),
    [
        ("llama", {}, "norm_preserving: 'column' is not valid; expected off with output lora"),
        ("llama", {"norm_preserving": "row"}, "norm_preserving: 'row'"),
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
            "norm_preserving": "off", "ablate": [{"layer": "0-1", "measurement": 1}], "output": "lora"}  # fmt: skip
    (tmp_path / "plan.json").write_text(json.dumps(body))
    words = [str(tmp_path / "plan.json"), "--out", str(tmp_path / "out")]
    assert main(words) == 0
    assert "an adapter of rank 1 on 4 parameters" in capsys.readouterr().err
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
    assert main(words) == 2
    (tmp_path / "plan.json").write_text(json.dumps(body | {"norm_preserving": "column"}))
    assert main([words[0], "--dry-run"]) == 2
    assert "norm_preserving" in capsys.readouterr().err


def test_a_folder_that_exists_is_left_alone(tmp_path: Path) -> None:
    folder, found = subject("llama")
    with pytest.raises(InvalidInput, match="a folder that does not exist yet"):
        write_adapter(str(folder), plan("0", norm_preserving="off"), found, tmp_path)
