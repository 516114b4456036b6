"""New experts: copies with noise or another model's MLPs, router rows of three kinds, and what they change."""

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from transformers import PreTrainedModel

from llama_stack_provider_moe.compute.analysis.routing_report import Prompt
from llama_stack_provider_moe.compute.export import gguf, verify
from llama_stack_provider_moe.compute.export.merge import merge
from llama_stack_provider_moe.compute.export.reference import read_reference
from llama_stack_provider_moe.compute.methods.mixing import domain_rows
from llama_stack_provider_moe.compute.models.adapted import with_adapter
from llama_stack_provider_moe.compute.surgery.actions import choose, prepare
from llama_stack_provider_moe.compute.surgery.prepared import Rows, make
from llama_stack_provider_moe.compute.surgery.report import SurgeryReport, text
from llama_stack_provider_moe.errors import InvalidInput
from llama_stack_provider_moe.spec.surgery import Surgery
from tests.support import llama_support, surgery_models, tiny_models
from tests.support.export_support import EVERYTHING, adapted, gap, logits
from tests.support.llama_support import ALIGNED

ROWS = surgery_models.prompts(4, 12)
GENERAL = surgery_models.prompts(4, 12, seed=6)
CHOSEN_BY_BIAS = ("minimax_m2", "glm4_moe", "deepseek_v3", "lfm2_moe")
# Measured: at most 4e-7, as sums have another order.
TOLERANCE = 1e-6


def extended(
    base: Path, out: Path | None, general: bool = True, rows: bool = True, **added: object
) -> SurgeryReport:  # fmt: skip
    """Add experts, with rows or without, and without a command."""
    prepared = prepare(base, Surgery.model_validate({"action": "add", "add": added}))
    given = Rows(surgery_models.load(base), ROWS, 3, GENERAL if general else ()) if rows else None
    return make(prepared, choose(prepared, given), str(base), out)


def count_of(family: str) -> int:
    """New experts that a family can have: one for each group."""
    return 2 if family in surgery_models.IN_GROUPS else 1


def grown(
    old: PreTrainedModel, new: PreTrainedModel, at: list[int]
) -> dict[str, tuple[Tensor, Tensor, Tensor]]:  # fmt: skip
    """Parameter or buffer -> before, after without the experts `at`, and those; only where the shape changed."""
    before, found = old.state_dict(), {}
    for name, tensor in new.state_dict().items():
        shapes = zip(before[name].shape, tensor.shape, strict=True)
        axis = next((axis for axis, (one, other) in enumerate(shapes) if one != other), None)
        if axis is None:
            assert torch.equal(before[name], tensor), name
            continue
        stay = [each for each in range(tensor.shape[axis]) if each not in at]
        parts = (
            before[name],
            tensor.index_select(axis, torch.tensor(stay)),
            tensor.index_select(axis, torch.tensor(at)),
        )
        found[name] = (parts[0].movedim(axis, 0), parts[1].movedim(axis, 0), parts[2].movedim(axis, 0))
    assert found
    return found


@pytest.mark.parametrize("family", tiny_models.MOE)
def test_copies_in_every_family(family: str, tmp_path: Path) -> None:
    base = surgery_models.build(family, tmp_path / "base")
    count = count_of(family)
    report = extended(base, tmp_path / "out", general=False, count=count)
    copies = {each.layer: each.copies for each in report.layers}
    old, new = surgery_models.load(base), surgery_models.load(tmp_path / "out")
    at = [number for number, each in enumerate(report.layers[0].kept) if each == -1]
    assert at == ([4, 9] if count == 2 else [8])
    for name, (before, stayed, added) in grown(old, new, at).items():
        assert torch.equal(before, stayed), name
        assert torch.equal(added, before[copies[int(name.split(".layers.")[1].split(".")[0])]]), name
    assert (report.experts_before, report.experts_after) == (8, 8 + count)
    assert report.loss is not None
    ids = torch.tensor([ROWS[0].ids])
    with torch.no_grad():
        moved = float((new(ids).logits - old(ids).logits)[:, :-1].abs().max())
    assert report.loss.logit_change >= moved - TOLERANCE
    assert report.loss.after == pytest.approx(loss_of(new, ROWS), abs=1e-5)
    assert moved > TOLERANCE or family == "llama4_text"  # top-1: a twin is chosen instead, and computes the same
    assert all(each.chosen is not None for each in report.layers)


