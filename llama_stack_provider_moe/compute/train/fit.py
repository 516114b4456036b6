"""A run from its trainer's arguments to its manifest: announce, train, save."""

import math
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import fields
from pathlib import Path

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PrinterCallback, TrainingArguments

from llama_stack_provider_moe.compute.evaluation.generate import evaluating
from llama_stack_provider_moe.compute.export.model_card import Kind, Source, model_card, recorded
from llama_stack_provider_moe.compute.export.probe import Arithmetic, Probe, digest, record
from llama_stack_provider_moe.compute.models.backend import backend_of
from llama_stack_provider_moe.compute.models.loader import DTYPES
from llama_stack_provider_moe.compute.models.prepare import Base
from llama_stack_provider_moe.compute.models.rope import extension_of
from llama_stack_provider_moe.compute.moe.quantize import dequantize, merge_memory
from llama_stack_provider_moe.compute.runtime.context import AnySession
from llama_stack_provider_moe.compute.train.announce import announce
from llama_stack_provider_moe.compute.train.by_position import ByPosition
from llama_stack_provider_moe.compute.train.by_position import keep as keep_positions
from llama_stack_provider_moe.compute.train.checkpoints import describe, merge, save
from llama_stack_provider_moe.compute.train.domain_routing import analyse_domains, keep_report
from llama_stack_provider_moe.compute.train.kernel_failure import kernels_may_fail
from llama_stack_provider_moe.compute.train.prepared import AnyPrepared
from llama_stack_provider_moe.compute.train.reporter import Reporter
from llama_stack_provider_moe.compute.train.resume import Resume, agreed_resume, lacks_random_state
from llama_stack_provider_moe.compute.train.safety_eval import Assessment, require_gate
from llama_stack_provider_moe.compute.train.saver import Interrupted, NothingLeftToTrain, Saver
from llama_stack_provider_moe.compute.train.trackers import OpenTrackers
from llama_stack_provider_moe.compute.train.trainer import RecordingTrainer
from llama_stack_provider_moe.ground import liveness
from llama_stack_provider_moe.jobdir.attempt import require_current
from llama_stack_provider_moe.jobdir.events import Finished, Saved
from llama_stack_provider_moe.jobdir.folder import Artifact, ArtifactKind, Manifest

_NAMES = {field.name for field in fields(TrainingArguments)}
# Transformers 5.23 renamed it and warns of the old name; earlier versions have only the old one.
CHECKPOINTING = "activation_checkpointing" if "activation_checkpointing" in _NAMES else "gradient_checkpointing"


def arguments(prepared: AnyPrepared) -> dict[str, object]:
    """The arguments that all recipes' trainers share. Nothing important is left to a library's default."""
    session, base = prepared.session, prepared.base
    spec = session.spec
    scheduler = spec.options.lr_scheduler
    return {
        "output_dir": str(session.staging),
        "num_train_epochs": spec.training.n_epochs,
        "per_device_train_batch_size": spec.training.batch_size,
        "per_device_eval_batch_size": spec.training.batch_size,
        "average_tokens_across_devices": True,  # means are over the tokens of all processes
        "gradient_accumulation_steps": spec.training.gradient_accumulation_steps,
        "learning_rate": spec.optimizer.lr,
        "weight_decay": spec.optimizer.weight_decay,
        "warmup_steps": spec.optimizer.num_warmup_steps,
        "lr_scheduler_type": "constant_with_warmup" if scheduler == "constant" else scheduler,
        "max_grad_norm": spec.options.max_grad_norm,  # 0: measure the norm, don't clip
        "seed": spec.options.seed,
        "bf16": spec.training.dtype == "bf16",
        "fp16": spec.training.dtype == "fp16",
        "use_cpu": base.device.type == "cpu",
        # Every trained weight must get a gradient in every pass; else the next pass fails with an error. The search for
        # unused weights misses what reaches the loss beside the model's output (the routers' balance terms).
        "ddp_find_unused_parameters": False,
        # Buffers are equal anyway, and writing them between two passes would break the backward of the first.
        "ddp_broadcast_buffers": False,
        "dataloader_pin_memory": base.device.type == "cuda",
        "dataloader_num_workers": spec.options.dataloader_workers,
        "dataloader_persistent_workers": spec.options.dataloader_workers > 0,
        CHECKPOINTING: spec.efficiency.enable_activation_checkpointing,
        # Reentrant checkpointing runs the layers without gradients, so the aux loss would silently have none.
        f"{CHECKPOINTING}_kwargs": {"use_reentrant": False},
        "logging_strategy": "steps",
        "logging_steps": 1,
        "logging_nan_inf_filter": False,  # a NaN loss must end the run, not be averaged away
        "save_strategy": "no",  # `Saver` decides when
        "eval_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def fit(
    prepared: AnyPrepared, trainer: RecordingTrainer, decisions: Mapping[str, object], shown: str | None = None
) -> Manifest:
    """Announce the run, train, and save the result.

    Args:
        prepared: model and rows.
        trainer: the recipe's, made from them.
        decisions: those that only this recipe makes, for `resolved.json`.
        shown: lines about them for output.log.
    """
    steps = announce(prepared, trainer.sequences, {**decisions, "routing_every_n_steps": trainer.steps_between_tables})
    if shown is not None:
        prepared.session.show(shown)
    return train_and_save(prepared.session, prepared.base, trainer, steps)


