"""Where a later start of a job goes on from, and how its weights come back.

The trainer restores optimiser, schedule, step and random state by itself (transformers' `resume_from_checkpoint`).
Two things are ours: what transformers does not know of a run (`RunState`), and the weights. Transformers 5.23 puts a
checkpoint's tensors into the model by their names on disk, which for most experts are not those in memory, and a name
that fits nothing is only logged: such a run would go on from the untrained experts.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel, set_peft_model_state_dict
from pydantic import Field, ValidationError
from safetensors.torch import load_file
from transformers import PreTrainedModel

from llama_stack_provider_moe.errors import CheckpointError
from llama_stack_provider_moe.experts.sharding import ShardedExperts
from llama_stack_provider_moe.jobs.checkpoint_index import checkpoint_folders, read_checksums, verify
from llama_stack_provider_moe.jobs.events import Resumed
from llama_stack_provider_moe.jobs.folder import Artifact, write_atomic
from llama_stack_provider_moe.jobs.scan import saved_artifacts
from llama_stack_provider_moe.spec import Block
from llama_stack_provider_moe.training.distributed_state import put_away
from llama_stack_provider_moe.training.expert_parallel import local
from llama_stack_provider_moe.training.loader import load_alike, load_held
from llama_stack_provider_moe.training.mirroring import bring_back, require_here
from llama_stack_provider_moe.training.sampling import rows_a_step
from llama_stack_provider_moe.training.session import AnySession
from llama_stack_provider_moe.training.sharded_checkpoint import is_sharded, read_weights

RUN_STATE = "run_state.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
DAMAGED = ".damaged"


class RunState(Block):
    """What a run knows of itself beside what transformers keeps; in every checkpoint."""

    train_seconds: float = Field(default=0.0, ge=0, description="Of training, over all starts so far.")
    epoch_losses: list[float] = Field(default_factory=list, description="One a step, of the epoch at hand.")
    last: dict[str, float] = Field(default_factory=dict, description="Metrics of the last step.")
    held_out: dict[str, float] = Field(default_factory=dict, description="Figures of the last evaluation.")
    rows_a_step: int | None = Field(default=None, description="Of all processes; None: written before it was noted.")


@dataclass(frozen=True)
class Resume:
    """A checkpoint to go on from."""

    folder: Path
    step: int
    state: RunState
    artifacts: tuple[Artifact, ...]  # checkpoints of this step or before, oldest first


def write_run_state(folder: Path, state: RunState) -> None:
    """Put `state` into a checkpoint's folder."""
    write_atomic(folder / RUN_STATE, state)


def find_resume(session: AnySession) -> Resume | None:
    """The latest whole checkpoint of the job, None where there is none; told to the events of a job that began before.

    A damaged one is renamed, so that nobody takes it for whole, and the one before it is tried, unless a mirror has a
    copy.
    """
    latest = _latest_whole(session)
    if bring_back(session):
        latest = _latest_whole(session)
    found = None if latest is None else _read(session, latest)
    if found is not None or session.started_before:
        name = None if found is None else found.folder.name
        session.events.append(Resumed(step=0 if found is None else found.step, checkpoint=name))
        session.show(f"goes on from {name}" if name else "begins again: no checkpoint was written")
    return found


def _latest_whole(session: AnySession) -> Path | None:
    for folder in checkpoint_folders(session.folder, session.spec):
        wrong = verify(folder)
        if wrong is None:
            return folder
        session.say(f"checkpoint {folder.name} can't be used: {wrong}; kept as {folder.name}{DAMAGED}", "warning")
        shutil.rmtree(folder.with_name(folder.name + DAMAGED), ignore_errors=True)
        folder.rename(folder.with_name(folder.name + DAMAGED))
    return None


