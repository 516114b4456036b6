"""What a recorder adds up over passes, separates, and leaves out."""

from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import Tensor

from llama_stack_provider_moe.compute.moe.routing import switch_loss
from tests.compute.moe.test_routing import IDS, LENGTH, MASK, recorded


def test_the_balance_loss_of_all_that_was_recorded_is_that_of_one_batch() -> None:
    model, layout, recorder = recorded("mixtral")
    with pytest.raises(RuntimeError, match="no router ran"):
        recorder.switch_loss()
    logits = []
    with torch.no_grad():
        for row, mask in zip(IDS, MASK, strict=True):
            with recorder.recording(mask[None]):
                model(row[None], attention_mask=mask[None])
            logits.append(recorder.logits())
    by_layer = [torch.cat(rows) for rows in zip(*logits, strict=True)]
    expected = switch_loss(by_layer, layout.top_k, 4, MASK).item()
    assert recorder.switch_loss() == pytest.approx(expected, rel=1e-6)
    assert recorder.switch_loss(lambda mine: 3 * mine) == pytest.approx(expected, rel=1e-6), "as in three processes"
    assert abs(switch_loss(by_layer, layout.top_k, 4).item() - expected) > 1e-3
    recorder.take()
    with pytest.raises(RuntimeError, match="no router ran"):
        recorder.switch_loss()


def test_a_separate_recording_leaves_no_trace() -> None:
    model, _, recorder = recorded("mixtral")

    def passed(ids: Tensor) -> None:
        with recorder.recording(None, {"all": torch.ones_like(ids)}):
            model(ids)

    def taken() -> Any:
        counts = {layer: counted.tolist() for layer, counted in recorder.take_counts().items()}
        return recorder.take(), recorder.take_parts(), counts

    passed(IDS)
    expected = taken()
    passed(IDS)
    before, z_loss, chosen = recorder.switch_loss(), recorder.z_loss().item(), recorder.chosen()
    with suppress(KeyError), recorder.isolated():
        passed(IDS[:1, :5] + 1)
        assert [sum(counts) for counts in taken()[2].values()] == [10, 10], "5 tokens, top-2"
        raise KeyError
    assert (recorder.switch_loss(), recorder.z_loss().item()) == (before, z_loss)
    assert all(map(torch.equal, recorder.chosen(), chosen))
    assert taken() == expected


def test_of_several_passes_only_the_first_or_all_count() -> None:
    """All of them, of two inputs, are as many tokens; counts, parts and figures alike."""
    model, layout, recorder = recorded("mixtral")
    parts = {"first five": (torch.arange(LENGTH) < 5).long().expand_as(IDS)}
    found = []
    for inputs, first_alone in (([IDS], False), ([IDS, IDS.flip(1)], True), ([IDS, IDS.flip(1)], False)):
        with torch.no_grad(), recorder.recording(MASK, parts, first_alone):
            for ids in inputs:
                model(ids)
        passes = len(recorder.logits()) // len(layout.moe_layers)
        z_loss, counts = recorder.z_loss().item(), recorder.take_counts()
        figures = recorder.take()
        for routing in figures:
            counted = counts[routing.layer]
            assert counted.sum() == passes * MASK.sum() * layout.top_k
            assert routing.share == pytest.approx((counted / counted.sum()).tolist())
        found.append((passes, z_loss, figures, recorder.take_parts()))
    alone, first, both = found
    assert first == alone
    assert both[0] == 2
    assert both[1] != alone[1]
    with torch.no_grad(), recorder.recording(MASK, parts):
        model(IDS.flip(1))
    assert both[1] == pytest.approx((alone[1] + recorder.z_loss().item()) / 2)
    second, second_parts = recorder.take(), recorder.take_parts()
    for every, one, other in (
        (both[2], alone[2], second),
        (both[3]["first five"], alone[3]["first five"], second_parts["first five"]),
    ):
        for sums, one_layer, other_layer in zip(every, one, other, strict=True):
            mean = [(a + b) / 2 for a, b in zip(one_layer.share, other_layer.share, strict=True)]
            assert sums.share == pytest.approx(mean)
            assert sums.token_entropy == pytest.approx((one_layer.token_entropy + other_layer.token_entropy) / 2)


def test_a_pass_of_only_padding_has_no_routing_and_one_token_has() -> None:
    model, _, recorder = recorded("mixtral")
    for tokens, layers in ((0, 0), (1, 2)):
        mask = (torch.arange(LENGTH) < tokens).long().expand(1, -1)
        with torch.no_grad(), recorder.recording(mask, {"part": mask}):
            model(IDS[:1])
        assert len(recorder.take()) == layers
        assert [len(part) for part in recorder.take_parts().values()] == ([layers] if layers else [])
