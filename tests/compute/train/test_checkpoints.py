"""The folders that a job publishes."""

import os
import stat
from pathlib import Path

import torch
from safetensors.torch import save_file

from llama_stack_provider_moe.compute.train.checkpoints import publish


def test_a_group_that_may_read_the_job_may_read_its_weights(tmp_path: Path) -> None:
    before = os.umask(0o027)  # the server's with `group_access`
    try:
        (tmp_path / "written").mkdir()
        save_file({"a": torch.zeros(2)}, tmp_path / "written" / "adapter_model.safetensors")
        publish(tmp_path / "written", tmp_path / "adapter", 1)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "adapter" / "adapter_model.safetensors").stat().st_mode) == 0o640
