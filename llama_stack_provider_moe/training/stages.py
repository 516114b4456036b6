"""The stages that every recipe shares: load, adapt, the trainer's common arguments, train, save."""

import os
import shutil
import time
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, TrainingArguments, set_seed

from llama_stack_provider_moe.errors import ModelError
from llama_stack_provider_moe.evaluation.generate import evaluating
from llama_stack_provider_moe.experts.adapters import AdapterReport, add_lora, train_whole
from llama_stack_provider_moe.experts.backend import (
    ALL_OURS,
    OURS,
    OURS_PARTIAL,
    TRITON,
    TRITON_PARTIAL,
    kernels_of,
    may_forget,
    unserved,
)
from llama_stack_provider_moe.experts.layout import ExpertLayout, find_layout, text_config
from llama_stack_provider_moe.experts.quantize import QuantizeReport, dequantize, quantize, spare_ddp
from llama_stack_provider_moe.experts.rates import Rates
from llama_stack_provider_moe.experts.settings import (
    ExpertsImplementation,
    ResolvedMoe,
    ShippedConfig,
    apply_moe,
    resolve_moe,
)
from llama_stack_provider_moe.experts.sharding import ShardedExperts
from llama_stack_provider_moe.experts.steering import Steering
from llama_stack_provider_moe.export.probe import Arithmetic, Probe, digest, record
from llama_stack_provider_moe.jobs.events import Finished, Saved
from llama_stack_provider_moe.jobs.folder import Artifact, ArtifactKind, Manifest
from llama_stack_provider_moe.training.assess import Assessment, require_gate
from llama_stack_provider_moe.training.callbacks import Reporter
from llama_stack_provider_moe.training.checkpoints import describe, merge, save
from llama_stack_provider_moe.training.expert_parallel import share_experts
from llama_stack_provider_moe.training.loader import DTYPES, keeps_fp32, load, load_tokenizer, pick_device
from llama_stack_provider_moe.training.resume import Resume, agreed_resume, draws_afresh
from llama_stack_provider_moe.training.saver import Enough, Saver
from llama_stack_provider_moe.training.session import AnySession
from llama_stack_provider_moe.training.trackers import OpenTrackers, require_trackers
from llama_stack_provider_moe.training.trainer import RecordingTrainer

MOST_TRIED_TOKENS = 8192  # in the trial of kernels
# Renamed in transformers 5.23, where the older name warns; before, there is only the older one.
_NAMES = {field.name for field in fields(TrainingArguments)}
CHECKPOINTING = "activation_checkpointing" if "activation_checkpointing" in _NAMES else "gradient_checkpointing"


