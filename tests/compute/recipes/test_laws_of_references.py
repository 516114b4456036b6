"""DPO's reference: what it is, when it is computed, and that it equals the untrained policy. No step is trained."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from llama_stack_provider_moe.compute.moe.rates import Rates
from llama_stack_provider_moe.compute.planning.throughput import count_flops
from llama_stack_provider_moe.compute.recipes import dpo
from llama_stack_provider_moe.compute.train import reference
from llama_stack_provider_moe.ground import liveness
from llama_stack_provider_moe.spec import JOB_SPEC, DPOSpec
from tests.compute.recipes.test_laws_of_recipes import Maker, make
from tests.support import tiny_models
from tests.support.training_support import workshop

__all__ = ["make", "workshop"]


def dpo_spec(**blocks: Any) -> DPOSpec:
    body = {"recipe": "dpo", "job_uuid": "one", "model": "/models/one", "data": {"dataset_id": "pairs"}, "adapter": {}}
    spec = JOB_SPEC.validate_python(body | blocks)
    assert isinstance(spec, DPOSpec)
    return spec


@pytest.mark.parametrize(
    ("blocks", "ahead"),
    [
        ({}, False),
        ({"training": {"n_epochs": 2}}, True),
        ({"options": {"precompute_ref_log_probs": True}}, True),
        ({"training": {"n_epochs": 2}, "options": {"precompute_ref_log_probs": False}}, False),
        ({"moe": {"moe_load_balancing": "aux_free"}}, True),
        ({"moe": {"moe_load_balancing": "expert_choice"}, "training": {"n_epochs": 2}}, False),
        ({"resources": {"gpus": 2, "strategy": "fsdp"}, "training": {"n_epochs": 2}}, False),
    ],
)
def test_when_a_reference_is_computed_ahead(blocks: dict[str, Any], ahead: bool) -> None:
    """If an epoch repeats, unless the job decides, or one of the two would be wrong."""
    assert dpo.reference_ahead(dpo_spec(**blocks)) is ahead


def test_a_second_copy_runs_as_the_policy_does_and_stays(make: Maker) -> None:
    """For a model with its own dropout, whose config asks for router logits: the reference has neither."""
    made = make("dpo", "granitemoe", adapter=None, options={"precompute_ref_log_probs": False})
    policy, reference = made.trainer.model, made.trainer.ref_model
    assert reference is not policy
    assert not any(parameter.requires_grad for parameter in reference.parameters())
    assert all(parameter.requires_grad for parameter in policy.parameters())
    assert reference.config._experts_implementation == policy.config._experts_implementation
    assert reference.config.output_router_logits is False
    assert not made.trainer.args.disable_dropout
    assert made.run.resolved["reference"] == "a second copy"
    ids = torch.arange(3, 15).unsqueeze(0)
    with torch.no_grad():
        passes = [reference.train()(ids).logits for _ in range(2)]
        assert torch.equal(*passes)
        torch.testing.assert_close(policy.eval()(ids).logits, passes[0])


class Held:
    """Stands in for the experts that processes share, and records its calls."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, Any]] = []

    def set_aside(self, model: Any) -> None:
        assert not any(parameter.requires_grad for parameter in model.parameters()), (
            "frozen before its experts are set aside"
        )
        self.asked.append(("set_aside", model))

    def take(self, model: Any, rates: Rates) -> None:
        self.asked.append(("take", (model, rates)))


@pytest.mark.parametrize("strategy", ["fsdp", "ddp"])
def test_a_second_copy_is_shared_as_the_policy_is(make: Maker, monkeypatch: pytest.MonkeyPatch, strategy: str) -> None:
    """With FSDP its weights are loaded in parts; each process takes its part of shared experts."""
    made = make("dpo", "llama", adapter=None, options={"precompute_ref_log_probs": False})
    spec = made.session.spec
    spec = spec.model_copy(update={"resources": spec.resources.model_copy(update={"strategy": strategy})})
    loaded: list[tuple[str, Any]] = []

    def as_if(name: str) -> Any:
        def load(*arguments: Any) -> Any:
            loaded.append((name, arguments))
            return tiny_models.model("llama")

        return load

    for name in ("load_sharded", "load_model"):
        monkeypatch.setattr(reference, name, as_if(name))
    held = Held()
    copy = reference.load_reference(replace(made.session, spec=spec), replace(made.base, experts=held))
    ((name, (asked, config, *device)),) = loaded
    assert (name, device) == (("load_sharded", []) if strategy == "fsdp" else ("load_model", [made.base.device]))
    assert asked is spec
    assert config.to_dict() == made.base.model.config.from_pretrained(spec.model).to_dict()
    assert held.asked == [("set_aside", copy), ("take", (copy, Rates()))]


@pytest.mark.parametrize(
    ("blocks", "kind"),
    [
        ({}, "the adapter off"),
        ({"adapter": None, "training": {"n_epochs": 2}}, "the untrained model"),
    ],
)
def test_a_reference_that_is_no_copy(make: Maker, blocks: dict[str, Any], kind: str) -> None:
    made = make("dpo", beta=0.3, loss_type="ipo", **blocks)
    told = made.run.resolved
    assert (told["reference"], made.trainer.ref_model) == (kind, None)
    assert (told["loss_type"], told["beta"], told["held_in_evaluation_mode"]) == ("ipo", 0.3, [])
    assert told["reference_computed_ahead"] is made.trainer.precompute_ref_logps is (kind == "the untrained model")
    assert (made.trainer.loss_types, made.trainer.beta) == (["ipo"], 0.3)
    assert made.trainer.work == count_flops(
        made.trainer.model, made.trainer.layout, references=int("adapter" not in blocks)
    )


@pytest.mark.parametrize("adapter", [{"rank": 2}, None], ids=["lora", "whole"])
def test_a_reference_without_a_backbone_gives_what_the_untrained_policy_gives(
    make: Maker, adapter: dict[str, Any] | None
) -> None:
    """Llama 4: TRL's head finds no hidden states, neither ahead of training nor during it."""
    ahead = make("dpo", "llama4_text", adapter=adapter, options={"precompute_ref_log_probs": True}).trainer
    trainer = make("dpo", "llama4_text", adapter=adapter, options={"precompute_ref_log_probs": False}).trainer
    batch = trainer.data_collator([trainer.train_dataset[row] for row in range(4)])
    found = [trainer.compute_ref_log_probs(trainer.ref_model or trainer.model, batch)]
    found.append([torch.tensor(ahead.train_dataset[f"ref_{name}_logps"][:4]) for name in ("chosen", "rejected")])
    with torch.no_grad():
        log_probs = trainer.model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits.log_softmax(-1)
    by_token = log_probs[:, :-1].gather(-1, batch["input_ids"][:, 1:, None])[..., 0] * batch["completion_mask"][:, 1:]
    for chosen, rejected in found:
        torch.testing.assert_close(torch.cat([chosen, rejected]), by_token.sum(dim=1), rtol=1e-4, atol=1e-4)


def test_a_reference_computed_ahead_counts_its_batches(make: Maker) -> None:
    reports: list[liveness.Work] = []
    with liveness.reports_to(reports.append):
        make("dpo", "llama", training={"batch_size": 5}, options={"precompute_ref_log_probs": True})
    last = {work.stage: work for work in reports}
    for rows, batches in (("train", 4), ("eval", 1)):
        name = f"computing the reference's log-probabilities ({rows})"
        assert last[name] == liveness.Work(name, batches, batches, "batches")
