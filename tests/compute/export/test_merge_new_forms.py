"""Merging where disk and memory differ in other ways than stacking: swapped axes, and rows that are joined."""

import warnings
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from llama_stack_provider_moe.compute.export.merge import merge
from llama_stack_provider_moe.compute.export.places import TensorPlace, find_places
from llama_stack_provider_moe.compute.train import checkpoints
from llama_stack_provider_moe.spec import Adapter, Moe
from tests.support import tiny_models
from tests.support.family_laws import CLOSE, Subject, answer, off_by

EVERYTHING = Adapter(rank=2, alpha=4, plan="all_experts")


def saved(subject: Subject, folder: Path) -> torch.Tensor:
    """A base and an adapter in `folder`; the logits of both together."""
    subject.model().save_pretrained(folder / "base")
    tiny_models.tokenizer().save_pretrained(folder / "base")
    model, shipped = subject.adapted(Moe(), EVERYTHING)
    checkpoints.save(model, tiny_models.tokenizer(), folder / "adapter", shipped.restored(), step=1)
    with torch.no_grad():
        return answer(model)


@pytest.mark.parametrize("swapped", [False, True])
def test_stacked_weights_may_be_transposed_on_disk(swapped: bool, tmp_path: Path) -> None:
    """Qwen3-VL's published files have the other order; transformers goes by the shapes."""
    subject = Subject("qwen3_vl_moe")
    expected = saved(subject, tmp_path)
    file = tmp_path / "base" / "model.safetensors"
    tensors = load_file(file)
    stacks = {name for name in tensors if ".experts." in name}
    assert stacks
    if swapped:
        tensors |= {name: tensors[name].transpose(1, 2).contiguous() for name in stacks}
        save_file(tensors, file, metadata={"format": "pt"})
    places = find_places(subject.model(), {name: tuple(each.shape) for name, each in tensors.items()})
    assert all(places[name] == TensorPlace(name, swapped=swapped) for name in stacks)
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    after = load_file(tmp_path / "merged" / "model.safetensors")
    assert all(after[name].shape == tensors[name].shape for name in tensors)
    kind = type(subject.model())
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert off_by(answer(kind.from_pretrained(tmp_path / "merged").eval()), expected) < CLOSE
        plain = PeftModel.from_pretrained(kind.from_pretrained(tmp_path / "base"), tmp_path / "adapter").eval()
        assert off_by(answer(plain), expected) < CLOSE


def test_rows_that_are_joined_are_at_their_places(tmp_path: Path) -> None:
    """Step's gate and up are two stacks on disk and one in memory, where up's rows follow the gate's in each expert."""
    subject = Subject("step3p7")
    expected = saved(subject, tmp_path)
    disk = load_file(tmp_path / "base" / "model.safetensors")
    places = find_places(subject.model(), {name: tuple(each.shape) for name, each in disk.items()})
    (gate,), (up,) = ([name for name in disk if name.endswith(f"moe.{part}_proj.weight")] for part in ("gate", "up"))
    assert (places[gate].expert, places[gate].first_row) == (None, 0)
    assert (places[up].expert, places[up].first_row) == (None, disk[gate].shape[1])
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    kind = type(subject.model())
    with torch.no_grad():
        assert off_by(answer(kind.from_pretrained(tmp_path / "merged").eval()), expected) < CLOSE