def agreed_resume(session: AnySession) -> Resume | None:
    """`find_resume` as rank 0 sees it; in each process the checkpoint is there, and fits the job's steps.

    Raises:
        CheckpointError: it is not, or does not.
    """
    resume = session.peers.agreed(find_resume(session) if session.peers.leads else None)
    if resume is not None:
        require_here(session, resume.folder)
    require_same_step(session, resume)
    return resume


def require_same_step(session: AnySession, resume: Resume | None) -> None:
    """Refuse a checkpoint whose steps had another number of rows: its place in the data would be another.

    Raises:
        CheckpointError: naming both.
    """
    here = rows_a_step(session.spec.training, session.peers.size)
    there = here if resume is None else resume.state.rows_a_step
    if there is not None and there != here:
        assert resume is not None
        raise CheckpointError(
            f"{resume.folder.name} was written by steps of {there} rows, and here a step has {here}: "
            f"training.batch_size x gradient_accumulation_steps x {session.peers.size} process(es); they must agree"
        )


def draws_afresh(session: AnySession, resume: Resume | None) -> bool:
    """Whether a checkpoint lacks this process's random state, another number of processes having written it; told."""
    name = "rng_state.pth" if session.peers.size == 1 else f"rng_state_{session.peers.rank}.pth"
    if resume is None or (resume.folder / name).is_file():
        return False
    session.say(
        f"{resume.folder.name} was written by another number of processes: dropout and router noise, where there are "
        "any, are drawn afresh",
        "warning",
    )
    return True


def _read(session: AnySession, folder: Path) -> Resume:
    sums = read_checksums(folder)
    assert sums is not None, "it was verified"
    try:
        state = RunState.model_validate_json((folder / RUN_STATE).read_bytes())
    except (OSError, ValidationError) as error:
        raise CheckpointError(f"{folder / RUN_STATE} is whole, but can't be read: {error}") from error
    # Of a start that got as far as its final artifacts these are made again.
    artifacts = tuple(
        artifact
        for artifact in saved_artifacts(session.folder)
        if artifact.step <= sums.step and artifact.kind == "checkpoint"
    )
    return Resume(folder, sums.step, state, artifacts)


def restore_weights(model: PreTrainedModel | PeftModel, folder: Path, experts: ShardedExperts | None = None) -> None:
    """Put a checkpoint's weights, an adapter's or all, into `model`; every one must find its place.

    Args:
        experts: where processes hold experts of their own; of what the checkpoint has of all, a process takes its part.

    Raises:
        CheckpointError: the checkpoint and the model differ in any name or shape.
    """
    if isinstance(model, PeftModel):
        tensors = load_file(folder / ADAPTER_WEIGHTS)
        if experts is not None:
            tensors = experts.parts(tensors)
        expected = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        before = {name: parameter._version for name, parameter in model.named_parameters() if name in expected}
        outcome = set_peft_model_state_dict(model, tensors)
        after = {name: parameter._version for name, parameter in model.named_parameters() if name in expected}
        untouched = sorted(name for name in expected if after[name] == before[name])
        if outcome.unexpected_keys or untouched:
            raise CheckpointError(
                f"{folder / ADAPTER_WEIGHTS} is of another adapter: {len(outcome.unexpected_keys)} tensors fit nowhere "
                f"({', '.join(outcome.unexpected_keys[:3])}), {len(untouched)} weights got nothing "
                f"({', '.join(untouched[:3])})"
            )
        return
    if is_sharded(folder):
        read_weights(model, folder)
        return
    put_away(model)
    if experts is None:
        source = load_alike(folder, model)
        weights = dict(source.named_parameters())
    else:
        config = type(model.config).from_pretrained(folder)
        source = load_held(str(folder), config, model.dtype, model.device, experts.shard.size)
        weights = {name: local(parameter) for name, parameter in source.named_parameters()}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name not in weights or weights[name].shape != parameter.shape:
                raise CheckpointError(f"{folder} has no weight of {name} {tuple(parameter.shape)}")
            parameter.copy_(weights[name])
