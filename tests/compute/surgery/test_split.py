"""Twins of every expert, and as many times more choices: the same function, in every family where it can be."""

from pathlib import Path

import pytest
import torch

from llama_stack_provider_moe.compute.surgery.actions import choose, prepare
from llama_stack_provider_moe.compute.surgery.prepared import make
from llama_stack_provider_moe.errors import InvalidInput, LayoutError
from llama_stack_provider_moe.spec.surgery import Surgery
from tests.support import surgery_models, tiny_models
from tests.support.export_support import gap, logits

# Measured over all families: at most 8e-7, as sums have another order.
TOLERANCE = 3e-6
REFUSED = ("phimoe", "llama4_text")


@pytest.mark.parametrize("family", [family for family in tiny_models.MOE if family not in REFUSED])
@pytest.mark.parametrize("factor", [2, 3])
def test_every_family_computes_the_same(family: str, factor: int, tmp_path: Path) -> None:
    base = tiny_models.build(family, tmp_path / "base")
    prepared = prepare(base, Surgery(action="split", factor=factor))
    report = make(prepared, choose(prepared, None), str(base), tmp_path / "out")
    old, new = surgery_models.load(base), surgery_models.load(tmp_path / "out")
    layout = surgery_models.layout_of(new)
    assert (layout.num_experts, layout.top_k) == (4 * factor, 2 * factor)
    assert (report.experts_after, report.top_k) == (4 * factor, 2 * factor)
    assert gap(logits(new), logits(old)) <= TOLERANCE
    assert report.parameters_after == sum(each.numel() for each in new.state_dict().values())


def test_a_twin_can_be_pruned_again(tmp_path: Path) -> None:
    """Twins stand side by side: without every second one of the first three pairs, their first ones are left."""
    base = tiny_models.build("mixtral", tmp_path / "base")
    prepared = prepare(base, Surgery(action="split"))
    make(prepared, choose(prepared, None), str(base), tmp_path / "twins")
    pruning = prepare(tmp_path / "twins", Surgery(action="prune", drop={"all": "1,3,5"}))
    make(pruning, choose(pruning, None), "twins", tmp_path / "out")
    new, old = surgery_models.load(tmp_path / "out"), surgery_models.load(base)
    for name, tensor in new.state_dict().items():
        if "experts" in name or "gate.weight" in name:
            assert torch.equal(tensor, old.state_dict()[name][[0, 1, 2, 3, 3]])


@pytest.mark.parametrize(
    ("family", "changes", "expected"),
    [
        ("llama4_text", {}, "in Llama4 a weight depends on the expert's own score alone"),
        ("glm4_moe", {"norm_topk_prob": False}, "in Glm4Moe a weight depends on the expert's own score alone"),
        ("glm4_moe", surgery_models.EIGHT["glm4_moe"], "a group is scored by its two best experts"),
    ],
)
def test_models_that_would_compute_something_else(
    family: str, changes: dict[str, object], expected: str, tmp_path: Path
) -> None:
    tiny_models.config(family, **changes).save_pretrained(tmp_path / "model")
    with pytest.raises(InvalidInput, match=r"surgery.factor: 2 is not valid; expected a model") as caught:
        prepare(tmp_path / "model", Surgery(action="split"))
    assert expected in str(caught.value)


def test_a_family_with_two_choices_in_its_code_is_refused(tmp_path: Path) -> None:
    tiny_models.config("phimoe").save_pretrained(tmp_path / "model")
    with pytest.raises(LayoutError):
        prepare(tmp_path / "model", Surgery(action="split"))
