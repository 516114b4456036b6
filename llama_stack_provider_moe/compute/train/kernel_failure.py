"""What becomes of a run when a compiled kernel of experts fails in the middle of it: torch's kernels take over.

An illegal access makes all later work of its process fail, so the run goes on in another process: this one saves the
last step if it still can, and ends with `HandedOver`; the next start reads `experts.json` and resumes.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from subprocess import CalledProcessError

import torch

from llama_stack_provider_moe.compute.models.prepare import Base
from llama_stack_provider_moe.compute.moe.backend import COMPILED
from llama_stack_provider_moe.compute.runtime.context import AnySession, HandedOver
from llama_stack_provider_moe.compute.runtime.peers import is_of_a_lost_peer
from llama_stack_provider_moe.compute.train.saver import Saver
from llama_stack_provider_moe.compute.train.trainer import RecordingTrainer

_REASON_LIMIT = 300  # characters
_COMPILERS = ("triton", "quack", "cutlass", "tvm_ffi")


@contextmanager
def kernels_may_fail(session: AnySession, base: Base, trainer: RecordingTrainer, saver: Saver) -> Iterator[None]:
    """Turn the failure of a kernel inside the block into `HandedOver`, if compiled kernels compute the experts.

    Errors of a device arrive late, so one of any kernel counts. If it was not ours, it fails again with torch's, and
    then the job fails with it.

    Args:
        session: the job's.
        base: its loaded model.
        trainer: it runs in the block.
        saver: writes its checkpoints.

    Raises:
        HandedOver: the job is to be started again.
    """
    try:
        yield
    except Exception as error:
        if base.resolved.experts_implementation not in COMPILED or not is_of_a_kernel(error):
            raise
        step = trainer.state.global_step
        what = str(error).strip().splitlines() or [""]
        reason = f"a kernel failed after step {step}: {type(error).__name__}: {what[0][:_REASON_LIMIT]}"
        kept = _save(session, base.device, trainer, saver)
        raise HandedOver(f"{reason}; {kept}") from error


def is_of_a_kernel(error: Exception) -> bool:
    """Whether an error can be a kernel's: of the device, a compiler, or the C compiler that builds launchers."""
    if isinstance(error, torch.OutOfMemoryError) or is_of_a_lost_peer(error):
        return False
    if isinstance(error, (torch.AcceleratorError, CalledProcessError)):
        return True
    # By name: they are not installed everywhere, and Triton raises its drivers' errors as plain RuntimeErrors.
    of_a_compiler = any(each.__module__.partition(".")[0] in _COMPILERS for each in type(error).__mro__)
    of_a_driver = isinstance(error, RuntimeError) and any(name in str(error) for name in ("Triton Error", "CUDA error"))
    return of_a_compiler or of_a_driver


def _save(session: AnySession, device: torch.device, trainer: RecordingTrainer, saver: Saver) -> str:
    """Save the last step if there is one that is not saved and the device still answers; where the run resumes."""
    step = trainer.state.global_step
    newest = max((each.step for each in saver.artifacts), default=0)
    if step > newest and session.peers.size == 1 and _answers(device):
        saver.save_last_step()
        newest = step
    return f"it resumes after step {newest}" if newest else "it starts from the beginning"


def _answers(device: torch.device) -> bool:
    try:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return bool(torch.ones(1, device=device).add(1).item() == 2)
    except RuntimeError:
        return False
