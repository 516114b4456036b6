"""The first stages of every recipe: load the model, choose its kernels, and add what trains."""

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from peft import PeftModel
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from llama_stack_provider_moe.compute.distributed.expert_parallel import share_experts
from llama_stack_provider_moe.compute.models.adapter_start import start_from
from llama_stack_provider_moe.compute.models.backend import backend_of
from llama_stack_provider_moe.compute.models.classifier import load_new_classifier, load_quantized_classifier
from llama_stack_provider_moe.compute.models.loader import keeps_fp32, load, load_tokenizer, pick_device
from llama_stack_provider_moe.compute.models.quantized_loading import coding_of, load_quantized
from llama_stack_provider_moe.compute.models.rope import extend, extension
from llama_stack_provider_moe.compute.models.vision import load_images, require_tower
from llama_stack_provider_moe.compute.moe import implementation
from llama_stack_provider_moe.compute.moe.adapters import HEAD, Adapted, AdapterReport, add_lora, train_whole
from llama_stack_provider_moe.compute.moe.derive import find_layout
from llama_stack_provider_moe.compute.moe.layout import ExpertLayout, text_config
from llama_stack_provider_moe.compute.moe.quantize import QuantizeReport, spare_ddp
from llama_stack_provider_moe.compute.moe.rates import Rates
from llama_stack_provider_moe.compute.moe.resolve_settings import ResolvedMoe, ShippedConfig, apply_moe, resolve_moe
from llama_stack_provider_moe.compute.moe.saved_names import names_in_file
from llama_stack_provider_moe.compute.moe.sharding import ShardedExperts
from llama_stack_provider_moe.compute.moe.steering import Steering
from llama_stack_provider_moe.compute.runtime.context import AnySession
from llama_stack_provider_moe.errors import ModelError
from llama_stack_provider_moe.ground import liveness
from llama_stack_provider_moe.jobdir.experts_backend import read_override
from llama_stack_provider_moe.spec import Moe, SFTSpec, TrainingSpec
from llama_stack_provider_moe.spec.blocks import OF_BITSANDBYTES

if TYPE_CHECKING:
    from llama_stack_provider_moe.compute.models.images import Images


@dataclass(frozen=True)
class Base:
    """The loaded model and what was decided about it.

    Attributes:
        model: without adapters.
        tokenizer: with a padding token, and with a chat template if the job has conversations.
        device: where the model runs.
        layout: where its experts are; None for a dense model.
        resolved: what applies of the `moe` block.
        shipped: the settings of the model's config that were changed, to restore in what is saved.
        steering: of its routers.
        quantized: what is quantised, if anything is.
        experts: the experts of this process, if processes share them.
        images: turns the rows' images into tokens and tensors, if rows have some.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    device: torch.device
    layout: ExpertLayout | None
    resolved: ResolvedMoe
    shipped: ShippedConfig
    steering: Steering | None
    quantized: QuantizeReport | None
    experts: ShardedExperts | None = None
    images: "Images | None" = None

    @property
    def vocabulary(self) -> int:
        """The number of rows of the embedding."""
        return int(self.model.get_input_embeddings().weight.shape[0])


def load_base(session: AnySession, models_loss: bool = True, classifier: bool = False) -> Base:
    """Load the model, find its experts, and make it do what the `moe` block asks.

    Args:
        session: the job's.
        models_loss: see `resolve_moe`.
        classifier: load it as a reward model with a new head (`models.classifier`).
    """
    spec = session.spec
    repeatable(spec.options.deterministic)
    device = pick_device(spec.training.dtype, session.peers.local_rank)
    coding, quantized = coding_of(spec.adapter), None
    images = load_images(session)
    if classifier:
        (model, layout, quantized), tokenizer = _load_classifier(session, device)
    elif coding is None:
        model, tokenizer = load(spec, device, has_conversations(session) and images is None)
        layout = find_layout(model)
    else:
        talks, offload = has_conversations(session), spec.efficiency.offload_experts
        read, tokenizer = load_quantized(spec, device, coding, "adapter.quantize_base", talks, offload)
        model, layout, quantized = read
    if isinstance(spec, SFTSpec) and spec.options.rope_scaling is not None:
        extend(model, extension(text_config(model), spec.options.rope_scaling))
    if images is not None:
        session.show(require_tower(model, tokenizer, images))
    experts = None
    if spec.resources.strategy == "ep":
        assert layout is not None, "its weights would not have been read"
        experts = share_experts(model, layout, session.peers)
    shared = session.peers.size > 1
    moe, notes = moe_now(session)
    resolved = resolve_moe(moe, layout, full=spec.adapter is None, models_loss=models_loss, shared=shared)
    implementation.check(spec, resolved.experts_implementation, device)
    if layout is not None:
        choice = implementation.choose(spec, moe, model, layout, device, session.peers.decided)
        resolved = resolved.with_experts(replace(choice, notes=(*notes, *choice.notes)))
    shipped = apply_moe(model, layout, resolved)
    if layout is not None and resolved.load_balancing == "aux_free":
        _require_whole_biases(model, layout)
    steering = None if layout is None else Steering(model, layout, resolved)
    return Base(model, tokenizer, device, layout, resolved, shipped, steering, quantized, experts, images)


def _load_classifier(
    session: AnySession, device: torch.device
) -> tuple[tuple[PreTrainedModel, ExpertLayout | None, QuantizeReport | None], PreTrainedTokenizerBase]:
    spec, coding = session.spec, coding_of(session.spec.adapter)
    tokenizer = load_tokenizer(spec)
    set_seed(spec.options.seed)  # of the new head
    name, dtype, pad = spec.model, spec.training.dtype, tokenizer.pad_token_id
    found: tuple[PreTrainedModel, ExpertLayout | None, QuantizeReport | None]
    if coding is None:
        made = load_new_classifier(name, dtype, device, pad)
        found = made, find_layout(made), None
    else:
        found = load_quantized_classifier(name, dtype, device, pad, coding, spec.efficiency.offload_experts)
    head = found[0].get_submodule(HEAD).weight
    session.show(f"head      new: {HEAD}, {head.numel():,} numbers drawn at random; the output head is left out")
    return found, tokenizer


def moe_now(session: AnySession) -> tuple[Moe, tuple[str, ...]]:
    """The job's `moe` block with the backend that replaces its own, if one does, and what the log says of it."""
    moe = session.spec.moe
    override = read_override(session.folder)
    if override is None or override.experts_backend == moe.experts_backend:
        return moe, ()
    note = f"moe.experts_backend is {override.experts_backend}, not {moe.experts_backend}: {override.reason}"
    return moe.model_copy(update={"experts_backend": override.experts_backend}), (note,)