def train_and_save(session: AnySession, base: Base, trainer: RecordingTrainer, foreseen_steps: int) -> Manifest:
    """Train, from a checkpoint if there is one, and save the result.

    Args:
        session: the job's.
        base: its loaded model.
        trainer: the recipe's.
        foreseen_steps: the optimiser steps that were announced.
    """
    resume = agreed_resume(session)
    assessment, early = None, None
    if session.spec.eval is not None and session.peers.leads:
        assessment = Assessment(session, trainer.model, base.tokenizer, base.layout)
        early = assessment.before()
    by_position = None
    if extension_of(trainer.model) is not None and (session.peers.leads or session.spec.resources.sharded):
        by_position = ByPosition(session, trainer)
        by_position.before()
    session.peers.wait()
    trackers = OpenTrackers(session, 0 if resume is None else resume.step)
    finished = False
    try:
        if early is not None and (resume is None or resume.step == 0):  # else an earlier start logged them
            trackers.log(early)
        manifest = _fit(session, base, trainer, foreseen_steps, resume, assessment, trackers, by_position)
        finished = True
        return manifest
    finally:
        trackers.close(finished)  # a job that fails its gate is not finished for trackers either


def _fit(
    session: AnySession,
    base: Base,
    trainer: RecordingTrainer,
    foreseen_steps: int,
    resume: Resume | None,
    assessment: Assessment | None,
    trackers: OpenTrackers,
    by_position: ByPosition | None,
) -> Manifest:
    reporter = Reporter(session, trainer, trackers, resume)
    saver = Saver(session, trainer, reporter, resume)
    for callback in (reporter, saver):
        trainer.add_callback(callback)
    trainer.remove_callback(PrinterCallback)
    if session.peers.size > 1 or lacks_random_state(session, resume):
        trainer.seed_process(0 if resume is None else resume.step)
    with suppress(NothingLeftToTrain), kernels_may_fail(session, base, trainer, saver), reporter.training():
        try:
            trainer.train(resume_from_checkpoint=None if resume is None else str(resume.folder))
        except Interrupted:
            saver.stop_at_last_step()
    steps, stopped_by = trainer.state.global_step, saver.stopped_by
    assert steps == foreseen_steps or stopped_by, f"{steps} steps, foreseen {foreseen_steps}"
    last = saver.artifacts[-1]
    if stopped_by == "early_stopping" and saver.best is not None and saver.best.path != last.path:
        last = saver.best
        session.say(f"the job keeps the best checkpoint, {Path(last.path).name}, as its result")
        trainer.restore(trainer.model, Path(last.path))
    train_seconds = reporter.train_seconds()
    saver.mirroring.finish()
    probe = None
    # In all processes where they share the model out, and in none where a load check could not compare the logits.
    if backend_of(session.spec).has_load_check and (session.peers.leads or session.spec.resources.sharded):
        trainer.rest()
        probe = _probe(session, base, trainer)
    routing = None
    if session.peers.leads or session.spec.resources.sharded:
        routing = analyse_domains(session, trainer)
    positions = None if by_position is None else by_position.after()
    weights = trainer.whole_weights(DTYPES[session.spec.training.dtype])
    if not session.peers.leads:  # rank 0 saves
        return Manifest(job_uuid=session.job_uuid, artifacts=[], summary={})
    kind: Kind = "adapter" if isinstance(trainer.model, PeftModel) else "model"
    summary = {**reporter.last, **reporter.held_out}
    card = _card(session, kind, last, summary)
    artifacts = [*saver.artifacts, _keep(session, base, kind, trainer.model, last, card, probe, weights)]
    if routing is not None:
        artifacts.append(keep_report(session, routing, last.epoch, last.step))
    if positions is not None:
        artifacts.append(keep_positions(session, positions, last.epoch, last.step))
    report = None
    if assessment is not None:  # before the merge, which changes the model
        trainer.rest()
        artifact, report, late = assessment.after(last.epoch, last.step)
        artifacts.append(artifact)
        trackers.log(late)
    throughput = reporter.throughput()
    session.events.append(Finished(train_seconds=train_seconds, stopped_by=stopped_by, throughput=throughput))
    artifacts += _save_merged(session, base, trainer, last, summary)
    require_current()
    shutil.rmtree(session.cache)
    shutil.rmtree(session.staging, ignore_errors=True)
    if report is not None:
        require_gate(report)
    return Manifest(
        job_uuid=session.job_uuid,
        artifacts=artifacts,
        summary=summary,
        stopped_by=stopped_by,
    )


