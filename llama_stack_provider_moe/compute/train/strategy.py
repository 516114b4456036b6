"""Decides a job's strategy, and whether it fits in memory, before any weight is loaded.

Rank 0 decides `resources.strategy: auto` here, once for all processes, and checks a strategy that the job names. A job
that needs more memory than a device has, whatever its batch, ends now and not after an hour of loading; it gets the
reason and a list of what would fit (`compute.planning.planner`). If only the estimate exceeds the device, the job gets
a warning.

Two kinds of jobs are not estimated: small models on a CPU, where a step takes less time than the estimate, and models
that Unsloth runs, because its kernels keep other tensors than ours. A model is small for its job if weights, gradients
and optimiser take an eighth of the memory at most, a teacher's weights counted like its own; with an adapter, if the
weights take a sixteenth and a micro-batch is short, so that activations are not what fills the memory.
"""

import math
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import psutil
import torch

from llama_stack_provider_moe.compute.models.backend import backend_of
from llama_stack_provider_moe.compute.models.loader import pick_device
from llama_stack_provider_moe.compute.runtime.context import AnySession, Forecast
from llama_stack_provider_moe.compute.train.optimizers import require_device
from llama_stack_provider_moe.errors import MoeError, TrainingError, shorten
from llama_stack_provider_moe.jobdir.folder import JobFolder
from llama_stack_provider_moe.spec import TrainingSpec

# Shares of a CPU's memory. Weights stored in bf16 take eight times their files in fp32 with gradients and moments, and
# twice their files where an adapter trains.
SMALL = 1 / 64
SMALL_ADAPTED, SHORT_TOKENS = 1 / 32, 2048  # tokens of a micro-batch
_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


class _Decided(NamedTuple):
    strategy: str
    forecast: Forecast | None
    warnings: tuple[str, ...] = ()


def decided(session: AnySession) -> AnySession:
    """The session with its strategy decided, and with a forecast of its memory.

    Raises:
        TrainingError: no strategy that the job allows fits.
    """
    device = pick_device(session.spec.training.dtype, session.peers.local_rank)
    require_device(session.spec.optimizer, device.type)
    # The smallest of all processes.
    memory = -int(session.peers.maximum(-_memory_bytes(device, session.peers.local_size)))
    mine = _decide(session.spec, device.type, memory, session.folder) if session.peers.leads else None
    found = session.peers.agreed(mine)
    assert found is not None
    for warning in found.warnings:
        session.say(warning, "warning")
    resources = session.spec.resources.model_copy(update={"strategy": found.strategy})
    spec = session.spec.model_copy(update={"resources": resources})
    return replace(session, spec=spec, forecast=found.forecast)


