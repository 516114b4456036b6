"""Laws of `resources.cpu_offload`, as far as they can be held to without a GPU."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llama_stack_provider_moe.spec import JOB_SPEC
from tests import tiny_models

ROOT = Path(__file__).parents[1]


def test_weights_in_the_cpus_memory_are_trained_to_the_same_bits(tmp_path: Path) -> None:
    """In bf16 over fp32 weights; the optimiser's state is made whole and taken up again on the way."""
    model = tiny_models.build("mixtral", tmp_path / "mixtral")
    out = tmp_path / "found.json"
    command = [sys.executable, "-m", "tests.tiny_offload", str(model), str(out)]
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
def test_where_it_would_gain_nothing_it_is_refused(blocks: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"resources\.cpu_offload: true is not valid here; expected false, or"):
        JOB_SPEC.validate_python({"recipe": "sft", "model": "a/b", "data": {"dataset_id": "d"}, **blocks})
