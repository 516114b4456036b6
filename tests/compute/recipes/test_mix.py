"""Branch, train, mix as jobs: two branches of one model train on a domain each, are mixed, and the mix trains."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from llama_stack_provider_moe.compute.ablation.fingerprint import sha256
from llama_stack_provider_moe.compute.mixing.report import MixReport
from llama_stack_provider_moe.compute.models.upcycle import upcycle
from llama_stack_provider_moe.compute.worker.main import COMPLETED, FAILED
from llama_stack_provider_moe.control.server.service import PostTrainingService
from llama_stack_provider_moe.control.store.references import uses_of
from llama_stack_provider_moe.errors import Conflict, InvalidInput, NotFound
from llama_stack_provider_moe.jobdir import events
from llama_stack_provider_moe.jobdir.state import JobState
from llama_stack_provider_moe.spec import JobDefaults, MixSpec
from llama_stack_provider_moe.spec.mixing import MIX_FILE
from tests.compute.recipes.test_routing_analysis import GARDEN, SUMS, reason, run
from tests.support import tiny_models
from tests.support.host_support import Datasets, caller, folder_of, serving_in_process

ANSWERED = [{**row, "completion": f"It is {3 * at + 7}."} for at, row in enumerate(SUMS)]
TRAIN: dict[str, Any] = {
    "recipe": "sft",
    "adapter": None,
    "training": {"dtype": "fp32", "n_epochs": 4, "batch_size": 4},
    "optimizer": {"lr": 3e-3},
    "options": {"validation_split": 0, "max_length": 64},
}
MIX: dict[str, Any] = {
    "recipe": "mix",
    "model": "llama",
    "method": "btx",
    "branches": [
        {"name": "garden", "model": "branch-garden", "weight": 3},
        {"name": "sums", "model": "branch-sums/model"},
    ],
}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PostTrainingService]:
    datasets = Datasets()
    datasets.rows |= {"garden": GARDEN, "sums": ANSWERED, "both": [*GARDEN, *ANSWERED]}
    with serving_in_process(tmp_path_factory.mktemp("mix"), datasets) as made:
        llama = tiny_models.build("llama", made.config.models_dir / "llama", rms_norm_eps=1e-3)
        tiny_models.build("llama", made.config.models_dir / "other", seed=9, rms_norm_eps=1e-3)
        upcycle(llama, made.config.models_dir / "pair", experts=2)
        yield made


def done(service: PostTrainingService, body: dict[str, Any]) -> str:
    with caller("ann"):
        job_id, code = run(service, body)
    assert code == COMPLETED, reason(folder_of(service, job_id))
    return job_id


@pytest.fixture(scope="module")
def branches(service: PostTrainingService) -> list[str]:
    return [
        done(service, TRAIN | {"model": "llama", "data": {"dataset_id": name}, "job_uuid": f"branch-{name}"})
        for name in ("garden", "sums")
    ]


@pytest.fixture(scope="module")
def mixed(service: PostTrainingService, branches: list[str]) -> str:
    return done(service, MIX | {"job_uuid": "mixed"})


def losses(service: PostTrainingService, job_id: str) -> list[float]:
    found = events.read(folder_of(service, job_id).events).events
    return [event.metrics["loss"] for event in found if event.type == "step" and "loss" in event.metrics]


def test_a_mix_says_what_each_expert_stands_for(service: PostTrainingService, branches: list[str], mixed: str) -> None:
    folder = folder_of(service, mixed)
    report = MixReport.model_validate_json((folder.model / MIX_FILE).read_bytes())
    base = str(service.config.models_dir / "llama")
    for name, expert, job in zip(("garden", "sums"), report.experts, branches, strict=True):
        assert (expert.name, expert.job, expert.base, expert.trained_on) == (name, job, base, name)
        assert expert.dataset_sha256 == sha256(folder_of(service, job).rows("train"))
        assert 0.9 < expert.cosine_to_base < 1
        assert expert.moved_experts is not None
        assert expert.moved_experts > 0.001
    assert [each.weight for each in report.experts] == [0.75, 0.25]
    spec = json.loads(folder.spec.read_text())
    assert spec["resources"]["gpus"] == 0
    assert [each["model"] for each in spec["branches"]] == [str(folder_of(service, job).model) for job in branches]
    uses = uses_of(folder.read_spec(), service.config.jobs_dir)
    assert (uses.always, uses.to_complete) == ((), ("branch-garden", "branch-sums"))
    with caller("ann"):
        artifacts = asyncio.run(service.artifacts(mixed)).checkpoints
        again = asyncio.run(service.validate(spec | {"job_uuid": None})).spec
    assert [(each.kind, each.identifier) for each in artifacts] == [("model", "mixed/model")]
    assert again | {"job_uuid": mixed} == spec


def test_the_mix_trains_its_routers_and_its_loss_falls(service: PostTrainingService, mixed: str) -> None:
    adapter = {"plan": "trunk", "rank": 8, "lora_attn_modules": ["q_proj"]}
    trained = done(service, TRAIN | {
        "model": mixed, "data": {"dataset_id": "both"}, "adapter": adapter, "moe": {"train_router": True},
        "training": {"dtype": "fp32", "n_epochs": 6, "batch_size": 4}, "optimizer": {"lr": 1e-2},
    })  # fmt: skip
    tensors = load_file(folder_of(service, trained).adapter / "adapter_model.safetensors")
    routers = [tensor for name, tensor in tensors.items() if "gate" in name and "lora_B" in name]
    assert routers
    assert all(tensor.abs().max() > 0 for tensor in routers), "every router moved"
    assert not [name for name in tensors if "experts" in name]
    found = losses(service, trained)
    epochs = [sum(found[at : at + 5]) / 5 for at in (0, 25)]  # of 17 rows, 4 in a step
    assert epochs[1] < 0.95 * epochs[0]


@pytest.mark.wide
def test_an_expert_is_left_out_again(service: PostTrainingService, mixed: str) -> None:
    """BAR: each branch trains expert 1 of a pair by LoRA; the anchor stays. A left-out branch need not exist."""
    for name in ("garden", "sums"):
        adapter = {"plan": "per_expert", "rules": [{"experts": {"1": 8}}], "lora_attn_modules": ["v_proj"], "rank": 8}
        body = TRAIN | {"model": "pair", "data": {"dataset_id": name}, "adapter": adapter, "job_uuid": f"pair-{name}"}
        done(service, body | {"moe": {"train_router": True}})
        done(service, {"recipe": "export", "of": f"pair-{name}", "export": {"merged": True}})
    named = [{"name": name, "model": f"pair-{name}/merged"} for name in ("garden", "sums")]
    plan = {"recipe": "mix", "model": "pair", "method": "bar", "branches": [*named, {"name": "gone", "model": "gone"}]}
    both = done(service, plan | {"leave_out": ["gone"], "top_k": 3})
    report = MixReport.model_validate_json((folder_of(service, both).model / MIX_FILE).read_bytes())
    assert [(each.name, each.job) for each in report.experts] == [
        ("anchor", None), ("garden", "pair-garden"), ("sums", "pair-sums")]  # fmt: skip
    assert (report.left_out, report.router) == (["gone"], "branches")
    one = done(service, plan | {"leave_out": ["gone", "garden"]})
    with caller("ann"):
        spec = asyncio.run(service.validate(TRAIN | {"model": "pair-sums/merged", "data": {"dataset_id": "both"}})).spec
    folders = (Path(str(spec["model"])), folder_of(service, one).model)
    old, new = (load_file(folder / "model.safetensors") for folder in folders)
    assert old.keys() == new.keys()
    assert all(torch.allclose(old[name], new[name], atol=1e-6) for name in old), "the only branch is the mix"


def test_what_the_server_refuses(service: PostTrainingService, branches: list[str], mixed: str) -> None:
    def refusal(changes: dict[str, Any], kind: type[Exception] = InvalidInput) -> str:
        with caller("ann"), pytest.raises(kind) as caught:
            asyncio.run(service.validate(MIX | changes))
        return str(caught.value)

    garden, sums = MIX["branches"]
    assert "branches.1.model: there is" not in refusal({"branches": [garden, sums | {"model": "/etc"}]}, Exception)
    assert "job 'branch-sums' has no artifact 'merged'" in refusal(
        {"branches": [garden, sums | {"model": "branch-sums/merged"}]}, NotFound
    )
    with caller("ann"):
        waiting = asyncio.run(service.submit(TRAIN | {"model": "llama", "data": {"dataset_id": "sums"}})).job_uuid
    later = {"branches": [garden, sums | {"model": waiting}]}
    with caller("ann"):
        assert any("this job waits for it" in note for note in asyncio.run(service.validate(MIX | later)).notes)
        asyncio.run(service.cancel(waiting))
    assert f"branches.1.model: job '{waiting}' is cancelled" in refusal(later, Conflict)
    with caller("eve"):
        seen = asyncio.run(service.validate(MIX | {"model": "llama"})).spec["branches"]
    assert seen[0]["model"] == "branch-garden", "to others, the name of a job is a hub id"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"model": "other"},
            "expected a model that was trained from `model`; job 'branch-garden' trained it from 'llama'",
        ),
        ({"model": "pair"}, "model: a 'mixtral' model can't be upcycled; expected llama, mistral, qwen3"),
        ({"method": "bar", "router": "random"}, "a model of type mixtral, qwen3_moe, which `moe-train upcycle` makes"),
    ],
)
def test_branches_that_do_not_fit_fail_the_job(
    service: PostTrainingService,
    branches: list[str],
    changes: dict[str, Any],
    words: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with caller("ann"):
        job_id, code = run(service, MIX | changes)
    assert code == FAILED
    assert words in reason(folder_of(service, job_id))
    told = capsys.readouterr().err
    assert f"error: {reason(folder_of(service, job_id))}" in told
    assert "Traceback" not in told
    assert not folder_of(service, job_id).model.exists()


def test_routers_that_begin_with_domains_tell_them_apart(service: PostTrainingService, branches: list[str]) -> None:
    named = [{**each, "dataset_id": each["name"]} for each in MIX["branches"]]
    body = MIX | {"branches": named, "router": "domains", "top_k": 1, "training": {"dtype": "fp32"}}
    mixed = done(service, body)
    assert json.loads(folder_of(service, mixed).spec.read_text())["resources"]["gpus"] is None
    analysis = {
        "recipe": "routing_analysis",
        "data": {"sets": {"garden": "garden", "sums": "sums"}},
        "analysis": {"resamples": 100, "permutations": 20},
        "training": {"dtype": "fp32"},
    }
    found = {}
    for name, model in (("domains", mixed), ("random", done(service, MIX | {"top_k": 1}))):
        job = done(service, analysis | {"model": model})
        found[name] = json.loads((folder_of(service, job).routing / "routing.json").read_text())["layers"]
    for domains, random in zip(found["domains"], found["random"], strict=True):
        assert domains["rate"]["garden"][0] > domains["rate"]["sums"][0]
        assert domains["rate"]["sums"][1] > domains["rate"]["garden"][1]
        assert domains["mutual_information"] > random["mutual_information"]


def test_a_branch_may_be_trained_in_stages(service: PostTrainingService, branches: list[str]) -> None:
    """The second job starts from the result of the first, which started from the base."""
    body = TRAIN | {"model": branches[0], "data": {"dataset_id": "both"}, "training": {"dtype": "fp32", "n_epochs": 1}}
    later = done(service, body)
    garden, sums = MIX["branches"]
    mixed = done(service, MIX | {"branches": [garden | {"model": later}, sums]})
    first = MixReport.model_validate_json((folder_of(service, mixed).model / MIX_FILE).read_bytes()).experts[0]
    base = str(service.config.models_dir / "llama")
    assert (first.job, first.trained_on, first.base) == (later, "both", base)


def test_a_status_says_that_it_mixes(service: PostTrainingService, branches: list[str]) -> None:
    with caller("ann"):
        job_id = asyncio.run(service.submit(MIX)).job_uuid
    assert service.store.claim("me/1/1/1/1") is not None
    log = events.EventLog(folder_of(service, job_id).events)
    log.append(events.Step(step=1, max_steps=9, epoch=0.1, metrics={}))
    log.close()
    with caller("ann"):
        told = asyncio.run(service.status(job_id)).resources_allocated
    assert told is not None
    assert told["stage"] == "mixing"
    service.store.move(job_id, JobState.FAILED, reason="over")


def test_defaults_of_a_server_do_not_disturb_it() -> None:
    defaults = JobDefaults.model_validate(
        {"training": {"dtype": "fp32", "n_epochs": 2}, "optimizer": {"lr": 0.1}, "options": {"max_length": 99}}
    )
    filled = defaults.under(MIX)
    assert filled == MIX | {"training": {"dtype": "fp32"}, "options": {"max_length": 99}}
    assert MixSpec.model_validate(filled).training.dtype == "fp32"
