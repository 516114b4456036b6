"""Tests of adapters that start from another one: the fields it decides, and the adapters that can't be continued."""

from typing import Any

import pytest
from pydantic import ValidationError

from llama_stack_provider_moe.control.server.service import PostTrainingService
from llama_stack_provider_moe.spec import DPOSpec, SFTSpec
from llama_stack_provider_moe.spec.server_config import ProviderConfig
from tests.control.server.test_allowed_paths import model_at
from tests.control.server.test_model_names import LORA, PAIRS, adapter_at, refusal, service, spec_of, trained
from tests.support.host_support import folder_of

__all__ = ["service"]  # a fixture


def test_fields_that_a_job_leaves_out_come_from_the_adapter(service: PostTrainingService) -> None:
    rules = [{"layers": "1", "experts": {"0-1": 4, "3": 2}}]
    lora = LORA | {"plan": "per_expert", "rules": rules, "layers": "0-1", "use_rslora": True, "router_rank": 2}
    job = trained(service, "adapter", adapter=lora, moe={"train_router": True})
    for recipe in ("sft", "dpo"):
        data = PAIRS if recipe == "dpo" else {}
        spec, notes = spec_of(service, recipe=recipe, adapter={"init_from": job, "dropout": 0.1}, **data)
        assert isinstance(spec, SFTSpec | DPOSpec)
        assert spec.adapter is not None
        source = folder_of(service, job).read_spec()
        assert isinstance(source, SFTSpec)
        expected = source.adapter.model_dump() | {"init_from": str(folder_of(service, job).adapter), "dropout": 0.1}
        assert spec.adapter.model_dump() == expected
        assert spec.moe.train_router is True
        assert notes == [f"adapter.init_from: {job!r} is {job}/adapter, in {folder_of(service, job).adapter}"]


@pytest.mark.parametrize(
    ("stated", "expected"),
    [
        (
            {"rank": 8},
            "adapter.rank: 8 is not valid; expected 4, as in the adapter that adapter.init_from names, or leave it out",
        ),
        ({"alpha": 4}, "adapter.alpha: 4.0 is not valid; expected 8.0"),
        (
            {"lora_attn_modules": ["q_proj"]},
            "adapter.lora_attn_modules: ['q_proj'] is not valid; expected ['q_proj', 'o",
        ),
        ({"apply_lora_to_output": True}, "adapter.apply_lora_to_output: True is not valid; expected False"),
        ({"use_rslora": True}, "adapter.use_rslora: True is not valid; expected False"),
        ({"layers": "0"}, "adapter.layers: '0' is not valid; expected None"),
        ({"plan": "trunk"}, "adapter.plan: 'trunk' is not valid; expected None"),
        ({"plan": "per_expert", "rules": [{"experts": {"0": 4}}]}, "adapter.rules: [ExpertRule("),
        ({"expert_modules": ["gate_up_proj"]}, "adapter.expert_modules: ['gate_up_proj'] is not valid"),
    ],
)
def test_fields_that_a_job_states_must_match_the_adapter(
    service: PostTrainingService, stated: dict[str, Any], expected: str
) -> None:
    job = trained(service, "adapter")
    assert expected in refusal(service, 400, adapter={"init_from": job, **stated})


def test_every_field_that_differs_is_named(service: PostTrainingService) -> None:
    job = trained(service, "adapter")
    told = refusal(service, 400, adapter={"init_from": job, "rank": 8, "alpha": 4}, moe={"train_router": True})
    assert [each.split(":")[0] for each in told.split("; ") if each.startswith(("adapter.", "moe."))] == [
        "adapter.rank", "adapter.alpha", "moe.train_router",
    ]  # fmt: skip


def test_equivalent_values_match(service: PostTrainingService) -> None:
    job = trained(service, "adapter")
    same = {"plan": "all_experts", "lora_attn_modules": ["output_proj", "q_proj"], "rank": 4, "alpha": 8.0}
    spec, _ = spec_of(service, adapter={"init_from": job, **same})
    assert spec.adapter.expert_modules == ["down_proj"]
    rules = [{"layers": "0-1", "experts": {"0-1": 4}}]
    other = trained(service, "adapter", adapter=LORA | {"plan": "per_expert", "rules": rules})
    split = [{"layers": "0,1", "experts": {"0": 4, "1": 4}, "lr_multiplier": 2.0}]
    spec, _ = spec_of(service, adapter={"init_from": other, "plan": "per_expert", "rules": split})
    assert spec.adapter.rules[0].lr_multiplier == 2


def test_the_base_must_be_the_same(service: PostTrainingService) -> None:
    job = trained(service, "adapter")
    own = model_at(service.config.models_dir / "another-base")
    told = refusal(service, 400, model="another-base", adapter={"init_from": job})
    assert told == (f"model: {str(own)!r} is not valid; expected 'owner/name', the base of the adapter in "
                    "adapter.init_from")  # fmt: skip
    sets = {"recipe": "routing_analysis", "data": {"sets": {"a": "good", "b": "good"}}}
    told = refusal(service, 400, model="another-base", adapter_folder=job, **sets)
    assert "expected 'owner/name', the base of the adapter in adapter_folder" in told


