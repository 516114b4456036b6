"""The requests of the host's own integration tests of post-training (Llama Stack 0.6.1) train models here.

Both tests there register a data set of the hub by its address and state almost nothing else: SFT with LoRA on a chat
model, and DPO on rows whose prompt is a text and whose answers are whole conversations, with `data_format: dialog`.
"""

import time
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
from llama_stack_api import (
    DataConfig,
    DatasetFormat,
    DPOAlignmentConfig,
    DPOLossType,
    LoraFinetuningConfig,
    TrainingConfig,
)

from tests.support import hubless
from tests.support.host_harness import Server, serving

pytestmark = pytest.mark.e2e

LIMIT_S = 800.0


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("suite")
    environment = {"HF_DATASETS_CACHE": str(folder / "datasets"), "HF_HUB_OFFLINE": "1"}
    with serving(hubless.build(folder), folder / "state", env=environment, cwd=folder) as running:
        yield running


def registered(server: Server, address: str) -> str:
    """Register a data set of the hub, which the host names itself."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "deprecated", DeprecationWarning)
        made = server.client().beta.datasets.register(
            purpose="post-training/messages", source={"type": "uri", "uri": f"huggingface://datasets/{address}"}
        )
    return str(made.identifier)


def training(dataset_id: str, data_format: DatasetFormat) -> TrainingConfig:
    """One step, of one row; the host's models leave the rest to the server."""
    data = DataConfig(dataset_id=dataset_id, batch_size=1, shuffle=False, data_format=data_format)
    return TrainingConfig(n_epochs=1, data_config=data, max_steps_per_epoch=1, gradient_accumulation_steps=1)


def completed(server: Server, job_id: str) -> dict[str, Any]:
    """The job after it has completed; meanwhile the SDK sees the states that the host's tests accept."""
    api, until = server.client().alpha.post_training, time.monotonic() + LIMIT_S
    while True:
        status = api.job.status(extra_query={"job_uuid": job_id}).status
        assert status in ("scheduled", "in_progress", "completed")
        if status == "completed":
            break
        assert time.monotonic() < until, f"{job_id} does not end"
        time.sleep(0.5)
    assert api.job.artifacts(extra_query={"job_uuid": job_id}).job_uuid == job_id
    with server.http() as http:
        found: dict[str, Any] = http.get(f"/jobs/{job_id}").json()
    return found


def losses(server: Server, job_id: str) -> list[float]:
    """The loss of each step."""
    with server.http() as http:
        found: list[float] = http.get(f"/jobs/{job_id}/metrics").json()["metrics"]["loss"]
    return found


@pytest.mark.wide
def test_supervised_fine_tuning(server: Server) -> None:
    lora = LoraFinetuningConfig(
        type="LoRA", lora_attn_modules=["q_proj", "v_proj", "output_proj"], apply_lora_to_mlp=True,
        apply_lora_to_output=False, rank=8, alpha=16,
    )  # fmt: skip
    dataset_id = registered(server, f"{hubless.QUESTIONS}?split=train")
    server.client().alpha.post_training.supervised_fine_tune(
        job_uuid="test-sft", model=hubless.CHAT_MODEL, algorithm_config=lora,
        training_config=training(dataset_id, DatasetFormat.instruct), hyperparam_search_config={}, logger_config={},
        checkpoint_dir=None,
    )  # fmt: skip
    job = completed(server, "test-sft")
    assert job["sources"]["train"]["rows"] == hubless.ROWS
    assert "adapter" in [each["kind"] for each in job["checkpoints"]]
    assert len(losses(server, "test-sft")) == 1


@pytest.mark.wide
def test_preference_optimisation(server: Server) -> None:
    dataset_id = registered(server, f"{hubless.PREFERENCES}?split=train[:20]")
    server.client().alpha.post_training.preference_optimize(
        job_uuid="test-dpo", finetuned_model=hubless.PLAIN_MODEL,
        algorithm_config=DPOAlignmentConfig(beta=0.1, loss_type=DPOLossType.sigmoid),
        training_config=training(dataset_id, DatasetFormat.dialog), hyperparam_search_config={}, logger_config={},
    )  # fmt: skip
    job = completed(server, "test-dpo")
    assert job["sources"]["train"]["rows"] == 20
    assert "model" in [each["kind"] for each in job["checkpoints"]], "all weights have trained"
    assert losses(server, "test-dpo") == [pytest.approx(0.6931, abs=1e-3)], "the policy begins as its reference"
