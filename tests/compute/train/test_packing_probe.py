"""In every family, packing is allowed if the loaded model keeps two packed rows apart."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from llama_stack_provider_moe.compute.train.packing_probe import TOLERANCE, measure, same_scale
from llama_stack_provider_moe.compute.worker.main import COMPLETED, FAILED
from tests.support import tiny_models
from tests.support.training_support import Workshop, sft_rows, workshop

__all__ = ["workshop"]

LEAKS = ("gpt_oss",)
# Without the packages with their kernels, transformers can't run packed rows through these convolutions.
CONVOLUTIONS = ("granitemoehybrid", "qwen3_next", "qwen3_5_moe", "lfm2_moe")
APART = tuple(family for family in tiny_models.FAMILIES if family not in (*LEAKS, *CONVOLUTIONS))
NO_AUX: dict[str, Any] = {"router_aux_loss_coef": 0.0}


@pytest.mark.parametrize("family", LEAKS)
def test_a_family_whose_rows_see_each_other_is_refused_before_it_trains(workshop: Workshop, family: str) -> None:
    run = workshop.run("sft", family, data={"packed": True})
    assert run.exit_code == FAILED
    assert run.reason.startswith(
        "data.packed: true is not valid for this model: a row sees the row packed before it. The logits of a row "
        "after another differ by "
    )
    assert "expected at most 0.001 (layers: full_attention, sliding_attention; attention: " in run.reason
    assert not run.events("step")
    again = workshop.again(run)
    assert again.exit_code == FAILED, "a second start measures again"
    assert workshop.run("sft", family).exit_code == COMPLETED, "it trains unpacked rows"


@pytest.mark.parametrize("family", CONVOLUTIONS)
def test_state_along_the_sequence_is_refused_in_the_models_own_words(workshop: Workshop, family: str) -> None:
    run = workshop.run("sft", family, data={"packed": True})
    assert run.exit_code == FAILED
    assert run.reason.startswith("data.packed: true is not valid for this model: ")
    assert "packed" in run.reason.removeprefix("data.packed: true is not valid")
    assert not run.events("step")


@pytest.mark.parametrize("family", APART)
def test_what_is_admitted_learns_from_packed_rows_what_it_learns_from_padded_ones(
    workshop: Workshop, family: str
) -> None:
    """The loss of one step over all rows, computed from each row alone."""
    rows = sft_rows(6)
    run = workshop.run("sft", family, rows, data={"packed": True}, options={"max_length": 128})
    assert run.exit_code == COMPLETED, run.reason
    assert run.resolved["train_sequences"] < 6
    assert run.resolved["packed_rows_differ_by"]["second"] < 1e-5
    if family == "phimoe":  # its routers draw at random while it trains
        return
    padded = workshop.run("sft", family, rows, options={"max_length": 128})
    assert run.steps("ce")[0] == pytest.approx(padded.steps("ce")[0], rel=1e-4)


@pytest.mark.parametrize("family", [*APART, *LEAKS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_tolerance_tells_one_from_the_other(family: str, dtype: torch.dtype) -> None:
    found = measure(tiny_models.model(family).to(dtype), tiny_models.VOCAB_SIZE)
    # Rounding in bf16 depends on the processor: 0.043 for phimoe with AVX-512's bf16.
    assert found.first < TOLERANCE[dtype] / 2
    assert found.second < TOLERANCE[dtype] / 3 if family in APART else found.second > 3 * TOLERANCE[dtype]


def test_the_probe_sees_what_an_own_comparison_sees(workshop: Workshop) -> None:
    """gpt-oss: one row after another, separated by position ids, compared with the row alone."""
    model = AutoModelForCausalLM.from_pretrained(workshop.model("gpt_oss")).eval()
    tokenizer = AutoTokenizer.from_pretrained(workshop.model("gpt_oss"))
    one, other = (tokenizer(text, return_tensors="pt")["input_ids"] for text in ("A few experts.", "What of spring?"))
    places = torch.cat([torch.arange(one.shape[1]), torch.arange(other.shape[1])]).unsqueeze(0)

    def run(ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
        with torch.no_grad():
            found: Tensor = model(ids, position_ids=position_ids, use_cache=False).logits[0]
        return found

    behind = run(torch.cat([one, other], dim=1), places)[one.shape[1] :]
    assert (behind - run(other)).abs().max() > 0.5


def test_the_probe_leaves_no_trace() -> None:
    model = tiny_models.model("mixtral", output_router_logits=True).train()
    state = torch.get_rng_state()
    measure(model, tiny_models.VOCAB_SIZE)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert model.config.output_router_logits is True


def test_a_scale_that_is_counted_from_the_sequences_start(workshop: Workshop) -> None:
    """Llama 4's layers without RoPE: two short rows are below the scale's first step, a larger micro-batch is not."""
    scaled = {"no_rope_layers": [0, 1], "floor_scale": 128}
    model = workshop.model("llama4_text", **scaled)
    assert same_scale(tiny_models.config("llama4_text", **scaled)) == 127
    assert same_scale(tiny_models.config("llama4_text")) is None
    training = {"batch_size": 2}
    run = workshop.run("sft", model, data={"packed": True}, options={"max_length": 96}, training=training)
    assert run.exit_code == FAILED
    assert "its layers without RoPE scale attention by the position in the packed sequence" in run.reason
    assert "from 128 tokens on, and a micro-batch may have 192; expected at most 127" in run.reason
    leaks = measure(tiny_models.model("llama4_text", no_rope_layers=[0, 1], floor_scale=4), tiny_models.VOCAB_SIZE)
    assert leaks.second > 0.01, "as it would be"
    chunks = measure(tiny_models.model("llama4_text", attention_chunk_size=8), tiny_models.VOCAB_SIZE)
    assert chunks.second < 1e-5, "chunks are counted within each row"
