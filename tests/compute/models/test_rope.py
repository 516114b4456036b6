"""`options.rope_scaling`: the loaded model computes what its saved config says, with every door that reads it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from llama_stack_provider_moe.compute.data.positions import by_config, positions_of
from llama_stack_provider_moe.compute.export.merge import merge
from llama_stack_provider_moe.compute.models.rope import (
    as_shipped,
    extend,
    extend_for,
    extension,
    extension_of,
    scaled_config,
    write_beside,
)
from llama_stack_provider_moe.compute.moe.layout import text_config
from llama_stack_provider_moe.compute.train.by_position import edges, in_buckets
from llama_stack_provider_moe.errors import ModelError
from llama_stack_provider_moe.spec.options import ROPE_FILE, RopeScaling
from tests.support import tiny_models
from tests.support.export_support import EVERYTHING, adapted

YARN, LINEAR = RopeScaling(type="yarn", factor=4), RopeScaling(type="linear", factor=4)
IDS = torch.randint(3, 300, (2, 24), generator=torch.Generator().manual_seed(5))
# Those whose rotary embeddings are of several kinds, scaled already, or none at all; found by the refusals below.
REFUSED = {
    "gpt_oss": "which scales its rotary embeddings already (rope_type 'yarn')",
    "granitemoehybrid": "whose rotary embeddings do not follow the config's rope_parameters (none found)",
    "phimoe": "whose config transformers refuses then: ",
}


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(IDS).logits
    return found


def extended(model: Any, asked: RopeScaling) -> Any:
    extend(model, extension(text_config(model), asked))
    return model


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_every_family_scales_or_is_refused_by_name(family: str, tmp_path: Path) -> None:
    """A model scaled in memory computes what plain transformers makes of its saved config, or nothing has changed."""
    model = tiny_models.model(family).eval()
    before = logits(model)
    if family in REFUSED:
        with pytest.raises(ModelError, match=r"options\.rope_scaling: is not valid for this ") as caught:
            extended(model, YARN)
        assert text_config(model).model_type in str(caught.value)
        assert REFUSED[family] in str(caught.value)
        assert torch.equal(logits(model), before)
        return
    extended(model, YARN)
    scaled = logits(model)
    assert (scaled - before).abs().max() > 1e-6
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(again), scaled)
    with as_shipped(model):
        assert torch.equal(logits(model), before)
    assert torch.equal(logits(model), scaled)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "llama"])
def test_linear_divides_positions(family: str) -> None:
    """arXiv 2306.15595: position m of the scaled model is position m / factor of the model as it came."""
    model = extended(tiny_models.model(family).eval(), LINEAR)
    base = tiny_models.model(family).eval()
    positions = torch.arange(IDS.shape[1]).expand_as(IDS)
    with torch.no_grad():
        scaled = model(IDS, position_ids=4 * positions).logits
    assert torch.allclose(scaled, logits(base), atol=1e-5)


def test_yarn_keeps_high_frequencies_and_interpolates_low_ones() -> None:
    """arXiv 2309.00071, eq. 23: beyond beta_fast = 32 turns a frequency stays, below beta_slow = 1 it is divided."""
    base = tiny_models.model("llama", head_dim=64, max_position_embeddings=1024)
    before = base.model.rotary_emb.inv_freq.clone()
    extended(base, YARN)
    after, turns = base.model.rotary_emb.inv_freq, 1024 * before / (2 * torch.pi)
    assert torch.allclose(after[turns > 40], before[turns > 40])
    assert torch.allclose(after[turns < 0.5], before[turns < 0.5] / 4)
    between = (turns < 20) & (turns > 2)
    assert bool(between.any())
    assert bool(((after < before) & (after > before / 4))[between].all())
    assert base.model.rotary_emb.attention_scaling == pytest.approx(0.1 * torch.log(torch.tensor(4.0)).item() + 1)


@pytest.mark.parametrize("asked", [YARN, LINEAR])
def test_doors_that_read_positions_know_it(asked: RopeScaling, tmp_path: Path) -> None:
    config = AutoConfig.from_pretrained(tiny_models.build("mixtral", tmp_path / "base"))
    before, after = by_config(config), by_config(scaled_config(config, asked))
    assert before is not None
    assert after is not None
    assert after.most == 4 * before.most
    loaded = positions_of(extended(tiny_models.model("mixtral"), asked))
    assert loaded is not None
    assert loaded.most == after.most
    with pytest.raises(ModelError, match=f"already .rope_type '{asked.type}'"):
        extension(scaled_config(config, asked), asked)


def test_layers_of_several_kinds_are_refused() -> None:
    config = AutoConfig.for_model("gemma3_text")
    with pytest.raises(ModelError, match=r"gemma3_text model, whose layers have rotary embeddings of several kinds"):
        extension(config, YARN)


def test_an_adapter_brings_the_context_of_its_base(tmp_path: Path) -> None:
    base = tiny_models.build("mixtral", tmp_path / "base")
    adapter = adapted(base, tmp_path / "adapter", EVERYTHING)
    write_beside(extended(AutoModelForCausalLM.from_pretrained(base), YARN), adapter)
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    extend_for(model, adapter)
    expected = logits(PeftModel.from_pretrained(model, adapter).eval())
    assert extension_of(model) is not None
    merge(base, adapter, tmp_path / "merged")
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert (config["rope_parameters"]["rope_type"], config["rope_parameters"]["factor"]) == ("yarn", 4)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert torch.allclose(logits(plain), expected, atol=1e-5)
    other = tiny_models.model("mixtral", max_position_embeddings=512)
    with pytest.raises(ModelError, match=f"{ROPE_FILE} is of another model than this mixtral"):
        extend_for(other, adapter)
    (adapter / ROPE_FILE).write_text("{}")
    with pytest.raises(ModelError, match=f"{ROPE_FILE} can't be read"):
        merge(base, adapter, tmp_path / "again")


def test_buckets_of_positions() -> None:
    """Element n is of position n + 1: position 0 is predicted by nobody."""
    assert edges(8, 20) == [0, 2, 4, 8, 16, 32]
    sums = in_buckets(torch.arange(1.0, 20.0), [0, 2, 4, 8, 16, 32])  # row of 20 tokens; element of position p is p
    assert [(each.nll, each.tokens) for each in sums] == [(1, 1), (5, 2), (22, 4), (92, 8), (70, 4)]
    assert sums[0].perplexity == pytest.approx(2.718281828)
    assert in_buckets(torch.zeros(0), [0, 4])[0].perplexity is None
