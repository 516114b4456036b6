"""Mistakes are named with the field, the value and what is expected, before any weight is read."""

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from llama_stack_provider_moe.compute.surgery.actions import choose, prepare
from llama_stack_provider_moe.compute.surgery.prepared import make
from llama_stack_provider_moe.errors import InvalidInput, LayoutError, ModelError, MoeError
from llama_stack_provider_moe.spec.surgery import Surgery
from tests.support import surgery_models, tiny_models


def config_alone(family: str, folder: Path, **changes: Any) -> Path:
    """A folder with a config and no weights: whatever is refused there was refused before one was read."""
    tiny_models.config(family, **{**surgery_models.eight(family), **changes}).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("family", "asked", "expected"),
    [
        ("mixtral", {"keep": 1},
         "surgery.keep: 1 is not valid; expected 2 to 7 experts to keep: the model has 8, and a token is sent to 2"),
        ("mixtral", {"keep": 8}, "surgery.keep: 8 is not valid; expected 2 to 7 experts to keep"),
        ("mixtral", {"drop": {"all": "0-6"}},
         "surgery.drop: 7 is not valid; expected 1 to 6 experts to remove from each layer"),
        ("mixtral", {"drop": {"all": "8"}}, "surgery.drop.0: 8 is not valid; expected experts 0 to 7"),
        ("mixtral", {"drop": {"0": "1", "5": "1"}}, "surgery.drop: 5 is not valid; expected layers with experts: 0-1"),
        ("mixtral", {"drop": {"0": "1"}}, "layer 1 is missing"),
        ("mixtral", {"drop": {"0": "1", "1": "1-2"}}, "expected the same number of experts in every layer"),
        ("glm4_moe", {"drop": {"all": "0,1"}}, "surgery.drop.1: [0, 1] is not valid; expected the same number of each "
         "of 2 groups of 4 neighbouring experts, because the router chooses groups first; these are 2, 0"),
        ("glm4_moe", {"keep": 5}, "surgery.keep: 5 is not valid; expected 2 groups of equal size to stay"),
        ("glm4_moe", {"keep": 2}, "at least 2 experts in each"),
    ],
)  # fmt: skip
def test_experts_that_can_not_go(family: str, asked: dict[str, Any], expected: str, tmp_path: Path) -> None:
    folder = config_alone(family, tmp_path / "model")
    with pytest.raises(InvalidInput) as caught:
        prepare(folder, Surgery(action="prune", **asked))
    assert expected in str(caught.value)


def test_the_caller_names_the_fields(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"^--keep: 1 is not valid"):
        prepare(config_alone("mixtral", tmp_path / "model"), Surgery(action="prune", keep=1), field="--")


@pytest.mark.parametrize(
    ("family", "change", "kind", "expected"),
    [
        ("llama", {}, ModelError, "model: 'llama' is a dense model; expected one with experts"),
        ("mixtral", {"quantization_config": {"quant_method": "fp8"}}, ModelError, "its weights are quantised"),
        ("mixtral", {"model_type": "unheard_of"}, ModelError, "can't be read"),
    ],
)
def test_models_that_have_nothing_to_prune(
    family: str, change: dict[str, Any], kind: type[MoeError], expected: str, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    tiny_models.config(family).save_pretrained(folder)
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(kind, match=expected):
        prepare(folder, Surgery(action="prune", keep=2))


def test_a_config_that_leaves_out_its_number_of_experts_gets_the_key(tmp_path: Path) -> None:
    folder = config_alone("mixtral", tmp_path / "model")
    file = folder / "config.json"
    raw = json.loads(file.read_text())
    del raw["num_local_experts"]  # the family's default is 8
    file.write_text(json.dumps(raw))
    assert prepare(folder, Surgery(action="prune", keep=6)).resized.raw["num_local_experts"] == 6


def test_a_count_that_is_no_key_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llama_stack_provider_moe.compute.surgery import resized

    monkeypatch.setattr(resized, "_OTHER_COUNTS", ("experts",))
    with pytest.raises(LayoutError, match=r"mixtral: no key of its config.json counts the 8 experts of a layer"):
        prepare(config_alone("mixtral", tmp_path / "model"), Surgery(action="prune", keep=6))


def test_a_score_needs_rows_and_an_output_must_be_new(tmp_path: Path) -> None:
    base = surgery_models.build("mixtral", tmp_path / "base")
    with pytest.raises(InvalidInput, match=r"data: None is not valid; expected rows, because surgery.keep chooses"):
        choose(prepare(base, Surgery(action="prune", keep=6)), None)
    pruning = prepare(base, Surgery(action="prune", drop={"all": "1"}))
    with pytest.raises(InvalidInput, match="expected a folder that does not exist yet"):
        make(pruning, choose(pruning, None), "base", base)


def test_layers_that_guess_ahead_are_left_out(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    base = surgery_models.build("glm4_moe", tmp_path / "base", num_nextn_predict_layers=1)
    weights = load_file(base / "model.safetensors")
    ahead = "model.layers.2.mlp.experts.7.up_proj.weight"
    weights[ahead] = weights["model.layers.1.mlp.experts.7.up_proj.weight"].clone()
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    pruning = prepare(base, Surgery(action="prune", drop={"all": "0,4"}))
    report = make(pruning, choose(pruning, None), "base", tmp_path / "out")
    assert report.left_out == [ahead]
    assert any("1 tensors are left out" in warning for warning in report.warnings)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_nextn_predict_layers"] == 0
    assert ahead not in load_file(tmp_path / "out" / "model.safetensors")


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({}, "keep: None is not valid without `drop`; expected one of the two"),
        ({"keep": 2, "drop": {"all": "1"}}, "keep: 2 is not valid with `drop`"),
        ({"drop": {"all": "1"}, "by": "usage"}, "by: 'usage' has no effect with `drop`"),
        ({"drop": {"all": "1", "0": "1"}}, "'all' is not valid beside layers"),
        ({"drop": {"first": "1"}}, "'first' is not the number of a layer"),
        ({"drop": {"0": "one"}}, "'one' does not name experts"),
        ({"drop": {"0": "3-1"}}, "range '3-1' ends before it begins"),
        ({"keep": 2, "factor": 2}, "factor: 2 has no effect with action 'prune'"),
        ({"action": "split", "keep": 2}, "keep: 2 has no effect with action 'split'"),
        ({"action": "split", "drop": {"all": "1"}}, "has no effect with action 'split'"),
        ({"keep": 2, "by": "luck"}, "Input should be 'reap' or 'usage'"),
    ],
)
def test_settings_are_checked_at_the_door(asked: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValidationError) as caught:
        Surgery.model_validate({"action": "prune", **asked})
    assert expected in str(caught.value)
