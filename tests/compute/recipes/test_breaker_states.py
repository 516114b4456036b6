"""`retain_layers: all` uses the hidden states that the official circuit-breaker code uses."""

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from llama_stack_provider_moe.compute.models.hidden_states import EMBEDDINGS, Blocks
from llama_stack_provider_moe.compute.worker.main import COMPLETED
from tests.compute.recipes.test_circuit_breaker import FAMILIES, IDS, MASK, breaker, passes
from tests.support import official_breaker, tiny_models
from tests.support.training_support import Workshop, kept_rows, workshop

__all__ = ["workshop"]


@pytest.mark.parametrize("family", ["mixtral", "granitemoe", "llama4_text"])
def test_retain_layers_all_are_the_official_hidden_states(workshop: Workshop, family: str) -> None:
    """The held-out retain distance against the official formula over transformers' `hidden_states`, a row at a time."""
    run = breaker(workshop, family, training={"n_epochs": 2}, circuit_breaker={"retain_layers": "all"})
    assert run.exit_code == COMPLETED, run.reason
    folder = workshop.model(family, num_hidden_layers=4)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), run.folder.adapter).eval()
    total, blocks_alone, tokens = 0.0, 0.0, 0
    for row in kept_rows(3, first=100):
        text = tokenizer.apply_chat_template(row["messages"], tokenize=False)
        ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
        with torch.no_grad():
            mine = tuned(ids, output_hidden_states=True).hidden_states
            with tuned.disable_adapter():
                base = tuned(ids, output_hidden_states=True).hidden_states
        assert len(mine) == 5
        count = ids.shape[1]
        total += count * official_breaker.retain_loss(mine, base, torch.ones_like(ids)).item()
        blocks_alone += count * official_breaker.retain_loss(mine[1:4], base[1:4], torch.ones_like(ids)).item()
        tokens += count
    assert run.held_out("distance/retain")[-1] == pytest.approx(total / tokens, rel=1e-4)
    assert abs(blocks_alone - total) > 0.05 * total, "a difference would show"


@pytest.mark.parametrize("family", FAMILIES)
def test_states_beside_the_blocks(family: str) -> None:
    """The embeddings and the final norm's output are the first and the last of `hidden_states`; nothing else runs."""
    model = tiny_models.model(family, num_hidden_layers=4)
    blocks = Blocks(model)
    with torch.no_grad():
        with passes(model) as ran:
            states = blocks.states([EMBEDDINGS, 1, blocks.final], IDS, MASK, whole=True)
        assert ran == ["0", "1", "2", "3"]
        hidden = model(IDS, attention_mask=MASK, output_hidden_states=True).hidden_states
    assert sorted(states) == [-1, 1, 4]
    assert all(torch.equal(state, hidden[min(block + 1, 4)]) for block, state in states.items())
