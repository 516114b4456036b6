"""Merging where disk and memory differ in other ways than stacking: swapped axes, rows joined or interleaved, and two
stacks in one list.
"""

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
from tests.support.family_subject import CLOSE, Subject, answer, off_by

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


def test_rows_that_take_turns_are_put_in_order(tmp_path: Path) -> None:
    """Inkling 2's gate and up take turns on disk: its row 5 of an expert is up's row 2, row 2 + I in memory."""
    subject = Subject("inkling2")
    expected = saved(subject, tmp_path)
    disk = load_file(tmp_path / "base" / "model.safetensors")
    places = find_places(subject.model(), {name: tuple(each.shape) for name, each in disk.items()})
    gates = next(name for name, place in places.items() if place.interleaved)
    in_memory = dict(subject.model().named_parameters())[places[gates].parameter]
    assert torch.equal(disk[gates][:, 5], in_memory[:, in_memory.shape[1] // 2 + 2])
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    kind = type(subject.model())
    with torch.no_grad():
        assert off_by(answer(kind.from_pretrained(tmp_path / "merged").eval()), expected) < CLOSE


def test_two_stacks_in_one_list_are_told_apart(tmp_path: Path) -> None:
    """Ernie VL's experts of images follow those of text; they are not adapted, and stay as they are, bit for bit."""
    subject = Subject("ernie4_5_vl_moe")
    expected = saved(subject, tmp_path)
    disk = load_file(tmp_path / "base" / "model.safetensors")
    places = find_places(subject.model(), {name: tuple(each.shape) for name, each in disk.items()})
    in_memory = dict(subject.model().named_parameters())
    count, split = 0, [name for name in disk if ".experts." in name]
    for name in split:
        place = places[name]
        assert place.expert is not None
        stack = in_memory[place.parameter][place.expert]
        assert torch.equal(disk[name], stack[place.first_row : place.first_row + len(disk[name])]), name
        count += "vision_moe" in place.parameter
    assert 2 * count == len(split) > 0
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    after = load_file(tmp_path / "merged" / "model.safetensors")
    changed = {name for name in split if not torch.equal(disk[name], after[name])}
    assert changed == {name for name in split if "text_moe" in places[name].parameter}
    kind = type(subject.model())
    with torch.no_grad():
        assert off_by(answer(kind.from_pretrained(tmp_path / "merged").eval()), expected) < CLOSE


def test_a_router_whose_matrix_is_swapped_on_disk(tmp_path: Path) -> None:
    """Ernie VL's router is (hidden, experts) on disk."""
    subject = Subject("ernie4_5_vl_moe")
    subject.model().save_pretrained(tmp_path / "base")
    tiny_models.tokenizer().save_pretrained(tmp_path / "base")
    model, shipped = subject.adapted(Moe(train_router=True), EVERYTHING)
    checkpoints.save(model, tiny_models.tokenizer(), tmp_path / "adapter", shipped.restored(), step=1)
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    kind = type(subject.model())
    with torch.no_grad():
        assert off_by(answer(kind.from_pretrained(tmp_path / "merged").eval()), answer(model)) < CLOSE
