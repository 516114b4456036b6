"""Before any weight is loaded: which strategy a job trains with, and whether it can fit at all.

`resources.strategy: auto` is decided here, once and by rank 0, and a strategy that was asked for is checked: a job that
needs more memory than a device has, whatever its batch, ends with the reason and with what would fit
(`analysis.planner`), not after an hour of loading. What only an estimate takes beyond a device is a warning.

A small model on a CPU is not estimated: its step costs less than the estimate would. Nor is what Unsloth runs, whose
kernels keep something else than ours.
"""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch

from llama_stack_provider_moe.errors import MoeError, TrainingError, shorten
from llama_stack_provider_moe.spec import TrainingSpec
from llama_stack_provider_moe.training.loader import pick_device
from llama_stack_provider_moe.training.session import AnySession, Forecast

# Of a CPU's memory. In fp32, with gradients and moments, what is stored in bf16 takes eight times its files.
SMALL = 1 / 64
_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


class _Decided(NamedTuple):
    strategy: str
    forecast: Forecast | None
    warnings: tuple[str, ...] = ()


def decided(session: AnySession) -> AnySession:
    """The session with a strategy that is no longer `auto`, and what was foreseen of its memory.

    Raises:
        TrainingError: no strategy that the job may have can fit.
    """
    device = pick_device(session.spec.training.dtype, session.peers.local_rank)
    memory = -int(session.peers.most(-_memory_bytes(device, session.peers.local_size)))  # the least of all
    found = session.peers.agreed(_decide(session.spec, device.type, memory) if session.peers.leads else None)
    assert found is not None
    for warning in found.warnings:
        session.say(warning, "warning")
    resources = session.spec.resources.model_copy(update={"strategy": found.strategy})
    spec: Any = session.spec.model_copy(update={"resources": resources})
    return replace(session, spec=spec, forecast=found.forecast)


def _decide(spec: TrainingSpec, device: str, memory_bytes: int) -> _Decided:
    asked = spec.resources.strategy
    unplanned = "ddp" if asked == "auto" else asked
    if spec.loader == "unsloth" or (device == "cpu" and _weights_on_disk(spec.model) <= SMALL * memory_bytes):
        return _Decided(unplanned, None)
    # Its imports take time, and most jobs of a CPU end above.
    from llama_stack_provider_moe.analysis.blank import read_config
    from llama_stack_provider_moe.analysis.planner import Machine, Planner, refusal

    try:
        planner = Planner(read_config(spec.model)[0], Machine("cuda" if device == "cuda" else "cpu", memory_bytes))
        plan = planner.plan(spec)
    except (MoeError, RuntimeError, NotImplementedError, TypeError, ValueError, AttributeError, KeyError) as error:
        # By what a model's code does with tensors that have no numbers. What is wrong with the job itself is told
        # where it goes wrong, a little later.
        told = shorten(" ".join(str(error).split()), 300)[1:-1]
        return _Decided(unplanned, None, (f"memory could not be estimated ({type(error).__name__}: {told})",))
    chosen = plan.chosen
    if chosen is None:
        raise TrainingError(refusal(plan, planner.changes(spec)))
    assert chosen.estimate is not None
    estimate = chosen.estimate
    terms = ", ".join(f"{name.replace('_', ' ')} {value / 1e9:.2f}" for name, value in vars(estimate.terms).items()
                      if value)  # fmt: skip
    by_itself = " (auto)" if asked == "auto" and plan.processes > 1 else ""
    text = (
        f"{chosen.strategy}{by_itself}: {estimate.peak_bytes / 1e9:.2f} of {memory_bytes / 1e9:.1f} GB a process "
        f"expected at the peak, {estimate.moment} ({terms})"
    )
    warnings = []
    if plan.verdict == "tight":
        warnings.append(
            f"memory is tight: {estimate.peak_bytes / 1e9:.1f} GB a process expected at the peak, of which "
            f"{chosen.certain_bytes / 1e9:.1f} GB whatever the batch, and {plan.machine.usable_bytes / 1e9:.1f} GB can "
            "be used (`moe-train plan` tells what would fit)"
        )
    return _Decided(chosen.strategy, Forecast(text, plan.as_json()), tuple(warnings))


def _memory_bytes(device: torch.device, processes: int) -> int:
    """Of this process's device. Of a GPU all, whoever uses it: the same job decides alike at its next start."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    return _machine_bytes() // processes


def _machine_bytes() -> int:
    """Memory and swap that processes may have here, by the machine and by the control group (cgroup v2)."""
    there: int = psutil.virtual_memory().total + psutil.swap_memory().total
    try:
        limit = _CGROUP_LIMIT.read_text(encoding="ascii").strip()
    except OSError:
        return there
    return there if limit == "max" else min(there, int(limit))


def _weights_on_disk(model: str) -> float:
    """Bytes of a folder's weights; infinite where it is none."""
    sizes = [path.stat().st_size for path in Path(model).glob("*.safetensors")] if Path(model).is_dir() else []
    return sum(sizes) if sizes else math.inf
