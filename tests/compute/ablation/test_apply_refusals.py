"""Mistakes are refused before anything is written, and a killed or failed write leaves nothing half written."""

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llama_stack_provider_moe.compute.ablation import measurements
from llama_stack_provider_moe.compute.ablation.apply import apply
from llama_stack_provider_moe.compute.ablation.fingerprint import fingerprint
from llama_stack_provider_moe.compute.ablation.lora import write_adapter
from llama_stack_provider_moe.compute.ablation.measurements import Measurements
from llama_stack_provider_moe.errors import InvalidInput, ModelError, MoeError, NoRoom
from llama_stack_provider_moe.spec.ablation import MEASUREMENTS_FILE
from tests.support import tiny_models
from tests.support.ablation_models import load, measured, plan
from tests.support.jobs_support import fill

_KEPT = TemporaryDirectory()


@cache
def subject(family: str = "mixtral") -> tuple[Path, Measurements]:
    folder = tiny_models.build(family, Path(_KEPT.name) / family)
    return folder, measured(folder)


def refused(tmp_path: Path, changes: dict[str, Any], layers: str = "0-1", family: str = "mixtral") -> MoeError:
    folder, found = subject(family)
    with pytest.raises(MoeError) as caught:
        apply(str(folder), plan(layers, **changes), found, tmp_path / "out")
    assert list(tmp_path.iterdir()) == [], "nothing was written"
    return caught.value


@pytest.mark.parametrize(
    ("layers", "changes", "words"),
    [
        ("1-2", {}, "ablate.layer: 2 is not valid; expected a decoder block of this model, 0 to 1"),
        ("1", {"measurement": 7}, "ablate.measurement: 7 is not valid; expected a decoder block of this model, 0 to 1"),
        ("1", {"ablate_individual_experts": True, "expert_subset": [1, 4]}, "expert_subset: 4 is not valid; expected "
         "experts of this model, 0 to 3"),
        ("1", {"ablate_individual_experts": True, "layer_experts": {"1": "1-4"}}, "layer_experts.1: 4 is not valid; "
         "expected experts of this model, 0 to 3"),
        ("1", {"ablate_individual_experts": True, "layer_experts": {"5": "1"}}, "layer_experts: 5 is not valid; "
         "expected layers with experts: 0-1"),
        ("1", {"ablate_individual_experts": True, "layer_experts": {"0": "1"}}, "layer_experts: '0' is not valid; "
         "expected one of the blocks in `ablate`"),
        ("1", {"ablate_individual_experts": True, "layer_experts": {"1": "1"},
               "layer_experts_from": {"analysis": "job j", "moe_layers": [0, 1], "num_experts": 8}},
         "layer_experts_from: 'job j' is an analysis of another model, of 8 experts in layers 0-1; this one has 4 in "
         "layers 0-1"),
    ],
)  # fmt: skip
def test_a_plan_that_does_not_fit_the_model(layers: str, changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    assert str(refused(tmp_path, changes, layers)) == words


def test_a_rule_that_matches_nothing(tmp_path: Path) -> None:
    """Block 0 of this model is dense, so it has no routed experts; and a dense model has none anywhere."""
    error = refused(tmp_path, {"ablate_individual_experts": True}, "0", "glm4_moe")
    assert str(error).startswith("ablate_individual_experts: True is not valid; expected false, or one of the blocks")
    error = refused(tmp_path, {"ablate_individual_experts": True}, "0", "llama")
    assert "expected a model with experts; this one is dense" in str(error)


def test_measurements_of_another_model(tmp_path: Path) -> None:
    folder, _ = subject()
    other = tiny_models.build("mixtral", tmp_path / "other", seed=1)
    found = measured(other)
    with pytest.raises(InvalidInput, match=r"^measurements: '[0-9a-f]{12}' is not valid; expected measurements of "):
        apply(str(folder), plan("0-1"), found, tmp_path / "out")
    wider = tiny_models.build("mixtral", tmp_path / "wider", hidden_size=64)
    with pytest.raises(InvalidInput, match="which has 2 blocks and is 64 wide"):
        apply(str(wider), plan("0-1"), found, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"other", "wider"}


@pytest.mark.parametrize("which", [0, -1])
def test_one_changed_weight_is_another_model(which: int, tmp_path: Path) -> None:
    """A trained tensor differs nearly everywhere; here one number in the middle of one tensor does."""
    folder, found = subject()
    model = load(folder)
    name = sorted(model.state_dict())[which]
    with torch.no_grad():
        flat = model.state_dict()[name].view(-1)
        flat[len(flat) // 2] += 1
    model.save_pretrained(tmp_path / "changed")
    with pytest.raises(InvalidInput, match="measure it again"):
        apply(str(tmp_path / "changed"), plan("0-1"), found, tmp_path / "out")


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_measurements_that_are_not_finite(number: float, tmp_path: Path) -> None:
    _, found = subject()
    path = tmp_path / MEASUREMENTS_FILE
    measurements.write(found, path)
    assert torch.equal(measurements.read(path, "f").target.mean_LH, found.target.mean_LH)
    found.baseline.mean_LH[1, 5] += number
    try:
        measurements.write(found, path)
    finally:
        subject.cache_clear()
    with pytest.raises(InvalidInput, match=rf"baseline.mean is {number} at \[1, 5\]"):
        measurements.read(path, "measurements")


@pytest.mark.parametrize("damage", ["cut", "another file", "shape", "no tensor", "no file"])
def test_damaged_measurements(damage: str, tmp_path: Path) -> None:
    folder, found = subject()
    path = tmp_path / MEASUREMENTS_FILE
    measurements.write(found, path)
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-8])
    elif damage == "another file":
        path.write_bytes((folder / "model.safetensors").read_bytes())
    elif damage == "no file":
        path.unlink()
    else:
        tensors = load_file(path)
        tensors["target.halves"] = tensors["target.halves"][:1].contiguous()
        if damage == "no tensor":
            del tensors["target.halves"]
        save_file(tensors, path, metadata={"ablation": found.provenance.model_dump_json()})
    with pytest.raises(InvalidInput, match=r"^measurements: .* is not valid; expected measurements "):
        measurements.read(path, "measurements")


