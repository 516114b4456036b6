"""The loaded part of a model computes what the whole model does up to there."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from llama_stack_provider_moe.compute.probing.trunk import load_trunk
from llama_stack_provider_moe.errors import InvalidInput
from tests.support import tiny_models

IDS = torch.tensor([[5, 9, 77, 130, 31, 200], [8, 8, 8, 0, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]])


def whole_states(model: torch.nn.Module) -> tuple[torch.Tensor, ...]:
    with torch.no_grad():
        found: tuple[torch.Tensor, ...] = model(
            input_ids=IDS, attention_mask=MASK, output_hidden_states=True, use_cache=False
        ).hidden_states
    return found


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_the_first_blocks_alone_give_the_whole_models_states(family: str, tmp_path: Path) -> None:
    folder = tiny_models.build(family, tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    trunk = load_trunk(str(folder), None, "fp32", None, highest=0)
    assert len(trunk.blocks.layers) == 1 < trunk.base.layers
    assert not any("lm_head" in name for name, _ in trunk.blocks.decoder.named_parameters())
    with torch.no_grad():
        state = trunk.blocks.states([0], IDS, MASK)[0]
    wanted = whole_states(model)[1].flatten(2)
    torch.testing.assert_close(state[MASK.bool()], wanted[MASK.bool()], rtol=1e-5, atol=1e-5)


def test_an_adapter_is_on_it(tmp_path: Path) -> None:
    folder = tiny_models.build("granitemoe", tmp_path / "model")
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    adapted = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    adapted.save_pretrained(str(tmp_path / "adapter"))
    wanted = whole_states(adapted.eval())[1]
    plain = load_trunk(str(folder), None, "fp32", None, highest=0)
    trunk = load_trunk(str(folder), str(tmp_path / "adapter"), "fp32", None, highest=0)
    with torch.no_grad():
        states = [each.blocks.states([0], IDS, MASK)[0] for each in (trunk, plain)]
    torch.testing.assert_close(states[0][MASK.bool()], wanted[MASK.bool()], rtol=1e-5, atol=1e-5)
    assert float((states[1] - wanted)[MASK.bool()].abs().max()) > 1e-3, "the adapter changes the state"
    assert (plain.base.adapter, plain.base.fingerprint) == (None, trunk.base.fingerprint)
    assert trunk.base.adapter is not None
    assert isinstance(adapted, PeftModel)


def test_a_block_that_the_model_lacks(tmp_path: Path) -> None:
    folder = tiny_models.build("granitemoe", tmp_path / "model")
    with pytest.raises(InvalidInput, match=r"probe\.layers: 2 is not valid; expected decoder blocks of .*: 0 to 1"):
        load_trunk(str(folder), None, "fp32", None, highest=2)
