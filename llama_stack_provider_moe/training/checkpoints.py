"""What a job leaves on disk. Every folder is written under another name and then renamed: listed means whole."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

from peft import PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llama_stack_provider_moe.experts.adapters import expert_ranks
from llama_stack_provider_moe.experts.steering import Steering
from llama_stack_provider_moe.export.probe import PROBE, Probe
from llama_stack_provider_moe.export.servers import card_section, family_of
from llama_stack_provider_moe.jobs.checkpoint_index import CHECKSUMS, sha256_of, write_checksums
from llama_stack_provider_moe.jobs.events import now
from llama_stack_provider_moe.jobs.folder import Artifact, ArtifactKind, Metrics
from llama_stack_provider_moe.training.distributed_state import is_shared_out

EXPERT_RANKS = "expert_ranks"


def describe(
    job_uuid: str, kind: ArtifactKind, folder: Path, epoch: int, step: int, metrics: Metrics | None = None
) -> Artifact:
    """The manifest's entry of a finished folder."""
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return Artifact(
        identifier=f"{job_uuid}/{folder.name}",
        kind=kind,
        path=str(folder),
        epoch=epoch,
        step=step,
        created_at=now(),
        bytes=size,
        metrics=metrics,
        sha256=sha256_of(folder / CHECKSUMS),
    )


def publish(written: Path, final: Path, step: int) -> Path:
    """Give everything under `written` its checksums, sync it, and rename it to `final`, in an earlier one's place."""
    write_checksums(written, step)
    for path in [written, *written.rglob("*")]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    final.parent.mkdir(parents=True, exist_ok=True)
    remove(final)
    os.rename(written, final)
    return final


def remove(folder: Path) -> None:
    """Delete a folder that may be missing; from the first moment on it no longer has its name."""
    going = folder.with_name(f".{folder.name}.removing")
    shutil.rmtree(going, ignore_errors=True)
    with suppress(FileNotFoundError):
        os.rename(folder, going)
    shutil.rmtree(going, ignore_errors=True)


def write(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    as_shipped: AbstractContextManager[None],
    steering: Steering | None = None,
    weights: dict[str, Tensor] | None = None,
) -> None:
    """Write a model, or an adapter alone, with its tokenizer and chat template, into `folder`.

    Args:
        as_shipped: puts the config's own values back while the model writes it (`ShippedConfig.restored`).
        steering: of its routers; their moved biases, where there are such, go into a file of their own.
        weights: all of them by name, where processes share the model out and this one has a part of each, or of some.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with as_shipped:
        if isinstance(model, PeftModel):
            # Left to itself PEFT asks the hub for the base's config, and copies the whole head where LoRA is on it.
            # The vocabulary never grows here: the embeddings are the base model's own.
            # Of a base that processes share, one of them alone could gather nothing: PEFT is shown no weight of it.
            own = weights or {
                name: weight for name, weight in model.state_dict().items() if not isinstance(weight, DTensor)
            }
            model.save_pretrained(folder, save_embedding_layers=False, state_dict=own)
            _tell_ranks(folder / SAFETENSORS_WEIGHTS_NAME, expert_ranks(model))
        elif weights is not None and is_shared_out(model):
            _write_gathered(model, weights, folder)
        else:
            model.save_pretrained(folder, state_dict=weights)
    tokenizer.save_pretrained(folder)
    if steering is not None:
        steering.save(folder)


def _write_gathered(model: PreTrainedModel, weights: dict[str, Tensor], folder: Path) -> None:
    """Transformers would gather them itself, in all processes, and say that they are in the dtype they train in."""
    config = model.config
    with _of_one_process(config):
        model.save_pretrained(folder, state_dict=weights)
        trained_in = config.dtype
        (config.dtype,) = {weights[name].dtype for name, _ in model.named_parameters()}
        config.save_pretrained(folder)
        config.dtype = trained_in


@contextmanager
def _of_one_process(config: Any) -> Iterator[None]:
    shared, config.distributed_config = config.distributed_config, None
    try:
        yield
    finally:
        config.distributed_config = shared


def write_beside_shards(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    as_shipped: AbstractContextManager[None],
    steering: Steering | None,
) -> None:
    """What `write` writes but for the weights, which lie in parts (`sharded_checkpoint`)."""
    folder.mkdir(parents=True, exist_ok=True)
    with as_shipped, _of_one_process(model.config):
        model.config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if steering is not None:
        steering.save(folder)


def _tell_ranks(weights: Path, ranks: dict[str, list[int]]) -> None:
    """Say in the metadata of a saved adapter which of its weights are padded with zeros, and each expert's rank.

    The field is `expert_ranks`, JSON: name of a tensor -> ranks. It is there and not in adapter_config.json, which
    PEFT reads with a warning about every key that it does not know.
    """
    if ranks:
        save_file(load_file(weights), weights, metadata={"format": "pt", EXPERT_RANKS: json.dumps(ranks)})


def save(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    final: Path,
    as_shipped: AbstractContextManager[None],
    step: int,
    steering: Steering | None = None,
    probe: Probe | None = None,
    weights: dict[str, Tensor] | None = None,
) -> Path:
    """`write`, whole or not at all; `step`: optimiser steps taken; `probe`: what the model says, to lie beside it."""
    written = final.with_name(f".{final.name}.writing")
    shutil.rmtree(written, ignore_errors=True)
    write(model, tokenizer, written, as_shipped, steering, weights)
    if probe is not None:
        (written / PROBE).write_text(probe.model_dump_json(), encoding="utf-8")
        if isinstance(model, PeftModel):
            with (written / "README.md").open("a", encoding="utf-8") as card:
                card.write(card_section(family_of(model), written))
    return publish(written, final, step)


def merge(model: PeftModel) -> PreTrainedModel:
    """Base plus adapter as one model; `model` itself is used up."""
    merged: PreTrainedModel = model.merge_and_unload(safe_merge=True)
    return merged