def _decide(spec: TrainingSpec, device: str, memory_bytes: int, folder: JobFolder | None = None) -> _Decided:
    asked = spec.resources.strategy
    unplanned = "ddp" if asked == "auto" else asked
    if (device == "cpu" and _is_small(spec, memory_bytes)) or not backend_of(spec).has_memory_estimate:
        return _Decided(unplanned, None)
    # These imports take time, and most jobs on a CPU return above.
    from llama_stack_provider_moe.compute.planning.expected_images import images_of_rows
    from llama_stack_provider_moe.compute.planning.meta_model import read_config
    from llama_stack_provider_moe.compute.planning.planner import Machine, Planner, refusal

    try:
        machine = Machine("cuda" if device == "cuda" else "cpu", memory_bytes)
        images = None if folder is None else images_of_rows(spec, folder)
        planner = Planner(read_config(spec.model)[0], machine, images)
        plan = planner.plan(spec)
    except (MoeError, RuntimeError, NotImplementedError, TypeError, ValueError, AttributeError, KeyError) as error:
        # A model's code may fail on tensors without numbers. An error in the job itself comes up again when it loads.
        reason = shorten(" ".join(str(error).split()), 300)[1:-1]
        return _Decided(unplanned, None, (f"memory could not be estimated ({type(error).__name__}: {reason})",))
    chosen = plan.chosen
    if chosen is None:
        raise TrainingError(refusal(plan, planner.changes(spec)))
    assert chosen.estimate is not None
    estimate = chosen.estimate
    if plan.merging_bytes is not None:
        _require_room_to_merge(plan.merging_bytes, memory_bytes if device == "cuda" else 0)
    terms = ", ".join(f"{name.replace('_', ' ')} {value / 1e9:.2f}" for name, value in vars(estimate.terms).items()
                      if value)  # fmt: skip
    by_itself = " (auto)" if asked == "auto" and plan.processes > 1 else ""
    text = (
        f"{chosen.strategy}{by_itself}: {estimate.peak_bytes / 1e9:.2f} of {memory_bytes / 1e9:.1f} GB per process "
        f"expected at the peak, {estimate.moment} ({terms})"
    )
    if estimate.offloaded_bytes:
        text += f"; {estimate.offloaded_bytes / 1e9:.2f} GB of experts per process in the machine's memory"
    if plan.vision is not None:
        text += f"; vision tower: {plan.vision.text()}"
    if plan.loading is not None:
        text += f"; {plan.loading.host_bytes / 1e9:.2f} GB of main memory at most while the base is read"
    if plan.merging_bytes is not None:
        text += f"; {plan.merging_bytes / 1e9:.2f} GB while the base is decoded and merged"
    warnings = []
    if plan.verdict == "tight":
        warnings.append(
            f"memory is tight: {estimate.peak_bytes / 1e9:.1f} GB per process expected at the peak, of which "
            f"{chosen.certain_bytes / 1e9:.1f} GB do not depend on the batch; {plan.machine.usable_bytes / 1e9:.1f} GB "
            "can be used (`moe-train plan` shows what would fit)"
        )
    return _Decided(chosen.strategy, Forecast(text, plan.as_json()), tuple(warnings))


def _require_room_to_merge(needed: int, device_bytes: int) -> None:
    """Refuse now what would fail after the last step."""
    there = _machine_bytes()
    if needed > max(device_bytes, there):
        gpu = f" and the GPU has {device_bytes / 1e9:.1f} GB" if device_bytes else ""
        raise TrainingError(
            "options.save_merged: true is not possible here: the base in 16 bits and the merge take "
            f"{needed / 1e9:.1f} GB; the machine has {there / 1e9:.1f} GB{gpu}. Leave it out, and merge on disk when "
            "the job has completed (moe-train export merge)"
        )


def _memory_bytes(device: torch.device, processes: int) -> int:
    """Memory of this process's device. All of a GPU's, used or not, so that the next start decides the same."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    return _machine_bytes() // processes


def _machine_bytes() -> int:
    """Memory and swap that processes may use, by the machine and by the control group (cgroup v2)."""
    there: int = psutil.virtual_memory().total + psutil.swap_memory().total
    try:
        limit = _CGROUP_LIMIT.read_text(encoding="ascii").strip()
    except OSError:
        return there
    return there if limit == "max" else min(there, int(limit))


def _is_small(spec: TrainingSpec, memory_bytes: int) -> bool:
    is_short = spec.training.batch_size * spec.options.max_length <= SHORT_TOKENS
    share = SMALL_ADAPTED if spec.adapter is not None and is_short else SMALL
    teacher = spec.teacher_named()
    weights = _weights_on_disk(spec.model) + (0 if teacher is None else _weights_on_disk(teacher[1]))
    return weights <= share * memory_bytes


def _weights_on_disk(model: str) -> float:
    """Bytes of the weights in a folder; infinite if there is no such folder or it has none."""
    sizes = [path.stat().st_size for path in Path(model).glob("*.safetensors")] if Path(model).is_dir() else []
    return sum(sizes) if sizes else math.inf
