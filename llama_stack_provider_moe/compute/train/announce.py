"""Announce what a run decided before its first step: in an event, in `resolved.json`, and as lines in output.log."""

from collections.abc import Mapping
from dataclasses import asdict

from pydantic import TypeAdapter
from torch import nn

from llama_stack_provider_moe.compute.data.sampling import rows_a_step, rows_an_epoch, steps_an_epoch
from llama_stack_provider_moe.compute.models.loader import keeps_fp32
from llama_stack_provider_moe.compute.models.prepare import Base
from llama_stack_provider_moe.compute.models.rope import extension_of, plan_of
from llama_stack_provider_moe.compute.moe.adapters import AdapterReport
from llama_stack_provider_moe.compute.moe.vision_parts import trained_text
from llama_stack_provider_moe.compute.runtime.context import AnySession
from llama_stack_provider_moe.compute.train.optimizers import foreseen
from llama_stack_provider_moe.compute.train.prepared import AnyPrepared
from llama_stack_provider_moe.ground.counting import number_of
from llama_stack_provider_moe.jobdir.events import Plan as PlanEvent
from llama_stack_provider_moe.jobdir.folder import write_atomic
from llama_stack_provider_moe.jobdir.row_reports import report_lines
from llama_stack_provider_moe.jobdir.row_sources import source_lines
from llama_stack_provider_moe.spec import TrainingSpec
from llama_stack_provider_moe.spec.blocks import OF_BITSANDBYTES

Plan = dict[str, object]
_JSON: TypeAdapter[Plan] = TypeAdapter(Plan)


def announce(prepared: AnyPrepared, sequences: int, decisions: Mapping[str, object]) -> int:
    """Write the plan to all three places, and return the number of optimiser steps.

    Args:
        prepared: model and rows.
        sequences: training sequences in a full epoch (`RecordingTrainer.sequences`).
        decisions: those that only this recipe makes.
    """
    session, base, rows, report = prepared.session, prepared.base, prepared.rows, prepared.report
    spec = session.spec
    steps = steps_an_epoch(spec.training, sequences, session.peers.size)
    steps_in_all = steps * spec.training.n_epochs
    plan: Plan = {
        "recipe": spec.recipe,
        "model": spec.model,
        "model_from": spec.model_from,
        "architecture": type(base.model).__name__,
        "device": str(base.device),
        "processes": session.peers.size,
        "strategy": spec.resources.strategy,
        "memory": None if session.forecast is None else session.forecast.figures,
        "experts_a_process": None if base.experts is None else base.experts.shard.experts_each,
        "dtype": spec.training.dtype,
        "attention": base.model.config._attn_implementation,
        "layout": None if base.layout is None else base.layout.as_json(),
        "moe": asdict(base.resolved),
        "adapter": report.as_json(),
        "optimizer": asdict(foreseen(spec.optimizer, prepared.model)),
        "quantized": None if base.quantized is None else base.quantized.as_json(),
        "train_rows": len(rows.train),
        "train_sequences": sequences,
        "validation_rows": 0 if rows.validation is None else len(rows.validation),
        "source_rows": rows.total.source,
        "truncated_rows": rows.total.cut,
        "dropped_rows": rows.total.dropped.count,
        "domains": _domains(prepared),
        "rope": plan_of(prepared.model),
        "steps_per_epoch": steps,
        "total_steps": steps_in_all,
        **decisions,
        **prepared.long_rows,
    }
    if session.peers.leads:
        write_atomic(session.folder.resolved, _JSON.dump_json(plan, indent=2).decode())
    session.events.append(PlanEvent(plan=_JSON.dump_python(plan, mode="json")))
    session.show(_text(session, base, report, plan, prepared.model))
    _warn_of_warmup(session, steps_in_all)
    return steps_in_all


def _domains(prepared: AnyPrepared) -> list[dict[str, object]] | None:
    """What the run reads of each domain; None without domains."""
    session, domains = prepared.session, prepared.rows.domains
    if domains is None:
        return None
    training = session.spec.training
    most = rows_an_epoch(training, sum(domains.epoch), session.peers.size)
    found = domains.as_json(most, training.n_epochs)
    for each in found:
        if not each["rows_an_epoch"]:
            session.say(
                f"domain {each['name']!r} has no row in an epoch of {most:,} rows; expected a higher ratio, or more "
                "training.max_steps_per_epoch",
                "warning",
            )
    return found