def _probe(session: AnySession, base: Base, trainer: RecordingTrainer) -> Probe:
    """Record logits of the trained model, for comparison after it is loaded again (`compute.export.load_check`)."""
    began = time.monotonic()
    arithmetic = Arithmetic(
        dtype=session.spec.training.dtype,
        device=base.device.type,
        quantize_bits=None if base.quantized is None else base.quantized.bits,
        quantize_scales=base.quantized is not None and base.quantized.nested,
        experts_implementation=base.resolved.experts_implementation,
    )
    biases = None  # a whole model has them in its weights
    if isinstance(trainer.model, PeftModel) and base.layout and base.resolved.load_balancing == "aux_free":
        biases = digest(base.layout.biases(trainer.model))
    with liveness.stage("recording logits"), evaluating(trainer.model):
        processor = None if base.images is None else base.images.processor
        probe = record(trainer.model, base.tokenizer, arithmetic, biases, processor)
    if session.peers.leads:
        took_s = time.monotonic() - began
        print(f"logits at {probe.positions} positions recorded for the load check, {took_s:.2f} s", flush=True)
    return probe


def _save_merged(
    session: AnySession, base: Base, trainer: RecordingTrainer, last: Artifact, summary: Mapping[str, float]
) -> list[Artifact]:
    if not session.spec.options.save_merged:
        return []
    if not isinstance(trainer.model, PeftModel):
        session.say("options.save_merged: all weights were trained, so artifacts/model is already the whole model")
        return []
    if base.quantized is not None:
        room, needed = _free_bytes(base.device), merge_memory(trainer.model).total
        if needed > room:
            session.say(
                f"options.save_merged: the base is decoded in main memory; that takes {needed / 1e9:.1f} GB, and the "
                f"GPU has {room / 1e9:.1f} GB free"
            )
        dequantize(trainer.model, base.layout, room)
    card = _card(session, "merged", last, summary)
    return [_keep(session, base, "merged", merge(trainer.model), last, card)]


def _free_bytes(device: torch.device) -> float:
    """Of a GPU; a CPU has no other memory to go to."""
    if device.type != "cuda":
        return math.inf
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)[0]


def _card(session: AnySession, kind: Kind, last: Artifact, summary: Mapping[str, float]) -> Callable[[Path], str]:
    """What writes the model card of an artifact, when its files are written."""

    def card(written: Path) -> str:
        adapter = session.folder.adapter if kind == "merged" else written  # its config is the adapter's
        source = Source(adapter, session.spec, last, summary, *recorded(session.folder))
        return model_card(kind, session.spec.model, source)

    return card


def _keep(
    session: AnySession,
    base: Base,
    kind: ArtifactKind,
    model: PreTrainedModel | PeftModel,
    last: Artifact,
    card: Callable[[Path], str],
    probe: Probe | None = None,
    weights: dict[str, torch.Tensor] | None = None,
) -> Artifact:
    target = session.folder.artifacts / kind
    shipped, processor = base.shipped.restored(), None if base.images is None else base.images.processor
    save(model, base.tokenizer, target, shipped, last.step, base.steering, probe, weights, card, processor)
    made = describe(session.job_uuid, kind, target, last.epoch, last.step, last.metrics)
    session.events.append(Saved(artifact=made.model_dump(mode="json")))
    return made