def test_an_adapter_that_peft_wrote(service: PostTrainingService) -> None:
    folder = adapter_at(service.config.models_dir / "theirs")
    spec, notes = spec_of(service, adapter={"init_from": "theirs"})
    assert spec.adapter.init_from == str(folder)
    assert (spec.adapter.rank, spec.adapter.alpha, spec.adapter.layers) == (4, 8, "0-1")
    assert (spec.adapter.lora_attn_modules, spec.adapter.apply_lora_to_mlp) == (["q_proj", "output_proj"], True)
    assert notes == []
    assert "adapter.rank: 16 is not valid; expected 4" in refusal(
        service, 400, adapter={"init_from": "theirs", "rank": 16}
    )
    weights = folder / "adapter_model.safetensors"
    blob = weights.rename(service.config.models_dir / "blob")
    weights.symlink_to(blob)
    assert spec_of(service, adapter={"init_from": "theirs"})[0].adapter.init_from == str(folder), (
        "the link stays in the root"
    )
    adapter_at(service.config.models_dir / "renamed", base_model_name_or_path="/home/ann/base")
    _, notes = spec_of(service, adapter={"init_from": "renamed"})
    assert notes == ["adapter.init_from: the adapter says that its base is '/home/ann/base'; the server did "
                     "not check whether that is the same model as 'owner/name'"]  # fmt: skip


def test_routers_alone(service: PostTrainingService) -> None:
    """What a job leaves out comes from the other job; PEFT's config does not say which parameter is a router's."""
    alone = {"lora_attn_modules": [], "apply_lora_to_mlp": False}
    job = trained(service, "adapter", adapter={"rank": 4, **alone}, moe={"train_router": True})
    spec, _ = spec_of(service, adapter={"init_from": job})
    assert (spec.adapter.is_for_routers_alone, spec.moe.train_router) == (True, True)
    gates = [f"model.layers.{layer}.mlp.gate.weight" for layer in (0, 1)]
    adapter_at(service.config.models_dir / "gates", target_modules=[], target_parameters=gates)
    body = {"adapter": {"init_from": "gates", "apply_lora_to_mlp": False}, "moe": {"train_router": True}}
    assert spec_of(service, **body)[0].adapter.is_for_routers_alone


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"peft_type": "IA3"}, "a folder with a LoRA adapter"),
        ({"r": "4"}, "a readable adapter_config.json; its r is '4'"),
        ({"rank_pattern": {"q_proj": 2}}, "an adapter without rank_pattern"),
        ({"modules_to_save": ["lm_head"]}, "an adapter without modules_to_save"),
        ({"bias": "all"}, "an adapter without bias"),
        ({"r": 5000}, "an adapter that a job on this server could have made"),
    ],
)
def test_adapters_that_can_not_be_continued(service: PostTrainingService, changes: Any, expected: str) -> None:
    name = f"odd-{len(list(service.config.models_dir.iterdir()))}"
    adapter_at(service.config.models_dir / name, **changes)
    assert expected in refusal(service, 400, adapter={"init_from": name})


def test_moved_biases_stay_with_their_adapter(service: PostTrainingService) -> None:
    job = trained(service, "adapter", moe={"moe_load_balancing": "aux_free"})
    (folder_of(service, job).adapter / "router_bias.safetensors").write_bytes(b"")
    assert "moved router biases" in refusal(service, 400, adapter={"init_from": job})
    assert spec_of(service, adapter={"init_from": job}, moe={"moe_load_balancing": "aux_free"})
    assert "moved router biases" in refusal(
        service, 400, recipe="dpo", adapter={"init_from": job}, moe={"moe_load_balancing": "aux_free"}
    )


def test_a_server_has_no_adapter_to_start_from_for_all_jobs() -> None:
    with pytest.raises(ValidationError, match=r"defaults\.adapter\s+Value error, init_from: fits one base model only"):
        ProviderConfig.model_validate({"defaults": {"adapter": {"init_from": "x"}}})


def test_unsloth_starts_no_adapter_from_another(service: PostTrainingService) -> None:
    job = trained(service, "adapter")
    assert "adapter.init_from" in refusal(service, 400, loader="unsloth", adapter={"init_from": job})


def test_a_breakers_adapter_names_its_layers(service: PostTrainingService) -> None:
    breaker = {"recipe": "circuit_breaker", "circuit_breaker": {"retain": {"dataset_id": "good"}}}
    job = trained(service, "adapter", **breaker)
    assert spec_of(service, adapter={"init_from": job})[0].adapter.layers == "0-1"
    assert spec_of(service, adapter={"init_from": trained(service, "adapter")}, **breaker)[0].adapter.layers == "0-1"
    assert "layers" not in LORA, "otherwise the test derives nothing"