@dataclass(frozen=True)
class Base:
    """The loaded model and all that was decided about it."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    device: torch.device
    layout: ExpertLayout | None
    resolved: ResolvedMoe
    shipped: ShippedConfig
    steering: Steering | None
    quantized: QuantizeReport | None
    experts: ShardedExperts | None = None  # where processes hold experts of their own

    @property
    def vocabulary(self) -> int:
        """Rows of the embedding."""
        return int(self.model.get_input_embeddings().weight.shape[0])


def load_base(session: AnySession, models_loss: bool = True) -> Base:
    """Load the model, find its experts, and make it do what the `moe` block asks; `models_loss`: see `resolve_moe`."""
    spec = session.spec
    require_trackers(spec.trackers)
    repeatable(spec.options.deterministic)
    device = pick_device(spec.training.dtype, session.peers.local_rank)
    if spec.loader == "unsloth":
        return _by_unsloth(session, device)
    bits = spec.adapter.quantize_bits if spec.adapter is not None and spec.adapter.quantize_base else None
    # A model that is to be quantised goes to the device in parts, each quantised as it arrives.
    model, tokenizer = load(spec, device if bits is None else torch.device("cpu"))
    layout = find_layout(model)
    experts = None
    if spec.resources.strategy == "ep":
        assert layout is not None, "its weights would not have been read"
        experts = share_experts(model, layout, session.peers)
    shared = session.peers.size > 1
    resolved = resolve_moe(spec.moe, layout, full=spec.adapter is None, models_loss=models_loss, shared=shared)
    if resolved.experts_implementation in (TRITON, TRITON_PARTIAL) and device.type != "cuda":
        raise ModelError(
            "moe.experts_backend: 'triton' is not valid here; it needs a CUDA GPU (sm_80 or newer), expected 'auto' or "
            "'torch'"
        )
    if bits is not None and layout is not None and resolved.experts_implementation not in ALL_OURS:
        raise ModelError(
            f"adapter.quantize_base: true is not valid with experts {resolved.experts_implementation}; expected "
            "moe.experts_backend 'auto' or 'torch', and moe.enable_moe_optimizations true"
        )
    quantized = None if bits is None else quantize(model, layout, bits, device)
    if layout is not None and device.type == "cuda" and resolved.experts_implementation in (OURS, OURS_PARTIAL):
        resolved = session.peers.agreed(_choose_kernels(session, model, layout, resolved))
    if layout is not None and resolved.experts_implementation in ALL_OURS:
        told = unserved(
            next(iter(layout.experts(model).values())), resolved.experts_implementation, device,
            drops=resolved.expert_dropout > 0 or (spec.adapter is not None and spec.adapter.dropout > 0),
            rank=0 if spec.adapter is None or spec.adapter.plan == "trunk" else spec.adapter.rank,
        )  # fmt: skip
        resolved = replace(resolved, notes=(*resolved.notes, *told))
    shipped = apply_moe(model, layout, resolved)
    if layout is not None and resolved.load_balancing == "aux_free":
        _require_whole_biases(model, layout)
    steering = None if layout is None else Steering(model, layout, resolved)
    return Base(model, tokenizer, device, layout, resolved, shipped, steering, quantized, experts)


def _require_whole_biases(model: PreTrainedModel, layout: ExpertLayout) -> None:
    """Most routers have their biases as buffers; those of Ernie 4.5 are parameters, which FSDP2 shares out."""
    if any(isinstance(bias, DTensor) for bias in layout.biases(model).values()):
        raise ModelError(
            f"moe.moe_load_balancing: 'aux_free' is not valid with resources.strategy 'fsdp' and {layout.family}: the "
            "biases that it moves are shared out; expected 'switch' or 'gshard', or strategy 'ddp'"
        )


def _by_unsloth(session: AnySession, device: torch.device) -> Base:
    from llama_stack_provider_moe.training import unsloth_base  # Unsloth is in its own environment alone

    spec = session.spec
    tokenizer = load_tokenizer(spec)
    model, layout = unsloth_base.load(spec, device)
    resolved = unsloth_base.resolve(spec, layout)
    coded = unsloth_base.quantized(spec, model, layout)
    return Base(model, tokenizer, device, layout, resolved, ShippedConfig(text_config(model), {}), None, coded)


def repeatable(asked: bool) -> None:
    """Have torch take, or no longer take, only operations that give the same twice; kernels of ours heed it too."""
    if asked:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS sums in one order only with it
    torch.use_deterministic_algorithms(asked)
    # Memory nobody has written is not read here; filling it costs time.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def _choose_kernels(
    session: AnySession, model: PreTrainedModel, layout: ExpertLayout, resolved: ResolvedMoe
) -> ResolvedMoe:
    """`moe.experts_backend: auto` on a GPU: torch's or Triton's kernels, by a trial on a layer of the model."""
    spec = session.spec
    if spec.moe.experts_backend != "auto":
        return resolved
    experts = next(iter(layout.experts(model).values()))
    against = None
    if spec.resources.strategy == "ep":
        against = "each process has experts of its own (resources.strategy ep)"
    elif spec.options.deterministic:
        against = "the clock is not to choose (options.deterministic)"
    elif not may_forget(experts):
        against = "experts have a norm of their own"
    elif torch.cuda.get_device_capability() < (8, 0):
        against = "they need sm_80 or newer"
    elif find_spec("triton") is None:
        against = "triton is not installed"
    if against is not None:
        return replace(resolved, notes=(*resolved.notes, f"no trial of Triton's kernels: {against}"))
    from llama_stack_provider_moe.experts.trial import quickest, tell, try_layer  # triton is not everywhere

    tokens = min(spec.training.batch_size * spec.options.max_length, MOST_TRIED_TOKENS)
    trials = try_layer(
        experts,
        {name: kernels_of(name) for name in (OURS, TRITON)},
        tokens=tokens,
        hidden=int(text_config(model).hidden_size),
        top_k=layout.top_k,
        rank=0 if spec.adapter is None else spec.adapter.rank,
    )
    partial = resolved.experts_implementation == OURS_PARTIAL
    taken: ExpertsImplementation = OURS if quickest(trials) == OURS else TRITON
    if partial:
        taken = OURS_PARTIAL if taken == OURS else TRITON_PARTIAL
    return replace(resolved, experts_implementation=taken, notes=(*resolved.notes, tell(trials, tokens)))


def adapt(session: AnySession, base: Base) -> tuple[PreTrainedModel | PeftModel, AdapterReport, Rates]:
    """Put LoRA on the model, or let all of it train; from here on a process has its own experts alone."""
    model, report, rates = _adapt(session, base)
    if base.experts is not None:
        base.experts.take(model, rates)
    return model, report, rates


def _adapt(session: AnySession, base: Base) -> tuple[PreTrainedModel | PeftModel, AdapterReport, Rates]:
    spec = session.spec
    set_seed(spec.options.seed)
    if spec.loader == "unsloth":
        from llama_stack_provider_moe.training import unsloth_base

        by_unsloth = unsloth_base.adapt(spec, base.model, base.layout, base.resolved)
        return by_unsloth.model, by_unsloth.report, by_unsloth.rates
    if spec.adapter is not None:
        adapted = add_lora(base.model, spec.adapter, base.layout, base.resolved)
        if base.quantized is not None:
            spare_ddp(adapted.model)
        return adapted.model, adapted.report, adapted.rates
    if spec.training.dtype == "bf16" and not keeps_fp32(spec):
        session.say(
            "all weights train in bf16: a step that moves a weight by less than 1/256 of itself is rounded away; "
            "training.dtype 'fp32' keeps it",
            "warning",
        )
    return base.model, train_whole(base.model, base.layout, base.resolved), Rates()


def arguments(session: AnySession, base: Base) -> dict[str, Any]:
    """The arguments that all trainers share; everything a library would choose by itself is stated."""
    spec = session.spec
    scheduler = spec.options.lr_scheduler
    return {
        "output_dir": str(session.staging),
        "num_train_epochs": spec.training.n_epochs,
        "per_device_train_batch_size": spec.training.batch_size,
        "per_device_eval_batch_size": spec.training.batch_size,
        "average_tokens_across_devices": True,  # a mean over tokens is one over those of all processes
        "gradient_accumulation_steps": spec.training.gradient_accumulation_steps,
        "learning_rate": spec.optimizer.lr,
        "weight_decay": spec.optimizer.weight_decay,
        "warmup_steps": spec.optimizer.num_warmup_steps,
        "lr_scheduler_type": "constant_with_warmup" if scheduler == "constant" else scheduler,
        "max_grad_norm": spec.options.max_grad_norm,  # 0: the norm is measured, never clipped
        "seed": spec.options.seed,
        "bf16": spec.training.dtype == "bf16",
        "fp16": spec.training.dtype == "fp16",
        "use_cpu": base.device.type == "cpu",
        # Every weight that trains gets a gradient in every pass, or the next one fails and says so; looking for those
        # that got none would overlook what reaches the loss beside the model's output (the routers' balance terms).
        "ddp_find_unused_parameters": False,
        # Buffers are equal by construction, and writing them between two passes would spoil the first one's backward.
        "ddp_broadcast_buffers": False,
        "dataloader_pin_memory": base.device.type == "cuda",
        "dataloader_num_workers": spec.options.dataloader_workers,
        "dataloader_persistent_workers": spec.options.dataloader_workers > 0,
        CHECKPOINTING: spec.efficiency.enable_activation_checkpointing,
        # Reentrant checkpointing runs the layers without gradients: the aux loss would lose its own in silence.
        f"{CHECKPOINTING}_kwargs": {"use_reentrant": False},
        "logging_strategy": "steps",
        "logging_steps": 1,
        "logging_nan_inf_filter": False,  # a loss that is no number is to end the run, not to be averaged over
        "save_strategy": "no",  # `Saver` asks, at its own times
        "eval_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def fit(session: AnySession, base: Base, trainer: RecordingTrainer, foreseen_steps: int) -> Manifest:
    """Train, from a checkpoint where there is one, and save what is left at the end."""
    resume = agreed_resume(session)
    assessment, early = None, None
    if session.spec.eval is not None and session.peers.leads:
        assessment = Assessment(session, trainer.model, base.tokenizer, base.layout)
        early = assessment.before()
    session.peers.wait()
    trackers = OpenTrackers(session, 0 if resume is None else resume.step)
    finished = False
    try:
        if early is not None and (resume is None or resume.step == 0):  # else an earlier start has told them
            trackers.tell(early)
        manifest = _fit(session, base, trainer, foreseen_steps, resume, assessment, trackers)
        finished = True
        return manifest
    finally:
        trackers.close(finished)  # as the job ends: one that its gate fails has not finished there either


def _fit(
    session: AnySession,
    base: Base,
    trainer: RecordingTrainer,
    foreseen_steps: int,
    resume: Resume | None,
    assessment: Assessment | None,
    trackers: OpenTrackers,
) -> Manifest:
    reporter = Reporter(session, trainer, trackers, resume)
    saver = Saver(session, trainer, reporter, resume)
    for callback in (reporter, saver):
        trainer.add_callback(callback)
    trainer.remove_callback(PrinterCallback)
    if session.peers.size > 1 or draws_afresh(session, resume):
        trainer.draw_apart(0 if resume is None else resume.step)
    with suppress(Enough):
        trainer.train(resume_from_checkpoint=None if resume is None else str(resume.folder))
    steps, stopped_by = trainer.state.global_step, saver.stopped_by
    assert steps == foreseen_steps or stopped_by, f"{steps} steps, foreseen {foreseen_steps}"
    last = saver.artifacts[-1]
    if stopped_by == "early_stopping" and saver.best is not None and saver.best.path != last.path:
        last = saver.best
        session.say(f"the best checkpoint, {Path(last.path).name}, is what the job leaves")
        trainer.restore(trainer.model, Path(last.path))
    train_seconds = reporter.train_seconds()
    saver.mirroring.finish()
    probe = None
    # In all processes where they share the model out, and in none where Unsloth's arithmetic would be compared.
    if session.spec.loader == "hf" and (session.peers.leads or session.spec.resources.sharded):
        trainer.rest()
        probe = _asked(session, base, trainer)
    weights = trainer.whole_weights(DTYPES[session.spec.training.dtype])
    if not session.peers.leads:  # one saves what all of them have
        return Manifest(job_uuid=session.job_uuid, artifacts=[], summary={})
    kind: ArtifactKind = "adapter" if isinstance(trainer.model, PeftModel) else "model"
    artifacts = [*saver.artifacts, _keep(session, base, kind, trainer.model, last, probe, weights)]
    report = None
    if assessment is not None:  # of the model that was just saved, before merging uses it up
        trainer.rest()
        artifact, report, late = assessment.after(last.epoch, last.step)
        artifacts.append(artifact)
        trackers.tell(late)
    throughput = reporter.throughput()
    session.events.append(Finished(train_seconds=train_seconds, stopped_by=stopped_by, throughput=throughput))
    artifacts += _save_merged(session, base, trainer, last)
    shutil.rmtree(session.cache)
    shutil.rmtree(session.staging, ignore_errors=True)
    if report is not None:
        require_gate(report)
    return Manifest(
        job_uuid=session.job_uuid,
        artifacts=artifacts,
        summary={**reporter.last, **reporter.held_out},
        stopped_by=stopped_by,
    )


def _asked(session: AnySession, base: Base, trainer: RecordingTrainer) -> Probe:
    """What the trained model says; whoever loads it later is to hear the same (`export.load_check`)."""
    began = time.monotonic()
    arithmetic = Arithmetic(
        dtype=session.spec.training.dtype,
        device=base.device.type,
        quantize_bits=None if base.quantized is None else base.quantized.bits,
        experts_implementation=base.resolved.experts_implementation,
    )
    biases = None  # of a whole model they are in its weights
    if isinstance(trainer.model, PeftModel) and base.layout and base.resolved.load_balancing == "aux_free":
        biases = digest(base.layout.biases(trainer.model))
    with evaluating(trainer.model):
        probe = record(trainer.model, base.tokenizer, arithmetic, biases)
    if session.peers.leads:
        took_s = time.monotonic() - began
        print(f"logits at {probe.positions} positions recorded for the load check, {took_s:.2f} s", flush=True)
    return probe


def _save_merged(session: AnySession, base: Base, trainer: RecordingTrainer, last: Artifact) -> list[Artifact]:
    if not session.spec.options.save_merged:
        return []
    if not isinstance(trainer.model, PeftModel):
        session.say("options.save_merged: all weights were trained, so artifacts/model is the whole model already")
        return []
    if base.quantized is not None:
        dequantize(trainer.model, base.layout)
    return [_keep(session, base, "merged", merge(trainer.model), last)]


def _keep(
    session: AnySession,
    base: Base,
    kind: ArtifactKind,
    model: PreTrainedModel | PeftModel,
    last: Artifact,
    probe: Probe | None = None,
    weights: dict[str, torch.Tensor] | None = None,
) -> Artifact:
    target = session.folder.artifacts / kind
    save(model, base.tokenizer, target, base.shipped.restored(), last.step, base.steering, probe, weights)
    made = describe(session.job_uuid, kind, target, last.epoch, last.step, last.metrics)
    session.events.append(Saved(artifact=made.model_dump(mode="json")))
    return made
