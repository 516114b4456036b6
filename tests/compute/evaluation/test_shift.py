"""KL and routing beside the base: equal to what both models give when they are in memory together."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from llama_stack_provider_moe.compute.ablation.apply import apply
from llama_stack_provider_moe.compute.evaluation import shift, statistics
from llama_stack_provider_moe.compute.evaluation.generate import Limits, LocalModel
from llama_stack_provider_moe.compute.moe.derive import find_layout
from llama_stack_provider_moe.compute.moe.routing import RoutingRecorder
from llama_stack_provider_moe.spec.rows import Conversation
from tests.compute.ablation.test_apply import everywhere, subject
from tests.support import tiny_models
from tests.support.ablation_models import load, plan
from tests.support.training_support import said

TALKS: list[Conversation] = [
    {"messages": [said("user", f"Name {i} trees."), said("assistant", "Oak and elm. " * i)]} for i in range(1, 6)
]  # type: ignore[list-item]


def local(model: PreTrainedModel, batch_size: int) -> LocalModel:
    return LocalModel(model, tiny_models.tokenizer(), Limits(batch_size, 4, 256), [], None, lambda *_: None)


def chosen(model: PreTrainedModel, ids: list[int]) -> Tensor:
    """The experts of each token in each layer, (T, L, K)."""
    layout = find_layout(model)
    assert layout is not None
    recorder = RoutingRecorder(model, layout)
    try:
        with torch.no_grad(), recorder.recording(None):
            model(input_ids=torch.tensor([ids]))
        return torch.stack([recorder.chosen_in(layer) for layer in layout.moe_layers], dim=1)
    finally:
        recorder.close()


@pytest.mark.parametrize("family", ["llama", "mixtral", "granitemoeshared"])
def test_they_are_those_of_two_models_in_memory(family: str, tmp_path: Path) -> None:
    """granitemoe divides its logits after the head; the batches have rows of several lengths."""
    folder, found = subject(family)
    apply(str(folder), plan(everywhere(family), gate_scale=1.0), found, tmp_path / "out")
    base, edited = load(folder), load(tmp_path / "out")
    layout = find_layout(base)
    shift.record(local(base, 2), TALKS, base, layout, tmp_path / "base.safetensors")
    made = shift.compare(local(edited, 3), TALKS, edited, layout, tmp_path / "base.safetensors")
    texts = local(base, 1).texts("retain", TALKS)
    for row, (ids, answers) in enumerate(zip(texts.ids, texts.said, strict=True)):
        with torch.no_grad():
            one, other = (each(input_ids=torch.tensor([ids])).logits[0, :-1].log_softmax(-1) for each in (base, edited))
        by_hand = torch.nn.functional.kl_div(other, one, reduction="none", log_target=True).sum(-1)
        assert made["kl"][row] == pytest.approx(float(by_hand[torch.tensor(answers[1:])].sum()), rel=1e-4, abs=1e-7)
        if layout is not None:
            pairs = zip(chosen(base, ids).flatten(0, 1), chosen(edited, ids).flatten(0, 1), strict=True)
            lost = [len(set(one.tolist()) - set(other.tolist())) / layout.top_k for one, other in pairs]
            assert made["rerouted"][row] == pytest.approx(sum(lost) / len(layout.moe_layers))
            assert made["read"][row] == len(ids)
    assert sum(made["kl"]) > 1e-4
    assert ("rerouted" in made) == (layout is not None)


def test_a_model_beside_itself_is_at_zero(tmp_path: Path) -> None:
    base = load(subject("mixtral")[0])
    layout = find_layout(base)
    shift.record(local(base, 5), TALKS, base, layout, tmp_path / "base.safetensors")
    made = shift.compare(local(base, 5), TALKS, base, layout, tmp_path / "base.safetensors")
    assert made["rerouted"] == [0.0] * len(TALKS)
    assert made["kl"] == pytest.approx([0.0] * len(TALKS), abs=1e-6)
    assert [path.name for path in tmp_path.iterdir()] == ["base.safetensors"]


def test_figures_per_token_weigh_rows_by_their_tokens() -> None:
    found = statistics.per_token([1.0, 9.0], [1.0, 3.0], 200, 0)
    assert (found.n, found.value, found.low, found.high) == (2, 2.5, 1.0, 3.0)