def _domain_lines(found: object) -> list[str]:
    assert isinstance(found, list | None)
    return [
        f"domain    {each['name']}: {each['rows']:,} rows ({each['tokens']:,} tokens), {each['held_out_rows']:,} held "
        f"out; {each['share']:.1%} of an epoch, each row seen {each['times_seen']:.3g} times in the job"
        for each in found or []
    ]


def _warn_of_warmup(session: AnySession, steps: int) -> None:
    """Warn if the job ends while its learning rate still rises: it then learns little, and nothing else says why."""
    optimizer = session.spec.optimizer
    if optimizer.num_warmup_steps >= steps:
        highest = optimizer.lr * (steps - 1) / optimizer.num_warmup_steps
        session.say(
            f"optimizer.num_warmup_steps: {optimizer.num_warmup_steps} is not below the {number_of(steps, 'step')}, so "
            f"the learning rate reaches only {highest:.2g} of {optimizer.lr:g}; expected fewer, or more epochs",
            "warning",
        )


def _routing_lines(every: object) -> list[str]:
    """How much the events say of the experts; nothing if no routing is recorded."""
    assert isinstance(every, int | None)
    if every is None:
        return []
    tables = "at every step" if every == 1 else f"every {every:,} steps, over the steps since the last ones"
    return [f"routing   figures of each layer at every step; the share of each expert {tables}"]


def _named(spec: TrainingSpec) -> str:
    return spec.model if spec.model_from is None else f"{spec.model_from}, {spec.model}"


def _sharing(session: AnySession) -> str:
    what = "weights" if session.spec.adapter is None else "base"
    dtypes = "; weights and optimiser state are fp32, matrix products bf16" if keeps_fp32(session.spec) else ""
    where = "; weights and gradients are in CPU memory" if session.spec.resources.cpu_offload else ""
    return f"{what:<10}sharded over {session.peers.size} processes (FSDP2){dtypes}{where}"


def _text(session: AnySession, base: Base, report: AdapterReport, plan: Plan, prepared_model: nn.Module) -> str:
    spec = session.spec
    packed = f" packed into {plan['train_sequences']:,} sequences" if spec.data.packed else ""
    batch = rows_a_step(spec.training, session.peers.size)
    together = "" if session.peers.size == 1 else f", {session.peers.size} processes"
    lines = [
        f"model     {_named(spec)} ({plan['architecture']}, {spec.training.dtype} on {base.device}{together})",
        f"experts   {'none: a dense model' if base.layout is None else base.layout.text()}",
        f"moe       {base.resolved.text()}",
        *([] if (longer := extension_of(base.model)) is None else [f"context   {longer.text()}"]),
        *([] if base.quantized is None else [f"base      {line}" for line in base.quantized.lines()]),
        *([_sharing(session)] if spec.resources.strategy == "fsdp" else []),
        *([] if base.experts is None else [f"base      {base.experts.text(base.model)}"]),
        *([] if session.forecast is None else [f"memory    {session.forecast.text}"]),
        *(f"trains    {line}" for line in report.text().splitlines()),
        *([] if base.images is None else [f"vision    {trained_text(prepared_model)}"]),
        *(
            [f"optimiser {spec.optimizer.optimizer_type}: {foreseen(spec.optimizer, prepared_model).text()}"]
            if spec.optimizer.optimizer_type in OF_BITSANDBYTES
            else []
        ),
        *(f"data      {line}" for line in source_lines(session.folder)),
        *(f"rows      {line}" for line in report_lines(session.folder)),
        f"rows      {plan['train_rows']:,} to train on{packed}, {plan['validation_rows']:,} held out, "
        f"{plan['truncated_rows']:,} cut at {spec.options.max_length} tokens, {plan['dropped_rows']:,} left out",
        *_domain_lines(plan["domains"]),
        f"steps     {plan['total_steps']:,}: {number_of(spec.training.n_epochs, 'epoch')} of "
        f"{plan['steps_per_epoch']:,}, {batch} rows each, "
        f"{spec.optimizer.optimizer_type} lr {spec.optimizer.lr:g} {spec.options.lr_scheduler}",
        *_routing_lines(plan["routing_every_n_steps"]),
    ]
    return "\n".join(lines)
