"""What a run decided, before its first step: an event, `resolved.json`, and lines a person reads in output.log."""

from dataclasses import asdict
from typing import Any

from pydantic import TypeAdapter

from llama_stack_provider_moe.experts.adapters import AdapterReport
from llama_stack_provider_moe.jobs.events import Plan
from llama_stack_provider_moe.jobs.folder import write_atomic
from llama_stack_provider_moe.training.data import Rows
from llama_stack_provider_moe.training.loader import keeps_fp32
from llama_stack_provider_moe.training.sampling import rows_a_step, steps_an_epoch
from llama_stack_provider_moe.training.session import AnySession
from llama_stack_provider_moe.training.stages import Base

_JSON: TypeAdapter[dict[str, Any]] = TypeAdapter(dict[str, Any])


def announce(
    session: AnySession,
    base: Base,
    report: AdapterReport,
    rows: Rows,
    sequences: int,
    recipe: dict[str, Any],
) -> int:
    """Write the plan everywhere, and return the optimiser steps that it foresees.

    Args:
        sequences: training sequences of an epoch without a cap; fewer than rows where rows are packed.
        recipe: what only this recipe decided.
    """
    spec = session.spec
    steps = steps_an_epoch(spec.training, sequences, session.peers.size)
    plan = {
        "recipe": spec.recipe,
        "model": spec.model,
        "architecture": type(base.model).__name__,
        "device": str(base.device),
        "processes": session.peers.size,
        "strategy": spec.resources.strategy,
        "memory": None if session.forecast is None else session.forecast.figures,
        "experts_a_process": None if base.experts is None else base.experts.shard.held,
        "dtype": spec.training.dtype,
        "attention": base.model.config._attn_implementation,
        "layout": None if base.layout is None else base.layout.as_json(),
        "moe": asdict(base.resolved),
        "adapter": report.as_json(),
        "quantized": None if base.quantized is None else base.quantized.as_json(),
        "train_rows": len(rows.train),
        "train_sequences": sequences,
        "validation_rows": 0 if rows.validation is None else len(rows.validation),
        "truncated_rows": rows.truncated,
        "steps_per_epoch": steps,
        "total_steps": steps * spec.training.n_epochs,
        **recipe,
    }
    if session.peers.leads:
        write_atomic(session.folder.resolved, _JSON.dump_json(plan, indent=2).decode())
    session.events.append(Plan(plan=_JSON.dump_python(plan, mode="json")))
    session.show(_text(session, base, report, plan))
    return int(plan["total_steps"])


def _sharing(session: AnySession) -> str:
    what = "weights" if session.spec.adapter is None else "base"
    dtypes = "; they and their optimiser's state are fp32, products bf16" if keeps_fp32(session.spec) else ""
    lie = "; they lie in the CPU's memory, as do gradients" if session.spec.resources.cpu_offload else ""
    return f"{what:<10}shared out among {session.peers.size} processes (FSDP2){dtypes}{lie}"


def _text(session: AnySession, base: Base, report: AdapterReport, plan: dict[str, Any]) -> str:
    spec = session.spec
    packed = (
        f" packed into {plan['train_sequences']:,} sequences" if plan["train_sequences"] != plan["train_rows"] else ""
    )
    batch = rows_a_step(spec.training, session.peers.size)
    together = "" if session.peers.size == 1 else f", {session.peers.size} processes"
    lines = [
        f"model     {spec.model} ({plan['architecture']}, {spec.training.dtype} on {base.device}{together})",
        f"experts   {'none: a dense model' if base.layout is None else base.layout.text()}",
        f"moe       {base.resolved.text()}",
        *([] if base.quantized is None else [f"base      {base.quantized.text()}"]),
        *([_sharing(session)] if spec.resources.strategy == "fsdp" else []),
        *([] if base.experts is None else [f"base      {base.experts.text(base.model)}"]),
        *([] if session.forecast is None else [f"memory    {session.forecast.text}"]),
        *(f"trains    {line}" for line in report.text().splitlines()),
        f"rows      {plan['train_rows']:,} to train on{packed}, {plan['validation_rows']:,} held out, "
        f"{plan['truncated_rows']:,} cut at {spec.options.max_length} tokens",
        f"steps     {plan['total_steps']:,}: {spec.training.n_epochs} epoch(s) of {plan['steps_per_epoch']:,}, "
        f"{batch} rows each, {spec.optimizer.optimizer_type} lr {spec.optimizer.lr:g} {spec.options.lr_scheduler}",
    ]
    return "\n".join(lines)
