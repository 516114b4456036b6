"""Laws for devices: they are found without torch, each is assigned to one job, and the child gets their names."""

import json
import time
from pathlib import Path

import pytest

from llama_stack_provider_moe.control.store.store import JobStore
from llama_stack_provider_moe.control.supervisor.devices import given_out
from llama_stack_provider_moe.jobdir.state import JobState
from tests.support.jobs_support import new_job, new_supervisor, run_until_idle, tiny_config


def test_every_child_sees_the_devices_it_was_given(store: JobStore, root: Path) -> None:
    config = tiny_config(root, devices=["3", "GPU-5"], max_concurrent_jobs=4)
    config = config.model_copy(update={"child_env": {"CUDA_VISIBLE_DEVICES": "0"}})
    supervisor = new_supervisor(store, config)
    folders = {gpus: new_job(store, config, f"job-{gpus}", gpus=gpus) for gpus in (None, 0, 2, 3)}
    run_until_idle(supervisor)
    for gpus, devices in ((None, "3"), (0, ""), (2, "3,GPU-5")):
        assert json.loads((folders[gpus] / "environment.json").read_text())["CUDA_VISIBLE_DEVICES"] == devices
        assert store.get(f"job-{gpus}", None).devices == devices
    impossible = store.get("job-3", None)
    assert (impossible.state, impossible.attempts) == (JobState.FAILED, 0)
    assert "asks for 3 GPUs (`resources.gpus`), but the machine that runs the jobs has 2 available" in str(
        impossible.reason
    )


def test_two_jobs_never_see_one_device(store: JobStore, root: Path) -> None:
    config = tiny_config(root, devices=["0"], max_concurrent_jobs=4)
    supervisor = new_supervisor(store, config)
    for number in range(3):
        new_job(store, config, f"job{number}", steps=5)
    most = 0
    while supervisor.step():
        most = max(most, len(store.running()))
        time.sleep(0.005)
    assert most == 1
    assert store.counts()[JobState.COMPLETED] == 3


NVIDIA_SMI = """\
GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-11111111-2222-3333-4444-555555555555)
GPU 1: NVIDIA H100 80GB HBM3 (UUID: GPU-66666666-7777-8888-9999-000000000000)
  MIG 3g.40gb     Device  0: (UUID: MIG-aaaaaaaa-bbbb-cccc-dddd-eeeeeeeeeeee)
  MIG 3g.40gb     Device  1: (UUID: MIG-ffffffff-0000-1111-2222-333333333333)
"""


@pytest.mark.parametrize(
    ("devices", "environment", "found"),
    [
        (["1"], {"CUDA_VISIBLE_DEVICES": "0"}, ("1",)),
        ([], {}, ()),
        (None, {"CUDA_VISIBLE_DEVICES": "2, GPU-x"}, ("2", "GPU-x")),
        (None, {"CUDA_VISIBLE_DEVICES": "1,-1,0"}, ("1",)),
        (None, {"CUDA_VISIBLE_DEVICES": ""}, ()),
        (None, {}, None),
    ],
)
def test_the_devices_given_out_are_those_configured_or_seen(
    root: Path, devices: list[str] | None, environment: dict[str, str], found: tuple[str, ...] | None
) -> None:
    assert given_out(tiny_config(root, devices=devices), environment | {"PATH": str(root)}, root) == found


def test_the_devices_of_the_driver_are_found_without_torch(root: Path) -> None:
    config, environment = tiny_config(root), {"PATH": str(root)}
    for bus in ("0000:18:00.0", "0000:2a:00.0"):
        (root / "proc/driver/nvidia/gpus" / bus).mkdir(parents=True)
    assert given_out(config, environment, root) == ("0", "1")
    program = root / "nvidia-smi"
    program.write_text(f"#!/bin/sh\nprintf '%s' '{NVIDIA_SMI}'\n")
    program.chmod(0o755)
    mig = ("MIG-aaaaaaaa-bbbb-cccc-dddd-eeeeeeeeeeee", "MIG-ffffffff-0000-1111-2222-333333333333")
    assert given_out(config, environment, root) == ("0", *mig)
    program.write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed'; exit 9\n")
    assert given_out(config, environment, root) == ("0", "1")


@pytest.mark.parametrize("devices", [["gpu0"], ["-1"], ["0,1"], [""], ["0", "0"]])
def test_what_is_no_device_is_refused(root: Path, devices: list[str]) -> None:
    with pytest.raises(ValueError, match="devices"):
        tiny_config(root, devices=devices)