def loss_of(model: PreTrainedModel, prompts: list[Prompt]) -> float:
    """The mean loss of the rows."""
    total, tokens = 0.0, 0
    for prompt in prompts:
        ids = torch.tensor([prompt.ids])
        with torch.no_grad():
            total += float(model(ids, labels=ids).loss) * (len(prompt.ids) - 1)
        tokens += len(prompt.ids) - 1
    return total / tokens


@pytest.mark.parametrize("family", CHOSEN_BY_BIAS)
def test_closed_experts_change_nothing(family: str, tmp_path: Path) -> None:
    base = surgery_models.build(family, tmp_path / "base")
    for router in ("copy", "zero", "domain"):
        report = extended(
            base, tmp_path / router, count=count_of(family), router=router, closed=True, noise=0.1, seed=3
        )  # fmt: skip
        old, new = surgery_models.load(base), surgery_models.load(tmp_path / router)
        assert gap(logits(old), logits(new)) <= TOLERANCE
        assert report.loss is not None
        assert report.loss.logit_change <= TOLERANCE
        assert [each.chosen for each in report.layers] == [0.0] * len(report.layers)
    open_again = surgery_models.load(tmp_path / "copy")
    for bias in surgery_models.layout_of(open_again).biases(open_again).values():
        bias.data += (bias.data < -0.9) * 3
    assert gap(logits(old), logits(open_again)) > 1e-4


@pytest.mark.parametrize("family", ["granitemoe", "mixtral", "gpt_oss", "glm4_moe", "llama4_text"])
def test_rows_of_a_domain(family: str, tmp_path: Path) -> None:
    """The new row is the direction of the domain's mean router input, as long as the others are on average."""
    base = surgery_models.build(family, tmp_path / "base")
    count = count_of(family)
    report = extended(base, tmp_path / "out", count=count, router="domain")
    old, new = surgery_models.load(base), surgery_models.load(tmp_path / "out")
    layout = surgery_models.layout_of(old)
    for layer, router in layout.routers(old).items():
        means = torch.stack([mean_input(old, router, prompts) for prompts in (ROWS, GENERAL)])
        rows_EH = router.get_parameter(layout.router_weight).detach()
        expected = domain_rows(means, float(rows_EH.norm(dim=1).mean()))[0]
        found_EH = layout.routers(new)[layer].get_parameter(layout.router_weight).detach()
        at = [number for number, each in enumerate(report.layers[0].kept) if each == -1]
        for number in at:
            assert torch.allclose(found_EH[number], expected, atol=1e-5)
            assert float((means[0] - means[1]).float() @ found_EH[number]) > 0
            if family == "gpt_oss":
                assert layout.routers(new)[layer].get_parameter("bias")[number] == 0
    assert report.general_loss is not None
    assert report.general_loss.after == pytest.approx(loss_of(new, GENERAL), abs=1e-5)
    assert all(each.chosen is not None and each.chosen_general is not None for each in report.layers)
    assert "new experts that a token of the general rows chooses" in text(report)


def mean_input(model: PreTrainedModel, router: torch.nn.Module, prompts: list[Prompt]) -> Tensor:
    """Mean of what goes into a router, one row at a time."""
    seen: list[Tensor] = []
    handle = router.register_forward_pre_hook(lambda _, given: seen.append(given[0].detach().reshape(-1, 32)))
    for prompt in prompts:
        with torch.no_grad():
            model(torch.tensor([prompt.ids]))
    handle.remove()
    return torch.cat(seen).double().mean(dim=0)


