"""`loader: unsloth`: what the server refuses, which interpreter runs a job, and the error of a process without Unsloth.

None of it needs Unsloth; what does is in `test_unsloth_child`.
"""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llama_stack_provider_moe.compute.models.unsloth.entry import NOTICE
from llama_stack_provider_moe.compute.models.unsloth.files import as_peft_writes
from llama_stack_provider_moe.control.server.service import PostTrainingService
from llama_stack_provider_moe.control.store.store import JobStore
from llama_stack_provider_moe.control.supervisor.executors.local import LocalExecutor, training_command
from llama_stack_provider_moe.control.supervisor.supervisor import Supervisor
from llama_stack_provider_moe.errors import CheckpointError
from llama_stack_provider_moe.jobdir.folder import JobFolder
from llama_stack_provider_moe.spec import JOB_SPEC
from llama_stack_provider_moe.spec.server_config import ProviderConfig
from tests.support.host_support import BODY, Datasets, ask, serving_in_process
from tests.support.jobs_support import ended, tiny_interpreter
from tests.support.training_support import Workshop, workshop

__all__ = ["workshop"]

ADAPTED: dict[str, Any] = {
    "recipe": "sft", "model": "a/b", "loader": "unsloth", "data": {"dataset_id": "d"}, "adapter": {},
}  # fmt: skip
BREAKER = {"recipe": "circuit_breaker", "circuit_breaker": {"retain": {"dataset_id": "k"}}}
RULES = {"plan": "per_expert", "rules": [{"experts": {"0": 4}}]}


@pytest.mark.parametrize(
    ("blocks", "problem"),
    [
        ({"adapter": None}, "adapter null (all weights train)"),
        ({"adapter": RULES}, "adapter.plan 'per_expert'"),
        ({"adapter": {"alphas": {"attention": 8}}}, "adapter.alphas"),
        ({"adapter": {"use_dora": True}}, "adapter.use_dora true"),
        ({"adapter": {"apply_lora_to_output": True}}, "adapter.apply_lora_to_output true"),
        ({"adapter": {"quantize_base": True, "quantize_bits": 8}}, "adapter.quantize_bits 8"),
        ({"adapter": {"quantize_base": True, "quantize_scales": True}}, "adapter.quantize_scales true"),
        ({"resources": {"gpus": 2}}, "resources of more than one process"),
        ({"resources": {"gpus": 2, "strategy": "fsdp"}}, "resources of more than one process"),
        ({"resources": {"gpus": 0}}, "resources.gpus 0"),
        ({"data": {"dataset_id": "d", "packed": True}}, "data.packed true"),
        ({"options": {"deterministic": True}}, "options.deterministic true"),
        ({"options": {"save_merged": True}}, "options.save_merged true; merge on disk"),
        ({"eval": {"retain_dataset_id": "e"}}, "an eval block"),
        ({"export": {"merged": True}}, "an export block"),
        ({"moe": {"router_aux_loss_coef": 0.01}}, "moe.router_aux_loss_coef"),
        ({"moe": {"moe_load_balancing": "gshard"}}, "moe.moe_load_balancing"),
        ({"moe": {"experts_backend": "triton"}}, "moe.experts_backend"),
        ({"moe": {"enable_moe_optimizations": False}}, "moe.enable_moe_optimizations"),
        ({"moe": {"train_router": True}}, "moe.train_router"),
        ({**BREAKER, "circuit_breaker": {**BREAKER["circuit_breaker"], "variant": "repbend"}},  # type: ignore[dict-item]
         "circuit_breaker.variant 'repbend'"),
    ],
)  # fmt: skip
def test_settings_that_do_not_work_with_unsloth_are_refused(blocks: dict[str, Any], problem: str) -> None:
    plain = {**ADAPTED, **blocks, "loader": "hf"}
    JOB_SPEC.validate_python(plain)  # valid without Unsloth
    with pytest.raises(ValueError, match="loader: 'unsloth' is not valid with") as error:
        JOB_SPEC.validate_python({**plain, "loader": "unsloth"})
    assert problem in str(error.value)


@pytest.mark.parametrize(
    "blocks",
    [
        {},
        {"recipe": "dpo"},
        BREAKER,
        {"adapter": {"quantize_base": True, "plan": "all_experts", "lr_multipliers": {"experts": 0.5}}},
        {"moe": {"router_aux_loss_coef": 0, "train_router": False, "output_router_logits": False}},
        {"resources": {"gpus": 1}, "efficiency": {"enable_activation_checkpointing": True}},
    ],
)
def test_settings_that_work_with_unsloth_are_accepted(blocks: dict[str, Any]) -> None:
    assert JOB_SPEC.validate_python({**ADAPTED, **blocks}).loader == "unsloth"  # type: ignore[union-attr]


def test_recipes_that_train_nothing_have_no_loader() -> None:
    body = {"recipe": "export", "of": "job", "export": {"gguf": {}}, "loader": "unsloth"}
    with pytest.raises(ValueError, match="loader"):
        JOB_SPEC.validate_python(body)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PostTrainingService]:
    with serving_in_process(tmp_path_factory.mktemp("door"), Datasets()) as made:
        yield made


