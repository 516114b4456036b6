"""The folders that a job writes. Each is written under another name and then renamed, so a listed one is complete."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from llama_stack_provider_moe.compute.distributed.full_state import has_sharded_parameters
from llama_stack_provider_moe.compute.export.model_card import CARD
from llama_stack_provider_moe.compute.export.probe import PROBE, Probe
from llama_stack_provider_moe.compute.export.servers import card_section, family_of
from llama_stack_provider_moe.compute.models import rope
from llama_stack_provider_moe.compute.models.generation_ends import write_beside
from llama_stack_provider_moe.compute.models.unsloth.files import as_peft_writes
from llama_stack_provider_moe.compute.moe.adapters import EXPERT_RANKS, expert_ranks
from llama_stack_provider_moe.compute.moe.model_types import is_classifier
from llama_stack_provider_moe.compute.moe.saved_names import names_in_file
from llama_stack_provider_moe.compute.moe.steering import Steering
from llama_stack_provider_moe.compute.runtime.library_signs import transformers_counts
from llama_stack_provider_moe.ground import liveness
from llama_stack_provider_moe.ground.private import as_new_files
from llama_stack_provider_moe.jobdir.attempt import require_current
from llama_stack_provider_moe.jobdir.checkpoint_index import CHECKSUMS, sha256_of, sync, write_checksums
from llama_stack_provider_moe.jobdir.events import now
from llama_stack_provider_moe.jobdir.folder import Artifact, ArtifactKind, Metrics

SHARD = "5GB"  # file size of a whole model; each written file gives a sign of life


def describe(
    job_uuid: str, kind: ArtifactKind, folder: Path, epoch: int, step: int, metrics: Metrics | None = None
) -> Artifact:
    """The manifest entry of a finished folder.

    Args:
        job_uuid: the job's id.
        kind: of artifact.
        folder: the finished one.
        epoch: whole epochs that were trained.
        step: optimiser steps that were taken.
        metrics: of the weights in it, where they were evaluated.
    """
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
    """Write checksums for the folder `written`, sync it, and rename it to `final`, which is replaced if it exists."""
    as_new_files(written)
    write_checksums(written, step)
    paths = [written, *written.rglob("*")]
    for path in liveness.counted("writing to the disk", paths, len(paths), "files"):
        sync(path)
    require_current()
    final.parent.mkdir(parents=True, exist_ok=True)
    remove(final)
    os.rename(written, final)
    return final


def remove(folder: Path) -> None:
    """Delete a folder, if it exists. It is renamed first, so a partly deleted folder never has its name."""
    require_current()
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
    processor: ProcessorMixin | None = None,
) -> None:
    """Write a model, or an adapter alone, with its tokenizer and chat template, into `folder`.

    Args:
        model: a whole model, or one with an adapter.
        tokenizer: the model's.
        folder: may exist.
        as_shipped: restores the config's original values while the model writes it (`ShippedConfig.restored`).
        steering: the routers'; biases that it moved go into a separate file.
        weights: all weights by name, if the model is sharded and this process has only parts.
        processor: of images, if the rows had some.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with as_shipped, transformers_counts():
        if isinstance(model, PeftModel):
            # By default PEFT asks the hub for the base's config, and copies the whole head if it has LoRA. Here the
            # vocabulary never grows, so the embeddings are the base model's.
            # One process alone can't gather a sharded base, so PEFT sees none of its weights.
            own = weights or {
                name: weight for name, weight in model.state_dict().items() if not isinstance(weight, DTensor)
            }
            model.save_pretrained(folder, save_embedding_layers=False, state_dict=own)
            as_peft_writes(folder / CONFIG_NAME)
            (folder / CARD).unlink(missing_ok=True)  # PEFT's template, which nobody has filled in
            _rewrite(folder / SAFETENSORS_WEIGHTS_NAME, names_in_file(model), expert_ranks(model))
            write_beside(model.get_base_model(), folder)
            rope.write_beside(model, folder)
        elif weights is not None and has_sharded_parameters(model):
            _write_gathered(model, weights, folder)
        else:
            model.save_pretrained(folder, state_dict=weights, max_shard_size=SHARD)
    if processor is not None:
        processor.save_pretrained(folder)
    tokenizer.save_pretrained(folder)  # behind the processor's, which is the same without a padding token
    if steering is not None:
        steering.save(folder)