def test_a_model_with_a_nan(tmp_path: Path) -> None:
    folder = tiny_models.build("mixtral", tmp_path / "nan")
    found = measured(folder)
    model = load(folder)
    with torch.no_grad():
        model.get_parameter("model.layers.1.self_attn.o_proj.weight")[0, 0] = torch.nan
    model.save_pretrained(folder)
    # Away from the middle of the tensor, which the fingerprint reads.
    here = found.provenance.model_copy(update={"fingerprint": fingerprint(folder)})
    with pytest.raises(ModelError, match=r"layers.1.self_attn.o_proj.weight is not finite after the edit"):
        apply(str(folder), plan("0-1"), Measurements(here, found.target, found.baseline), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["nan"]


@pytest.mark.parametrize("output", [apply, write_adapter])
def test_a_disk_that_is_full(output: Callable[..., object], small: Path) -> None:
    folder, found = subject()
    fill(small)
    with pytest.raises(NoRoom, match=r"out: .* needs [\d,]+ bytes, and its disk has 0 free; nothing was written"):
        output(str(folder), plan("0-1", norm_preserving="off"), found, small / "out")
    assert [path.name for path in small.iterdir()] == ["ballast"]


def test_a_disk_that_another_program_fills_meanwhile(small: Path) -> None:
    """The room was there at the start. What was written goes again, so that the next try starts on a clean disk."""
    folder, found = subject()
    files = []

    def fill_it(done: int, total: int) -> None:
        if done == 2:
            files.append(fill(small))

    with pytest.raises(OSError, match="No space left on device") as caught:
        apply(str(folder), plan("0-1"), found, small / "out", progress=fill_it)
    assert caught.value.errno == errno.ENOSPC
    assert [path.name for path in small.iterdir()] == ["ballast"]
    files[0].unlink()
    apply(str(folder), plan("0-1"), found, small / "out")
    assert load(small / "out").config.model_type == "mixtral"


def test_an_output_that_exists(tmp_path: Path) -> None:
    folder, found = subject()
    (tmp_path / "out").mkdir()
    with pytest.raises(InvalidInput, match="expected a folder that does not exist yet"):
        apply(str(folder), plan("0-1"), found, tmp_path / "out")


_SLOW = """
import sys, time
from pathlib import Path
from llama_stack_provider_moe.compute.ablation import apply, measurements
from tests.support.ablation_models import plan
def slow(done, total):
    if done == total // 2:
        print("half", flush=True)
        time.sleep(600)
found = measurements.read(Path(sys.argv[2]), "measurements")
apply.apply(sys.argv[1], plan("0-1"), found, Path(sys.argv[3]), progress=slow)
"""


@pytest.mark.wide
def test_a_kill_in_the_middle_leaves_nothing_half_written(tmp_path: Path) -> None:
    folder, found = subject()
    measurements.write(found, tmp_path / MEASUREMENTS_FILE)
    out = tmp_path / "out"
    words = [sys.executable, "-c", _SLOW, str(folder), str(tmp_path / MEASUREMENTS_FILE), str(out)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "half\n"
        with pytest.raises(InvalidInput, match="a folder that no other ablation is writing"):
            apply(str(folder), plan("0-1"), found, out)
        os.kill(child.pid, signal.SIGKILL)
    assert not out.exists()
    assert (tmp_path / ".out.ablating").is_dir(), "the killed process can't remove it"
    start = time.monotonic()
    apply(str(folder), plan("0-1"), found, out)
    assert time.monotonic() - start < 60
    assert not (tmp_path / ".out.ablating").exists()
    assert load(out).config.model_type == "mixtral"