def test_a_server_without_its_environment_refuses_and_says_how_to_make_one(
    service: PostTrainingService, tmp_path: Path
) -> None:
    body = {**BODY, "loader": "unsloth", "adapter": {}}
    answer = ask(service, "POST", "/jobs/validate", json=body)
    assert answer.status_code == 400, answer.text
    for told in ("loader: 'unsloth' is not valid", "constraints-unsloth.txt", "`unsloth_python`"):
        assert told in answer.text
    with serving_in_process(tmp_path, unsloth_python="/opt/unsloth/bin/python") as other:
        answer = ask(other, "POST", "/jobs/validate", json=body)
        assert answer.status_code == 200, answer.text
        assert answer.json()["spec"]["loader"] == "unsloth"


def a_folder(folder: Path, **blocks: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    JobFolder(folder).spec.write_text(json.dumps({**ADAPTED, **blocks}))
    return folder


def test_each_loader_has_its_interpreter(tmp_path: Path) -> None:
    config = ProviderConfig(state_dir=tmp_path, training_python="/hf/python", unsloth_python="/unsloth/python")
    for loader, python in (("unsloth", "/unsloth/python"), ("hf", "/hf/python")):
        folder = a_folder(tmp_path / loader, loader=loader)
        assert training_command(config, folder) == [
            python, "-m", "llama_stack_provider_moe.compute.worker.main", str(folder),
        ]  # fmt: skip
    for text in ("", "{", "[]", '{"recipe": "export"}'):  # the training process reports the error
        JobFolder(folder).spec.write_text(text)
        assert training_command(config, folder)[0] == "/hf/python"


def test_a_job_is_never_forked_from_the_other_environments_forkserver(config: ProviderConfig, store: JobStore) -> None:
    """The forkserver has the modules of `training_python`; a job with Unsloth starts cold, without one."""

    def no_forkserver() -> Any:
        raise AssertionError("a forkserver was started for a job of another interpreter")

    config = config.model_copy(
        update={"unsloth_python": tiny_interpreter(config.state_dir), "training_python": "/no/such/python"}
    )
    folder = a_folder(config.jobs_dir / "cold")
    (folder / "child.json").write_text("{}")
    store.submit("cold", "ann", "sft", "a/b", str(folder), None)
    supervisor = Supervisor(store, config, LocalExecutor(config, start_forkserver=no_forkserver))
    assert supervisor.acquire()
    job = ended(store, supervisor, "cold")
    assert job.state.value == "completed", job


def test_a_setting_taken_away_fails_the_job_with_its_name(config: ProviderConfig, store: JobStore) -> None:
    folder = a_folder(config.jobs_dir / "late")
    store.submit("late", "ann", "sft", "a/b", str(folder), None)
    supervisor = Supervisor(store, config, LocalExecutor(config))
    assert supervisor.acquire()
    job = ended(store, supervisor, "late")
    assert job.state.value == "failed"
    assert "`unsloth_python`" in (job.reason or "")


def test_a_process_without_unsloth_says_which_interpreter_lacks_it(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("UNSLOTH_ALLOW_CPU", "UNSLOTH_DISABLE_STATISTICS", "UNSLOTH_COMPILE_LOCATION"):
        monkeypatch.setenv(name, "")  # the child sets it: restored afterwards
    run = workshop.run("sft", "llama", loader="unsloth")
    assert run.exit_code == 1
    assert "loader: 'unsloth' can't be imported" in run.reason
    assert sys.executable in run.reason
    assert "constraints-unsloth.txt" in run.reason
    assert not run.events("message")
    assert os.environ["UNSLOTH_DISABLE_STATISTICS"] == "1"


def test_keys_that_unsloth_adds_to_an_adapters_config_are_removed(tmp_path: Path) -> None:
    """The config as Unsloth 2026.10.7 writes it; with its keys an adapter can't be merged, and PEFT warns of them."""
    path, plain = tmp_path / "adapter_config.json", {"peft_type": "LORA", "r": 4, "auto_mapping": None}
    path.write_text(json.dumps(plain))
    as_peft_writes(path)
    assert path.read_text() == json.dumps(plain)  # a config by PEFT is not changed
    added = {"lora_B_layout": "rank_major", "unsloth_fused_expert_lora": {"lora_A_layout": "grouped_by_expert"},
             "auto_mapping": {"unsloth_fixed": True}}  # fmt: skip
    path.write_text(json.dumps({**plain, **added}))
    as_peft_writes(path)
    assert json.loads(path.read_text()) == plain
    path.write_text(json.dumps({**plain, **added, "lora_B_layout": "mixed"}))
    with pytest.raises(CheckpointError, match="another order than PEFT"):
        as_peft_writes(path)


def test_the_licences_are_named() -> None:
    page = (Path(__file__).parents[2] / "docs" / "guides" / "unsloth.md").read_text(encoding="utf-8")
    for name in ("AGPL-3.0", "LGPL-3.0-or-later", "unsloth/kernels/moe"):
        assert name in NOTICE
        assert name in page


def test_the_environments_versions_are_exact() -> None:
    lines = (Path(__file__).parents[2] / "constraints-unsloth.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert {name: pins[name] for name in ("unsloth", "torch", "transformers", "trl", "peft", "datasets")} == {
        "unsloth": "2026.10.7", "torch": "2.14.1", "transformers": "5.17.0",
        "trl": "1.15.0", "peft": "0.21.2", "datasets": "4.8.5",
    }  # fmt: skip