def _write_gathered(model: PreTrainedModel, weights: dict[str, Tensor], folder: Path) -> None:
    """Transformers would gather the weights itself, in all processes, and record the training dtype as theirs."""
    config = model.config
    with _of_one_process(config):
        model.save_pretrained(folder, state_dict=weights, max_shard_size=SHARD)
        trained_in = config.dtype
        (config.dtype,) = {weights[name].dtype for name, _ in model.named_parameters()}
        config.save_pretrained(folder)
        config.dtype = trained_in


@contextmanager
def _of_one_process(config: PreTrainedConfig) -> Iterator[None]:
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
    """Write what `write` does without the weights, which are stored in parts (`sharded_checkpoint`).

    Args:
        model: a whole model.
        tokenizer: the model's.
        folder: may exist.
        as_shipped: restores the config's original values while the model writes it.
        steering: the routers'.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with as_shipped, _of_one_process(model.config):
        model.config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if steering is not None:
        steering.save(folder)


def _rewrite(weights: Path, names: dict[str, str], ranks: dict[str, list[int]]) -> None:
    """Give a saved adapter's tensors other names, and write each expert's rank for weights that are padded with zeros.

    The ranks are in the field `expert_ranks` of the metadata, JSON: name of a tensor -> ranks. They are not in
    adapter_config.json, because PEFT warns of every key there that it does not know.
    """
    if ranks or any(name != own for own, name in names.items()):
        named = {names[own]: tensor for own, tensor in load_file(weights).items()}
        told = {EXPERT_RANKS: json.dumps({names[own]: each for own, each in ranks.items()})} if ranks else {}
        save_file(named, weights, metadata={"format": "pt", **told})


def save(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    final: Path,
    as_shipped: AbstractContextManager[None],
    step: int,
    steering: Steering | None = None,
    probe: Probe | None = None,
    weights: dict[str, Tensor] | None = None,
    card: Callable[[Path], str] | None = None,
    processor: ProcessorMixin | None = None,
) -> Path:
    """`write`, but the folder appears only when it is complete.

    Args:
        model: a whole model, or one with an adapter.
        tokenizer: the model's.
        final: the folder.
        as_shipped: restores the config's original values while the model writes it.
        step: optimiser steps that were taken.
        steering: the routers'.
        probe: the model's recorded logits, saved in the folder.
        weights: all weights by name, if the model is sharded and this process has only parts.
        card: makes the text of README.md from the written folder.
        processor: of images, if the rows had some.
    """
    require_current()
    written = final.with_name(f".{final.name}.writing")
    shutil.rmtree(written, ignore_errors=True)
    with liveness.stage(f"saving {final.name}", unit="files"):
        write(model, tokenizer, written, as_shipped, steering, weights, processor)
    if probe is not None:
        (written / PROBE).write_text(probe.model_dump_json(), encoding="utf-8")
    if card is not None:
        is_served = isinstance(model, PeftModel) and not is_classifier(model.get_base_model())
        servers = card_section(family_of(model), written) if is_served else ""
        (written / CARD).write_text(card(written) + servers, encoding="utf-8")
    return publish(written, final, step)


def merge(model: PeftModel) -> PreTrainedModel:
    """Merge base and adapter into one model. `model` can't be used afterwards."""
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    with liveness.stage("merging the adapter", len(layers), "layers") as counter, _counted_merges(layers, counter):
        merged: PreTrainedModel = model.merge_and_unload(safe_merge=True)
    return merged


@contextmanager
def _counted_merges(layers: list[BaseTunerLayer], counter: liveness.Counter) -> Iterator[None]:
    """Count the layers that PEFT merges; it merges all of them in one call."""

    def counting(merge: Callable[..., None]) -> Callable[..., None]:
        def merge_and_count(*arguments: object, **keywords: object) -> None:
            merge(*arguments, **keywords)
            counter.advance()

        return merge_and_count

    for layer in layers:
        layer.merge = counting(layer.merge)
    try:
        yield
    finally:
        for layer in layers:
            del layer.merge