def has_conversations(session: AnySession) -> bool:
    """Whether the job trains on conversations or evaluates with them: plain texts need no chat template."""
    parts = [source.part for source in session.spec.row_sources() if source.kind != "judged"]
    return not all(_only_texts(session.folder.rows(part)) for part in parts)


def _only_texts(rows: Path) -> bool:
    # A canonical row of text has this key alone, and Python writes it so: a million lines need no parsing.
    with rows.open("rb") as lines:
        return all(line.startswith(b'{"text":') for line in lines)


def _require_whole_biases(model: PreTrainedModel, layout: ExpertLayout) -> None:
    """Most routers keep their biases in buffers; those of Ernie 4.5 are parameters, which FSDP2 shards."""
    if any(isinstance(bias, DTensor) for bias in layout.biases(model).values()):
        raise ModelError(
            f"moe.moe_load_balancing: 'aux_free' is not valid with resources.strategy 'fsdp' and {layout.family}: the "
            "router biases that it changes are sharded; expected 'switch' or 'gshard', or strategy 'ddp'"
        )


def repeatable(asked: bool) -> None:
    """Turn torch's deterministic operations on or off; the kernels of this project respect the setting too."""
    if asked:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS sums in a varying order
    torch.use_deterministic_algorithms(asked)
    # Nothing here reads uninitialised memory; filling it costs time.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def adapt(session: AnySession, base: Base) -> tuple[PreTrainedModel | PeftModel, AdapterReport, Rates]:
    """Add LoRA to the model, or make all its weights trainable; afterwards a process has only its own experts."""
    with liveness.stage("preparing what trains"):
        set_seed(session.spec.options.seed)
        model, report, rates = backend_of(session.spec).adapt(session, base)
    if base.experts is not None:
        base.experts.take(model, rates)
    return model, report, rates


def make_trainable(session: AnySession, base: Base) -> tuple[PreTrainedModel | PeftModel, AdapterReport, Rates]:
    """Add LoRA with PEFT, or make all weights trainable: `Backend.adapt` for transformers' models."""
    spec = session.spec
    if spec.adapter is not None:
        adapted = add_lora(base.model, spec.adapter, base.layout, base.resolved)
        names_in_file(adapted.model)  # an adapter that PEFT would not find again is refused before it is trained
        if base.quantized is not None:
            spare_ddp(adapted.model)
        return adapted.model, _report_with_start(spec, base, adapted), adapted.rates
    rounds_at_random = spec.optimizer.optimizer_type in OF_BITSANDBYTES
    if spec.training.dtype == "bf16" and not keeps_fp32(spec) and not rounds_at_random:
        session.say(
            "all weights train in bf16: a step that changes a weight by less than 1/256 of its value is lost in "
            "rounding; training.dtype 'fp32' keeps it, and optimizer.optimizer_type 'adamw_8bit' does on average",
            "warning",
        )
    return base.model, train_whole(base.model, base.layout, base.resolved), Rates()


def _report_with_start(spec: TrainingSpec, base: Base, adapted: Adapted) -> AdapterReport:
    """Load the adapter that the job starts from, if any. Every process still has all experts at this point."""
    if spec.adapter is None or spec.adapter.init_from is None:
        return adapted.report
    moves_biases = spec.recipe == "sft" and base.resolved.load_balancing == "aux_free"
    note = start_from(adapted.model, Path(spec.adapter.init_from), base.steering, moves_biases)
    return replace(adapted.report, notes=(*adapted.report.notes, note))
