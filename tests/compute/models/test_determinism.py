"""Methods with a reference: no module uses random numbers in a training pass, or the job is refused."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from llama_stack_provider_moe.compute.models.determinism import require_determinism, without_dropout
from llama_stack_provider_moe.compute.runtime.context import NoEvents, Session
from llama_stack_provider_moe.compute.worker.main import COMPLETED
from llama_stack_provider_moe.errors import ModelError
from llama_stack_provider_moe.jobdir.folder import JobFolder
from llama_stack_provider_moe.spec import JOB_SPEC
from tests.support import tiny_models
from tests.support.training_support import Run, Workshop, dpo_rows, sft_rows, workshop

__all__ = ["workshop"]

NOISY = {"router_jitter_noise": 0.4, "input_jitter_noise": 0.1}
LN_2 = 0.6931472


@pytest.fixture
def session(tmp_path: Any) -> Session[Any]:
    body = {"recipe": "dpo", "job_uuid": "one", "model": "owner/name", "data": {"dataset_id": "rows"}}
    return Session(JOB_SPEC.validate_python(body), JobFolder(tmp_path), NoEvents())


def logits(model: nn.Module, seed: int) -> Tensor:
    torch.manual_seed(seed)
    with torch.no_grad():
        found: Tensor = model(torch.arange(5, 45).unsqueeze(0), use_cache=False).logits
    return found


def test_phi_moe_compares_like_with_like(workshop: Workshop) -> None:
    """Its first DPO loss is ln 2 with no margin, and a breaker's first cosines are 1, despite its random routers."""
    model = workshop.model("phimoe", **NOISY)
    dpo = workshop.run("dpo", model, dpo_rows(8), dpo_rows(2, 50), options={"precompute_ref_log_probs": False})
    assert dpo.exit_code == COMPLETED, dpo.reason
    assert dpo.steps("preference_loss")[0] == pytest.approx(LN_2, abs=1e-6)
    assert dpo.steps("rewards/margins")[0] == pytest.approx(0, abs=1e-6)
    breaker = workshop.run("circuit_breaker", model, sft_rows(8))
    assert breaker.exit_code == COMPLETED, breaker.reason
    assert breaker.steps("reroute_loss")[0] == pytest.approx(1, abs=1e-5)
    assert breaker.steps("retain_loss")[0] == pytest.approx(0, abs=1e-5)
    for run in (dpo, breaker):
        held = run.resolved["held_in_evaluation_mode"]
        assert [name.rpartition(".")[2] for name in held].count("router") == 2, held
        (told,) = [event.text for event in run.events("message") if "use random numbers" in event.text]
        assert "PhimoeTopKRouter" in told


def test_phi_moe_still_samples_experts_in_sft(workshop: Workshop) -> None:
    """SFT compares with no reference, so the model trains in its own way."""
    model = tiny_models.model("phimoe", **NOISY).train()
    assert not torch.equal(logits(model, 1), logits(model, 2))
    assert workshop.run("sft", "phimoe", sft_rows(8)).exit_code == COMPLETED


@pytest.mark.parametrize("family", [*tiny_models.FAMILIES])
def test_two_passes_of_every_family_are_equal(session: Session[Any], family: str) -> None:
    model = tiny_models.model(family, attention_dropout=0.3)
    without_dropout(model)
    before = torch.get_rng_state()
    held = require_determinism(session, model)
    assert torch.equal(torch.get_rng_state(), before)
    assert not model.training
    assert bool(held) == (family == "phimoe")
    model.train()
    assert torch.equal(logits(model, 1), logits(model, 2))


def test_noise_on_router_inputs_is_turned_off_too(session: Session[Any]) -> None:
    """MiniMax, a family without a layout here: found by its random numbers, not by its name."""
    config = AutoConfig.for_model(
        "minimax", vocab_size=384, hidden_size=32, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, head_dim=8, block_size=16, router_jitter_noise=0.3,
        initializer_range=0.1,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    model.train()
    assert not torch.equal(logits(model, 1), logits(model, 2))
    held = require_determinism(session, model)
    assert held
    assert torch.equal(logits(model, 1), logits(model, 2))
    model.eval()
    still = logits(model, 1)
    model.train()
    assert torch.equal(logits(model, 2), still)


def test_modules_inside_a_random_one_keep_their_mode(session: Session[Any]) -> None:
    model = tiny_models.model("phimoe", **NOISY)
    held = require_determinism(session, model)
    model.train()
    assert all(not model.get_submodule(name).training for name in held)
    kept = {name for name, module in model.named_modules() if not module.training}
    assert kept == set(held)


@contextmanager
def drawing(model: Any) -> Iterator[None]:
    """Noise that no mode turns off."""
    handle = model.model.norm.register_forward_hook(lambda *found: found[2] + 0.1 * torch.rand_like(found[2]))
    yield
    handle.remove()


def test_noise_that_cannot_be_turned_off_is_refused(session: Session[Any]) -> None:
    model = tiny_models.model("llama")
    with drawing(model), pytest.raises(ModelError, match="two passes of LlamaForCausalLM in training mode") as refused:
        require_determinism(session, model)
    assert "recipe 'dpo' compares a model with its reference" in str(refused.value)


def test_attention_dropout_is_off_in_preference_jobs(workshop: Workshop) -> None:
    """The attention module keeps it as a plain number, which TRL's function does not change."""
    model = workshop.model("llama", attention_dropout=0.5)
    run: Run = workshop.run("dpo", model, dpo_rows(8), options={"precompute_ref_log_probs": False})
    assert run.exit_code == COMPLETED, run.reason
    assert run.steps("preference_loss")[0] == pytest.approx(LN_2, abs=1e-6)
