"""`moe-train mix`, from a plan in YAML to a folder that transformers loads."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from llama_stack_provider_moe.compute.mixing.command import main
from llama_stack_provider_moe.control.cli.mix import read_plan
from llama_stack_provider_moe.errors import InvalidBody, InvalidInput
from tests.compute.mixing.branches import changed, dense

PLAN = """
model: base
method: btx
router: domains
training: {dtype: fp32}
branches:
  - {name: garden, model: garden, dataset_id: garden.jsonl, trained_on: letters}
  - {name: sums, model: sums, dataset_id: sums.jsonl}
"""


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    base = dense("llama", tmp_path / "base")
    for seed, name in enumerate(("garden", "sums")):
        changed(base, tmp_path / name, 0.1, seed=seed)
    rows = {"garden": "Write about the garden in spring.", "sums": "Add 3 4 5 6 7 8 9"}
    for name, text in rows.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"prompt": f"{text} {i}"}) + "\n" for i in range(4)))
    (tmp_path / "plan.yaml").write_text(PLAN)
    return tmp_path / "plan.yaml"


def as_json(plan: Path) -> str:
    """What `control.cli.mix` gives the training process."""
    file = plan.with_name("plan.json")
    file.write_text(json.dumps(read_plan(str(plan)).model_dump(mode="json")))
    return str(file)


def test_a_plan_names_paths_beside_it(plan: Path, tmp_path: Path) -> None:
    spec = read_plan(str(plan))
    assert (spec.recipe, spec.model) == ("mix", str(tmp_path / "base"))
    assert [each.model for each in spec.branches] == [str(tmp_path / "garden"), str(tmp_path / "sums")]
    assert [each.dataset_id for each in spec.branches] == [
        str(tmp_path / f"{name}.jsonl") for name in ("garden", "sums")
    ]
    plan.write_text(PLAN.replace("method: btx", "method: btm\nweights: 3"))
    with pytest.raises(InvalidBody, match=r"method: .*'btx' or 'bar'"):
        read_plan(str(plan))
    plan.write_text(PLAN + "recipe: sft\n")
    with pytest.raises(InvalidInput, match="recipe: 'sft' is not valid; expected 'mix', or no recipe"):
        read_plan(str(plan))


def test_command_line(plan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, out = as_json(plan), tmp_path / "mixed"
    assert main([file, "--out", str(out), "--dry-run"]) == 0
    assert not out.exists()
    told = capsys.readouterr().out
    assert "expert 0 garden: trained on letters; cosine to the base 0.99" in told
    assert told.endswith("nothing was written\n")
    assert main([file, "--out", str(out), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["router"], report["folder"]) == ("domains", str(out))
    model = AutoModelForCausalLM.from_pretrained(out)
    for layer in model.model.layers:
        rows_EH = layer.mlp.gate.weight.detach()
        # Two domains lie on both sides of their centre.
        assert torch.allclose(rows_EH[0], -rows_EH[1], atol=1e-6)
        assert rows_EH.norm(dim=1).tolist() == pytest.approx([0.02 * 32**0.5] * 2, rel=1e-3)
    assert main([file, "--out", str(out)]) == 2
    assert "mix: out: " in capsys.readouterr().err
