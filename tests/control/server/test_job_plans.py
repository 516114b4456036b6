"""The memory plan of a job over HTTP, by the real planner in a process of its own."""

import json
from pathlib import Path
from typing import Any

import pytest

from llama_stack_provider_moe.control.server import job_plans
from llama_stack_provider_moe.control.server.callers import ANONYMOUS
from llama_stack_provider_moe.control.server.measured_time import measured
from llama_stack_provider_moe.control.server.service import PostTrainingService
from llama_stack_provider_moe.errors import Unavailable
from llama_stack_provider_moe.jobdir.events import EventLog, Finished, Step
from llama_stack_provider_moe.jobdir.state import JobState
from llama_stack_provider_moe.spec import JOB_SPEC, TrainingSpec
from llama_stack_provider_moe.spec.run_time import RunTime
from tests.support.dashboard_jobs import Workshop
from tests.support.host_support import ask, folder_of, serving_in_process, submit
from tests.support.image_bytes import asked, part

MIXTRAL = {
    "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "hidden_size": 64, "intermediate_size": 128,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4,
    "num_experts_per_tok": 2, "vocab_size": 320, "max_position_embeddings": 128,
}  # fmt: skip
BODY = {
    "recipe": "sft", "model": "tiny", "data": {"dataset_id": "good"}, "adapter": {"rank": 4}, "resources": {"gpus": 1}
}  # fmt: skip


def test_a_plan_says_whether_a_job_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving_in_process(tmp_path) as service:
        folder = service.config.models_dir / "tiny"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(MIXTRAL))
        (folder / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
        (folder / "tokenizer.json").write_text("{}")
        answer = ask(service, "POST", "/jobs/plan", json=BODY, params={"memory_bytes": 80 * 10**9})
        assert answer.status_code == 200, answer.text
        found = answer.json()
        assert found["plan"]["verdict"] == "fits"
        assert found["plan"]["device_bytes"] == 80 * 10**9
        assert found["job"]["trains"].startswith("LoRA r=4")
        assert found["time"]["source"] is None, "this machine has no GPU, and no job like it has completed"
        assert "no job like it was measured" in found["time"]["basis"]
        wrong = ask(service, "POST", "/jobs/plan", json=BODY | {"optimizer": {"lr": 99}})
        assert wrong.status_code == 400
        assert "optimizer.lr" in wrong.json()["error"]["message"]
        outside = ask(service, "POST", "/jobs/plan", json=BODY | {"model": "/etc"})
        assert outside.status_code in (400, 403), "no model outside the allowed folders is read"
        small = ask(service, "POST", "/jobs/plan", json=BODY, params={"memory_bytes": 5})
        assert small.status_code == 400
        monkeypatch.setattr(job_plans, "_MODULE", "no_such_module")
        failed = ask(service, "POST", "/jobs/plan", json=BODY)
        assert failed.status_code == Unavailable.status
        assert "see the server's log" in failed.json()["error"]["message"]


def completed(service: PostTrainingService, job_id: str, each: float, tokens: float, **changes: Any) -> None:
    """A job that has completed, at so many tokens a second and device; its steps of 4 rows have so many tokens."""
    submit(service, job_uuid=job_id, **{"resources": {"gpus": 1}, "adapter": {"rank": 4}, **changes})
    Workshop(service).begin(job_id)
    log = EventLog(folder_of(service, job_id).events)
    log.append(Step(step=9, max_steps=9, epoch=1, metrics={"tokens": tokens}))
    log.append(Finished(train_seconds=9, throughput={"tokens_per_s_per_device": each, "tflops_per_device": 1.0}))
    log.close()
    service.store.move(job_id, JobState.COMPLETED)


def spec_of(**changes: Any) -> TrainingSpec:
    body = {**BODY, "model": "owner/name", **changes}
    found = JOB_SPEC.validate_python(body)
    assert isinstance(found, TrainingSpec)
    return found


def test_a_time_is_measured_on_jobs_like_it(tmp_path: Path) -> None:
    with serving_in_process(tmp_path) as service:

        def time_of(rows: int | None = 900, owner: str = ANONYMOUS, **changes: Any) -> RunTime | None:
            spec = spec_of(**changes)
            return measured(spec, spec.model, service.store, owner, rows)

        assert time_of() is None
        completed(service, "one", 2000, 400)
        completed(service, "two", 4000, 400)
        completed(service, "three", 3000, 400)
        completed(service, "whole", 10, 400, adapter=None)
        completed(service, "broken", float("nan"), 400)
        found = time_of()
        assert found is not None
        seconds = 900 * 100 / 3000
        assert (found["seconds"], found["tokens_per_s"], found["source"]) == (seconds, 3000, "measured")
        assert found["basis"] == "measured on three, two, one: 100 tokens a row"
        epochs = time_of(training={"n_epochs": 3, "max_steps_per_epoch": 10})
        assert epochs is not None
        assert epochs["seconds"] == 3 * 10 * 4 * 100 / 3000
        unknown = time_of(rows=None)
        assert unknown is not None
        assert (unknown["seconds"], unknown["tokens_per_s"]) == (None, 3000)
        assert "the number of rows is not known" in unknown["basis"]
        whole = time_of(adapter=None)
        assert whole is not None
        assert whole["tokens_per_s"] == 10
        others = ({"resources": {"gpus": 2}}, {"model": "owner/other"}, {"owner": "other"}, {"resources": {"gpus": 0}})
        for other in others:
            assert time_of(**other) is None, "not like it"
        completed(service, "on-two", 5, 400, resources={"gpus": 2})
        both = time_of(resources={"gpus": 2})
        assert both is not None
        assert both["tokens_per_s"] == 10, "of all devices"


def test_the_route_tells_the_measured_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[object] = []

    async def plan(*asked: object) -> dict[str, object]:  # the planner has tests of its own
        given[:] = asked
        return {"plan": {}, "time": None}

    monkeypatch.setattr(job_plans, "plan", plan)
    with serving_in_process(tmp_path) as service:
        row = b'{"messages":[{"role":"user","content":"a"},{"role":"assistant","content":"b"}]}\n'
        pushed = ask(service, "PUT", "/datasets/mine", content=row * 8, headers={"Content-Type": "application/jsonl"})
        assert pushed.status_code == 200, pushed.text
        body = {**BODY, "model": "owner/name", "data": {"dataset_id": "data:mine"}}
        assert ask(service, "POST", "/jobs/plan", json=body).json()["time"] is None
        completed(service, "one", 2000, 400)
        found = ask(service, "POST", "/jobs/plan", json=body).json()["time"]
        assert (found["seconds"], found["source"]) == (7 * 100 / 2000, "measured")
        assert given[-1] == 0, "rows without images"
        seen = json.dumps(asked(part())).encode() + b"\n"
        assert ask(service, "PUT", "/datasets/seen", content=seen * 8).status_code == 200
        for dataset_id in ("data:seen", "elsewhere"):
            ask(service, "POST", "/jobs/plan", json=body | {"data": {"dataset_id": dataset_id}})
            assert given[-1] is None, "the planner assumes some"
