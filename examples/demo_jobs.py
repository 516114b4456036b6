"""Jobs of the demos: settings, rows, a job from its start to its end, and what it measured."""

import contextlib
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from demo_screen import DemoFailed, console, say
from demo_server import PATIENCE_S, Stack, patiently
from rich.table import Table

from llama_stack_provider_moe.client.documents import Artifact, Balance, Job, Metrics, progress_of
from llama_stack_provider_moe.control.cli.follow import Follower
from llama_stack_provider_moe.control.cli.screen import Screen
from llama_stack_provider_moe.control.cli.views import view

DATA = Path(__file__).resolve().parent / "data"
BATCH = 4  # rows of the example data are short
LORA = {
    "type": "LoRA", "rank": 8, "alpha": 16, "lora_attn_modules": ["q_proj", "k_proj", "v_proj", "output_proj"],
    "apply_lora_to_mlp": True, "apply_lora_to_output": False,
}  # fmt: skip


def rows_of(file: str) -> list[dict[str, str]]:
    """Return the rows of one file of example data."""
    with (DATA / f"{file}.jsonl").open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def register(stack: Stack, rows: list[dict[str, str]], dataset_id: str) -> str:
    """Register rows as a dataset, or upload them as a file; return its id."""
    if stack.uploads_files:
        content = "".join(json.dumps(row) + "\n" for row in rows).encode()
        file = stack.client.files.create(file=(f"{dataset_id}.jsonl", content), purpose="assistants")
        say(f"{dataset_id}: {len(rows)} rows, {file.id}")
        return str(file.id)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # the client deprecates its whole beta API
        stack.client.beta.datasets.register(
            dataset_id=dataset_id, purpose="post-training/messages", source={"type": "rows", "rows": rows}
        )
    say(f"{dataset_id}: {len(rows)} rows")
    return dataset_id


def training(train_id: str, heldout_id: str, steps: int, lr: float) -> dict[str, object]:
    """Return a `training_config` of the API.

    Args:
        train_id: dataset to train on.
        heldout_id: dataset to evaluate on.
        steps: number of optimiser steps.
        lr: learning rate.
    """
    return {
        "n_epochs": 1,
        "max_steps_per_epoch": steps,
        "dtype": cpu_dtype(),
        "gradient_accumulation_steps": 1,
        "data_config": {
            "dataset_id": train_id, "validation_dataset_id": heldout_id, "batch_size": BATCH, "shuffle": True,
            "data_format": "instruct",
        },
        "optimizer_config": {"optimizer_type": "adamw", "lr": lr, "weight_decay": 0.0, "num_warmup_steps": 2},
    }  # fmt: skip


def cpu_dtype() -> str:
    """Return `bf16` if the processor has instructions for it, else `fp32`."""
    with contextlib.suppress(OSError):
        flags = set(Path("/proc/cpuinfo").read_text(encoding="utf-8").split())
        if flags & {"avx512_bf16", "amx_bf16", "bf16"}:
            return "bf16"
    return "fp32"


def follow(stack: Stack, job: str) -> Job:
    """Show the progress of a job as `moe-train submit --follow` does; return the job, which must have completed."""
    stack.submitted.append(job)
    screen = Screen(as_json=False)
    with view(screen) as shown:
        for status in Follower(stack.server, job, screen.note, poll_s=2, patience_s=PATIENCE_S).statuses():
            shown.show(status)
    found = patiently(lambda: stack.server.job(job))
    if found["status"] != "completed":
        raise DemoFailed(f"job {job} ended as {found['status']}: {found['reason']}")
    return found


def evaluations(job: Job) -> tuple[Metrics, Metrics]:
    """Return the metrics on held-out rows before and after training."""
    found = progress_of(job).get("evaluation")
    if found is None:
        raise DemoFailed(f"job {job['job_uuid']} was not evaluated")
    return found["first"]["metrics"], found["last"]["metrics"]


def report(job: Job, meaning: str) -> None:
    """Print what a job trained and what it measured; fail if the loss on held-out rows did not fall.

    Args:
        job: a completed job.
        meaning: what its loss on held-out rows is, and its unit.
    """
    # What the job decided from the model: a document with many kinds of values.
    plan: Mapping[str, Any] = job["resolved"] or {}
    layout, adapter, progress = plan["layout"], plan["adapter"], progress_of(job)
    before, after = evaluations(job)
    routing, last_step = progress.get("routing"), progress.get("metrics")
    share = adapter["trainable_parameters"] / adapter["total_parameters"]
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_row("model", f"{len(layout['moe_layers'])} layers, each with {layout['num_experts']} experts, of which "
                           f"a token uses {layout['top_k']}")  # fmt: skip
    table.add_row("trained", f"{adapter['trainable_parameters']:,} of {adapter['total_parameters']:,} parameters "
                             f"({share:.1%}), by LoRA")  # fmt: skip
    table.add_row("LoRA on", ", ".join(f"{name} x{count}" for name, count in adapter["targets"].items()))
    table.add_row("loss", f"{before['validation_loss']:.4f} before, {after['validation_loss']:.4f} after ({meaning})")
    if "rewards/accuracies" in after:
        table.add_row("preference", f"the chosen answer is preferred in {after['rewards/accuracies']:.0%} of held-out "
                                    f"pairs, with a mean margin of {after['rewards/margins']:.3f}; before, the margin "
                                    "is 0")  # fmt: skip
    if last_step is not None and "aux_loss" in last_step:
        table.add_row("router loss", f"{last_step['aux_loss']:.4f} (2 means that tokens are spread evenly)")
    if routing is not None:
        table.add_row("experts", balance(routing, routing["experts"]))
        table.add_row("entropy", f"{routing['load_entropy']:.3f} for the mean load of the experts, "
                                 f"{routing['token_entropy']:.3f} per token; at most 1.386")  # fmt: skip
    console.print(table)
    if float(after["validation_loss"]) >= float(before["validation_loss"]):
        raise DemoFailed(f"the loss of {job['job_uuid']} on held-out rows did not fall")


def balance(routing: Balance, experts: int) -> str:
    """Say how evenly tokens are spread over this number of experts."""
    return (
        f"an expert gets {routing['min_share']:.0%} to {routing['max_share']:.0%} of a layer's tokens "
        f"({1 / experts:.0%} would be even); {routing['dead_experts']} experts get none"
    )


def artifact(job: Job, kind: str) -> Artifact:
    """Return the only artifact of a kind."""
    (found,) = [each for each in job["checkpoints"] if each["kind"] == kind]
    return found
