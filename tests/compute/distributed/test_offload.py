"""Laws of `resources.cpu_offload` that can be checked without a GPU."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llama_stack_provider_moe.spec import JOB_SPEC
from tests.support import tiny_models

ROOT = Path(__file__).parents[3]


def test_weights_in_the_cpus_memory_train_bitwise_the_same(tmp_path: Path) -> None:
    """In bf16 over fp32 weights; the optimiser's state is gathered and restored in between."""
    model = tiny_models.build("mixtral", tmp_path / "mixtral")
    out = tmp_path / "found.json"
    command = [sys.executable, "-m", "tests.support.tiny_offload", str(model), str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = json.loads(out.read_text())
    assert found["equal"] is True
    assert found["tensors"] > 10
    assert found["moved"] > 0


@pytest.mark.parametrize(
    "blocks",
    [
        {"resources": {"gpus": 4, "strategy": "ddp", "cpu_offload": True}, "adapter": None},
        {"resources": {"gpus": 4, "cpu_offload": True}, "adapter": None},
        {"resources": {"gpus": 4, "strategy": "fsdp", "cpu_offload": True}, "adapter": {}},
        {"resources": {"gpus": 0, "processes": 2, "strategy": "fsdp", "cpu_offload": True}, "adapter": None},
    ],
)
def test_it_is_refused_where_it_saves_nothing(blocks: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"resources\.cpu_offload: true is not valid here; expected false, or"):
        JOB_SPEC.validate_python({"recipe": "sft", "model": "a/b", "data": {"dataset_id": "d"}, **blocks})