def test_without_a_number_the_most_used_are_copied(tmp_path: Path) -> None:
    base = surgery_models.build("mixtral", tmp_path / "base")
    report = extended(base, None, general=False, count=2)
    model = surgery_models.load(base)
    layout = surgery_models.layout_of(model)
    for each in report.layers:
        chosen: list[Tensor] = []
        module = layout.experts(model)[each.layer]
        handle = module.register_forward_pre_hook(lambda _, given, chosen=chosen: chosen.append(given[1].flatten()))
        for prompt in ROWS:
            with torch.no_grad():
                model(torch.tensor([prompt.ids]))
        handle.remove()
        counts = torch.cat(chosen).bincount(minlength=8)
        assert each.copies == counts.argsort(descending=True, stable=True)[:2].tolist()
    assert extended(base, None, rows=False, count=2).layers[0].copies == [0, 1]
    assert extended(base, None, rows=False, count=2).loss is None


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_noise_has_its_size_and_its_seed(family: str, tmp_path: Path) -> None:
    base = surgery_models.build(family, tmp_path / "base")
    for name, seed in (("one", 1), ("same", 1), ("other", 2)):
        extended(base, tmp_path / name, rows=False, copy_of=2, noise=0.5, seed=seed)
    old = surgery_models.load(base)
    one, same, other = (surgery_models.load(tmp_path / name) for name in ("one", "same", "other"))
    for name, (before, _, added) in grown(old, one, [8]).items():
        again, differs = grown(old, same, [8])[name][2], grown(old, other, [8])[name][2]
        assert torch.equal(added, again)
        if before.dim() == 3:
            noise = added[0] - before[2]
            assert float(noise.std() / before[2].std()) == pytest.approx(0.5, rel=0.15)
            assert not torch.equal(added, differs)
        else:
            assert torch.equal(added[0], before[2])


