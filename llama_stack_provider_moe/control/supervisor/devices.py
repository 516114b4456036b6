"""Find the GPUs that a supervisor assigns to jobs, without torch, which would take seconds and memory on each GPU."""

import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

from llama_stack_provider_moe.spec.server_config import ProviderConfig

_LIST_TIMEOUT_S = 60
# "GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-...)", and below it, if it is partitioned (MIG),
# "  MIG 1g.10gb     Device  0: (UUID: MIG-...)"
_GPU = re.compile(r"GPU (\d+):")
_PART = re.compile(r"\s+MIG .*\(UUID: (MIG-[^)]+)\)")


def given_out(
    config: ProviderConfig, environment: Mapping[str, str], system: Path = Path("/")
) -> tuple[str, ...] | None:
    """Return the devices that training processes may get: `supervisor.devices`, else those visible by default.

    These are CUDA_VISIBLE_DEVICES of `child_env` or of the supervisor, else all GPUs that the driver names. None means
    that no GPU was found. Then the supervisor does not restrict what a job sees, because there may still be a GPU.

    Args:
        config: The provider's configuration.
        environment: Environment variables of the supervisor.
        system: Folder that contains `proc`.
    """
    if config.supervisor.devices is not None:
        return tuple(config.supervisor.devices)
    visible = {**environment, **config.child_env}.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return _visible(visible)
    program = shutil.which("nvidia-smi", path=environment.get("PATH"))
    found = _listed(program) if program is not None else ()
    return found or _by_driver(system) or None


def _visible(text: str) -> tuple[str, ...]:
    """Parse CUDA_VISIBLE_DEVICES as CUDA does: up to the first entry that is not a device, such as -1."""
    devices: list[str] = []
    for entry in text.split(","):
        device = entry.strip()
        if not device or device.startswith("-") or device == "NoDevFiles" or device in devices:
            break
        devices.append(device)
    return tuple(devices)


def _listed(program: str) -> tuple[str, ...]:
    try:
        done = subprocess.run([program, "-L"], capture_output=True, text=True, timeout=_LIST_TIMEOUT_S, check=True)
    except (OSError, subprocess.SubprocessError):  # installed, but the driver does not answer
        return ()
    parts: dict[str, list[str]] = {}
    for line in done.stdout.splitlines():
        if gpu := _GPU.match(line):
            parts[gpu[1]] = []
        elif (part := _PART.match(line)) and parts:
            parts[[*parts][-1]].append(part[1])
    return tuple(device for gpu, own in parts.items() for device in (own or [gpu]))


def _by_driver(system: Path) -> tuple[str, ...]:
    folder = system / "proc/driver/nvidia/gpus"
    return tuple(str(index) for index, _ in enumerate(folder.iterdir())) if folder.is_dir() else ()
