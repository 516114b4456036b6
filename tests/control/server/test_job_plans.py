"""The memory plan of a job over HTTP, by the real planner in a process of its own."""

import json
from pathlib import Path

import pytest

from llama_stack_provider_moe.control.server import job_plans
from llama_stack_provider_moe.errors import Unavailable
from tests.support.host_support import ask, serving_in_process

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