@pytest.mark.parametrize(
    ("family", "donor", "changes"),
    [
        ("mixtral", "llama", {"intermediate_size": 24}),
        ("qwen3_moe", "qwen3", {"intermediate_size": 24}),
        ("granitemoe", "mixtral", {"intermediate_size": 24}),
        ("mixtral", "granitemoe", {"num_local_experts": 5}),
        ("gpt_oss", "gpt_oss", {}),
        ("llama4_text", "llama", {"intermediate_size": 24}),
    ],
)
def test_mlps_of_another_model(family: str, donor: str, changes: dict[str, Any], tmp_path: Path) -> None:
    """The new expert, chosen with weight 1, computes what the MLP computes."""
    base = surgery_models.build(family, tmp_path / "base")
    other = tiny_models.build(donor, tmp_path / "donor", seed=7, **changes)
    extended(base, tmp_path / "out", rows=False, mlp_from=str(other), **({"mlp_expert": 2} if donor in
                                                                         tiny_models.MOE else {}))  # fmt: skip
    new, given = surgery_models.load(tmp_path / "out"), surgery_models.load(other)
    layout = surgery_models.layout_of(new)
    layer, experts = next(iter(layout.experts(new).items()))
    hidden_TH = torch.randn(6, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        if donor in tiny_models.MOE:
            theirs = surgery_models.layout_of(given).experts(given)[layer]
            expected = theirs(hidden_TH, torch.full((6, 1), 2), torch.ones(6, 1))
        else:
            expected = given.get_submodule(f"model.layers.{layer}.mlp")(hidden_TH)
        if family == "llama4_text":
            found = experts(hidden_TH.repeat(9, 1)).view(9, 6, 32)[8]
        else:
            found = experts(hidden_TH, torch.full((6, 1), 8), torch.ones(6, 1))
    assert torch.allclose(found, expected, atol=1e-6)
    assert float(expected.abs().max()) > 1e-4
    rows_EH = layout.routers(new)[layer].get_parameter(layout.router_weight)
    assert torch.allclose(rows_EH[8], rows_EH[:8].mean(dim=0), atol=1e-6)


@pytest.mark.parametrize(
    ("donor", "changes", "added", "expected"),
    [
        ("llama", {}, {}, "its MLPs have 48 hidden neurons of width 32, expected 24 of 32"),
        ("llama", {"intermediate_size": 24, "num_hidden_layers": 3}, {}, "it has 3 layers, expected 2"),
        ("llama", {"intermediate_size": 24, "hidden_act": "gelu"}, {}, "its activation is gelu, expected silu"),
        ("llama", {"intermediate_size": 24}, {"mlp_expert": 1}, "it is dense, so `mlp_expert` has no effect"),
        ("gpt_oss", {}, {}, "its activation is silu, expected silu"),
        ("granitemoe", {}, {"mlp_expert": 3, "count": 2}, "it has experts 0 to 3, and 2 from 3 on were asked for"),
    ],
)
def test_mlps_that_do_not_fit(
    donor: str, changes: dict[str, Any], added: dict[str, Any], expected: str, tmp_path: Path
) -> None:
    tiny_models.config("mixtral", num_local_experts=8).save_pretrained(tmp_path / "base")
    tiny_models.config(donor, **changes).save_pretrained(tmp_path / "donor")
    asked = Surgery.model_validate({"action": "add", "add": {"mlp_from": str(tmp_path / "donor"), **added}})
    with pytest.raises(InvalidInput) as caught:
        prepare(tmp_path / "base", asked)
    assert expected in str(caught.value)
    assert "surgery.add.mlp_from" in str(caught.value)


@pytest.mark.parametrize(
    ("family", "added", "expected"),
    [
        ("mixtral", {"closed": True}, "surgery.add.closed: True is not valid; expected false, because Mixtral chooses"),
        ("ernie4_5_moe", {"closed": True}, "a score in Ernie4_5_Moe is a share of all experts"),
        ("mixtral", {"copy_of": 7, "count": 2}, "surgery.add.copy_of: 7 is not valid; expected at most 6"),
        ("mixtral", {"count": 9}, "surgery.add.count: 9 is not valid; expected at most 8"),
        ("glm4_moe", {"count": 1}, "surgery.add.count: 1 is not valid; expected a multiple of 2"),
    ],
)
def test_experts_that_can_not_come(family: str, added: dict[str, Any], expected: str, tmp_path: Path) -> None:
    tiny_models.config(family, **surgery_models.eight(family)).save_pretrained(tmp_path / "model")
    with pytest.raises(InvalidInput) as caught:
        prepare(tmp_path / "model", Surgery.model_validate({"action": "add", "add": added}))
    assert expected in str(caught.value)


@pytest.mark.parametrize(
    ("added", "expected"),
    [
        ({"mlp_from": "m", "copy_of": 1}, "copy_of: 1 has no effect with `mlp_from`"),
        ({"mlp_expert": 1}, "mlp_expert: 1 has no effect without `mlp_from`"),
        ({"seed": 1}, "seed: 1 has no effect without `noise`"),
        ({"count": 0}, "greater than or equal to 1"),
        ({"router": "mean"}, "Input should be 'copy', 'domain' or 'zero'"),
    ],
)
def test_settings_are_checked_at_the_door(added: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValidationError) as caught:
        Surgery.model_validate({"action": "add", "add": added})
    assert expected in str(caught.value)


def test_the_same_rows_twice_have_no_direction(tmp_path: Path) -> None:
    base = surgery_models.build("mixtral", tmp_path / "base")
    prepared = prepare(base, Surgery.model_validate({"action": "add", "add": {"router": "domain"}}))
    with pytest.raises(InvalidInput, match=r"data.general_dataset_id: None is not valid; expected rows that differ"):
        choose(prepared, Rows(surgery_models.load(base), ROWS, 3, ROWS))
    with pytest.raises(InvalidInput, match="rows of the domain and general rows"):
        choose(prepared, Rows(surgery_models.load(base), ROWS, 3))


def test_it_trains_and_merges_an_adapter(tmp_path: Path) -> None:
    base = surgery_models.build("qwen3_moe", tmp_path / "base")
    # Not with copied rows: their logits tie, and the order of sums decides between two experts.
    extended(base, tmp_path / "new", rows=False, count=2, noise=0.1, router="zero")
    adapter = adapted(tmp_path / "new", tmp_path / "adapter", EVERYTHING)
    merge(tmp_path / "new", adapter, tmp_path / "whole")
    expected = logits(with_adapter(surgery_models.load(tmp_path / "new"), adapter, None).eval())
    assert gap(logits(surgery_models.load(tmp_path / "whole")), expected) <= 1e-5


def test_it_converts_to_gguf(tmp_path: Path) -> None:
    tools = llama_support.toolchain()
    base = llama_support.build("granitemoe", tmp_path / "base", initializer_range=0.03, num_local_experts=6, **ALIGNED)
    # Rows that are equal tie, and llama.cpp decides otherwise than torch; a row of zeros ties with no other row.
    extended(base, tmp_path / "out", rows=False, count=1, noise=0.1, router="zero")
    gguf.convert(tmp_path / "out", tmp_path / "f32.gguf", "f32", tools)
    reference = read_reference(tmp_path / "out", say=lambda line: None)
    check = verify.verify(tmp_path / "f32.gguf", tmp_path / "out", tools, reference, "f32")
    assert check.logits is not None
    assert check.logits.relative_difference < 1e-4
