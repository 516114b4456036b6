"""An interrupted run resumes as if nothing had happened; which checkpoints are kept, and when a run ends early."""

import json
import os
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from llama_stack_provider_moe.compute.models.saved_weights import restore_weights
from llama_stack_provider_moe.compute.worker.main import COMPLETED, FAILED, STOPPED
from llama_stack_provider_moe.jobdir.checkpoint_index import (
    CHECKSUMS,
    read_checksums,
    valid_checkpoints,
    verify,
    write_checksums,
)
from llama_stack_provider_moe.jobdir.events import read
from llama_stack_provider_moe.jobdir.folder import JobFolder
from tests.support import tiny_models
from tests.support.training_support import Row, Run, Workshop, domains_of, said, workshop

__all__ = ["workshop"]

# Dropout draws from the random state at every step, so a run that restores it wrongly differs at once.
CASES: dict[str, dict[str, Any]] = {
    "sft-lora": {
        "recipe": "sft",
        "family": "granitemoe",
        "adapter": {"rank": 4, "alpha": 8},
        "moe": {"train_router": True, "expert_dropout": 0.1, "router_z_loss_coef": 0.001},
        "training": {"n_epochs": 3, "batch_size": 2, "gradient_accumulation_steps": 2},
        "optimizer": {"num_warmup_steps": 3},
        "options": {"lr_scheduler": "cosine"},
    },
    "sft-whole": {"recipe": "sft", "family": "qwen3_moe", "adapter": None, "training": {"n_epochs": 3, "batch_size": 4},
                  "optimizer": {"lr": 1e-3}},
    "dpo-lora-ahead": {"recipe": "dpo", "family": "mixtral", "training": {"n_epochs": 3, "batch_size": 4}},
    "dpo-whole-ahead": {"recipe": "dpo", "family": "granitemoe", "adapter": None,
                        "training": {"n_epochs": 3, "batch_size": 4}, "optimizer": {"lr": 1e-3}},
    # Unequal ranks and rates, dropout of experts' LoRA, and noise on routers; then biases that move.
    "sft-plan": {"recipe": "sft", "family": "mixtral", "training": {"n_epochs": 3, "batch_size": 4},
                 "moe": {"router_jitter": 0.1, "train_router": True},
                 "adapter": {"plan": "per_expert", "rank": 4, "dropout": 0.1, "lr_multipliers": {"router": 2.0},
                             "rules": [{"experts": {"0": 4, "1-2": 2}, "lr_multiplier": 3.0}]}},
    "sft-router": {"recipe": "sft", "family": "mixtral", "training": {"n_epochs": 3, "batch_size": 4}, "adapter": None,
                   "moe": {"train_router_only": True}, "optimizer": {"lr": 1e-2}},
    "sft-aux-free": {"recipe": "sft", "family": "deepseek_v3", "training": {"n_epochs": 3, "batch_size": 4},
                     "moe": {"moe_load_balancing": "aux_free", "router_bias_rate": 0.05}},
    "circuit-breaker": {"recipe": "circuit_breaker", "family": "mixtral", "adapter": {"rank": 4, "dropout": 0.1},
                        "training": {"n_epochs": 3, "batch_size": 2, "gradient_accumulation_steps": 2},
                        "circuit_breaker": {"target_layers": "0", "schedule": "cosine",
                                            "retain": {"dataset_id": "a", "ratio": 1.5, "validation_dataset_id": "b"},
                                            "safe": {"dataset_id": "c", "validation_dataset_id": "d"}}},
    "sft-domains": {"recipe": "sft", "family": "granitemoe", "training": {"n_epochs": 3, "batch_size": 8},
                    "domains": domains_of("sft")},
    "sft-distill": {"recipe": "sft", "family": "granitemoe", "training": {"n_epochs": 3, "batch_size": 4},
                    "distill": {"weight": 0.5}, "adapter": {"rank": 4, "dropout": 0.1}},
    # Unequal ranks, whose unused numbers stay zero; steps that are rounded at random, and embeddings in 32 bits.
    "sft-8-bit-moments": {"recipe": "sft", "family": "mixtral",
                          "training": {"n_epochs": 3, "batch_size": 4, "dtype": "bf16"},
                          "optimizer": {"optimizer_type": "adamw_8bit", "min_8bit_size": 64},
                          "adapter": {"plan": "per_expert", "rank": 4, "dropout": 0.1, "dtype": "bf16",
                                      "rules": [{"experts": {"0": 4, "1-2": 2}}]}},
    "sft-8-bit-moments-whole": {"recipe": "sft", "family": "qwen3_moe", "adapter": None,
                                "training": {"n_epochs": 3, "batch_size": 4, "dtype": "bf16"},
                                "optimizer": {"lr": 1e-3, "optimizer_type": "adamw_8bit"}},
    "sft-4-bit": {"recipe": "sft", "family": "granitemoe", "training": {"n_epochs": 3, "batch_size": 4},
                  "moe": {"moe_load_balancing": "expert_choice"},
                  "adapter": {"rank": 4, "quantize_base": True, "quantize_scales": True}},
    "sft-offload": {"recipe": "sft", "family": "qwen3_moe", "training": {"n_epochs": 3, "batch_size": 4},
                    "efficiency": {"offload_experts": True, "enable_activation_checkpointing": True},
                    "adapter": {"plan": "all_experts", "rank": 4, "quantize_base": True}},
    "kto-lora": {"recipe": "kto", "family": "qwen3_moe", "adapter": {"rank": 4, "dropout": 0.1},
                 "training": {"n_epochs": 3, "batch_size": 2, "gradient_accumulation_steps": 2}},
    "reward-lora": {"recipe": "reward", "family": "qwen3_moe", "adapter": {"rank": 4, "dropout": 0.1},
                    "training": {"n_epochs": 3, "batch_size": 2, "gradient_accumulation_steps": 2}},
    # A request to stop comes among the steps that learn from one generation.
    "grpo-lora": {"recipe": "grpo", "family": "granitemoe", "training": {"n_epochs": 3, "batch_size": 4},
                  "rl": {"n_iterations": 2, "steps_per_generation": 2, "beta": 0.1, "routing_replay": "rollout"}},
    "distill-lora": {"recipe": "distill", "family": "granitemoe", "adapter": {"rank": 4, "dropout": 0.1},
                     "training": {"n_epochs": 3, "batch_size": 2, "gradient_accumulation_steps": 2}},
    "grpo-whole": {"recipe": "grpo", "family": "qwen3_moe", "adapter": None, "optimizer": {"lr": 1e-3},
                   "training": {"n_epochs": 2, "batch_size": 4, "gradient_accumulation_steps": 2},
                   "moe": {"router_z_loss_coef": 0.001}},
    **{f"circuit-breaker-{family}": {
        "recipe": "circuit_breaker", "family": family, "training": {"n_epochs": 3, "batch_size": 4},
        "optimizer": {"lr": 2e-2}, "adapter": {"rank": 4, "dropout": 0.1, "quantize_base": family == "granitemoe"},
        "circuit_breaker": {"target_layers": "1", "retain": {"dataset_id": "a", "validation_dataset_id": "b"}},
    } for family in ("qwen3_moe", "granitemoe", "llama4_text", "glm4_moe")},
}  # fmt: skip


def run_case(workshop: Workshop, case: str, **more: Any) -> Run:
    settings = dict(CASES[case])
    return workshop.run(settings.pop("recipe"), settings.pop("family"), **settings, **more)


def break_off(folder: Path, steps: int) -> threading.Thread:
    """SIGTERM to this process once the job in `folder` has taken `steps` steps."""

    def watch() -> None:
        while sum(event.type == "step" for event in read(folder / "events.jsonl").events) < steps:
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGTERM)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    return watcher


def curve(run: Run) -> dict[int, dict[str, float]]:
    """Step -> its metrics that don't tell time or memory, as last written."""
    timed = ("tokens_per_s", "tokens_per_s_per_device", "tflops_per_device", "memory_bytes")
    return {
        event.step: {name: value for name, value in event.metrics.items() if name not in timed}
        for event in run.events("step")
    }


@pytest.mark.parametrize("case", CASES)
def test_a_resumed_run_equals_an_unbroken_one(workshop: Workshop, case: str) -> None:
    unbroken = run_case(workshop, case)
    assert unbroken.exit_code == COMPLETED, unbroken.reason
    folder = workshop.next_folder(CASES[case]["recipe"])
    watcher = break_off(folder, steps=6)
    broken = run_case(workshop, case)
    watcher.join()
    assert broken.exit_code == STOPPED, "it was stopped before its end"
    resumed = workshop.again(broken)
    assert resumed.exit_code == COMPLETED, resumed.reason
    assert [event.step for event in resumed.events("resumed")] == [broken.events("cancelled")[0].step]
    assert curve(resumed) == curve(unbroken)
    assert resumed.held_out("validation_loss") == unbroken.held_out("validation_loss")
    one, other = resumed.final(), unbroken.final()
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    kept = [[(each.kind, each.epoch, each.step, each.metrics) for each in run.manifest.artifacts]
            for run in (resumed, unbroken)]  # fmt: skip
    assert kept[0] == kept[1]


def test_a_damaged_checkpoint_is_passed_over(workshop: Workshop) -> None:
    unbroken = run_case(workshop, "sft-lora")
    broken = workshop.copied(unbroken)
    newest = broken.root / "checkpoints" / "epoch-3" / "adapter_model.safetensors"
    content = bytearray(newest.read_bytes())
    content[-1] ^= 1
    newest.write_bytes(content)
    resumed = workshop.again(Run(broken, STOPPED))
    assert resumed.exit_code == COMPLETED, resumed.reason
    assert [(event.checkpoint, event.step) for event in resumed.events("resumed")] == [("epoch-2", 8)]
    (warning,) = [event.text for event in resumed.events("message") if event.level == "warning"]
    assert "epoch-3 is damaged: adapter_model.safetensors was changed after it was written" in warning
    assert (broken.root / "checkpoints" / "epoch-3.damaged").is_dir()
    assert curve(resumed) == curve(unbroken)
    assert all(torch.equal(resumed.final()[name], tensor) for name, tensor in unbroken.final().items())


def test_an_evaluation_that_was_cut_short_is_made_up_for(workshop: Workshop) -> None:
    unbroken = run_case(workshop, "sft-lora")
    broken = workshop.copied(unbroken)
    lines = broken.events.read_text().splitlines(keepends=True)
    events = [json.loads(line) for line in lines]
    last = [event["type"] == "saved" and event["artifact"]["epoch"] == 3 for event in events]
    broken.events.write_text("".join(line for line, cut_off in zip(lines, last, strict=True) if not cut_off))
    resumed = workshop.again(Run(broken, STOPPED))
    assert resumed.exit_code == COMPLETED, resumed.reason
    metrics = [[each.metrics for each in run.manifest.artifacts] for run in (resumed, unbroken)]
    assert metrics[0] == metrics[1]
    assert metrics[0][-1] is not None
    assert max(curve(resumed)) == max(curve(unbroken)), "no step was trained twice, and none after the last"


def test_a_run_that_saved_nothing_begins_again(workshop: Workshop) -> None:
    unbroken = run_case(workshop, "sft-lora")
    broken = workshop.copied(unbroken)
    shutil.rmtree(broken.root / "checkpoints")
    resumed = workshop.again(Run(broken, STOPPED))
    assert [(event.checkpoint, event.step) for event in resumed.events("resumed")] == [(None, 0)]
    assert curve(resumed) == curve(unbroken)


@pytest.mark.parametrize("family", [*tiny_models.FAMILIES])
def test_whole_models_come_back_weight_by_weight(workshop: Workshop, tmp_path: Path, family: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(workshop.model(family))
    model.save_pretrained(tmp_path)
    wanted = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    restore_weights(model, tmp_path)
    assert all(torch.equal(parameter, wanted[name]) for name, parameter in model.named_parameters())


def test_an_adapter_that_does_not_fit_is_refused(workshop: Workshop) -> None:
    broken = workshop.copied(run_case(workshop, "sft-lora"))
    spec = json.loads(broken.spec.read_text())
    spec["adapter"]["lora_attn_modules"] = ["q_proj"]
    broken.spec.write_text(json.dumps(spec))
    resumed = workshop.again(Run(broken, STOPPED))
    assert resumed.exit_code == FAILED
    assert "belongs to another adapter" in resumed.reason


def test_the_time_budget_ends_a_run_with_all_that_it_has(workshop: Workshop) -> None:
    run = workshop.run("sft", "mixtral", training={"n_epochs": 2, "batch_size": 4}, options={"max_hours": 1e-9})
    assert run.exit_code == COMPLETED, run.reason
    assert run.manifest.stopped_by == "time_budget"
    assert run.events("finished")[0].stopped_by == "time_budget"
    assert [event.step for event in run.events("step")] == [1]
    assert [(each.kind, each.step) for each in run.manifest.artifacts] == [("checkpoint", 1), ("adapter", 1)]
    assert run.manifest.artifacts[0].metrics is not None


def test_early_stopping_keeps_the_best(workshop: Workshop) -> None:
    # The better the model memorises one answer, the less likely is the other one in the held-out rows.
    def rows(count: int, answer: str) -> list[Row]:
        return [{"messages": [said("user", "Say a word."), said("assistant", answer)]} for _ in range(count)]

    run = workshop.run(
        "sft", "mixtral", rows=rows(16, "A garden in spring."), validation=rows(4, "Quickly, 97 jumps!"),
        training={"n_epochs": 20, "batch_size": 8}, optimizer={"lr": 0.05},
        options={"early_stopping_patience": 2, "keep_checkpoints": 1},
    )  # fmt: skip
    assert run.exit_code == COMPLETED, run.reason
    assert run.manifest.stopped_by == "early_stopping"
    measured = {event.epoch: event.metrics["validation_loss"] for event in run.events("evaluation") if event.epoch}
    best = min(measured, key=lambda epoch: measured[epoch])
    assert max(measured) == best + 2 < 20
    assert all(later >= measured[best] for epoch, later in measured.items() if epoch > best)
    adapter = next(each for each in run.manifest.artifacts if each.kind == "adapter")
    assert adapter.epoch == best
    assert adapter.metrics is not None
    assert adapter.metrics.validation_loss == measured[best]
    kept = sorted(path.name for path in (run.folder.root / "checkpoints").iterdir())
    assert kept == sorted({f"epoch-{int(best)}", f"epoch-{int(max(measured))}"})
    saved = run.final()
    assert all(torch.equal(saved[name], tensor) for name, tensor in run.checkpoint(f"epoch-{int(best)}").items())


def test_autosaves_and_what_is_kept(workshop: Workshop) -> None:
    run = workshop.run(
        "sft", "mixtral", training={"n_epochs": 5, "batch_size": 4},
        options={"autosave_minutes": 1e-9, "keep_checkpoints": 2},
    )  # fmt: skip
    assert run.exit_code == COMPLETED, run.reason
    saved = [Path(event.artifact["path"]).name for event in run.events("saved")]
    steps = len(run.events("step"))
    ends = {steps // 5 * epoch: f"epoch-{epoch}" for epoch in range(1, 6)}
    assert saved[:steps] == [ends.get(step, f"step-{step}") for step in range(1, steps + 1)]
    losses = run.held_out("validation_loss")[1:]
    best = f"epoch-{losses.index(min(losses)) + 1}"
    kept = {path.name for path in (run.folder.root / "checkpoints").iterdir()}
    assert kept == {"epoch-4", "epoch-5", best}
    assert {Path(each.path).name for each in run.manifest.artifacts if each.kind == "checkpoint"} == kept


def test_checksums_tell_every_kind_of_damage(tmp_path: Path) -> None:
    folder = tmp_path / "epoch-1"
    (folder / "inner").mkdir(parents=True)
    (folder / "trainer_state.json").write_text("{}")
    (folder / "inner" / "weights").write_bytes(b"abcdef")
    assert verify(folder) == "checksums.json is missing or can't be read"
    write_checksums(folder, 7)
    assert verify(folder) is None
    sums = read_checksums(folder)
    assert sums is not None
    assert (sums.step, set(sums.files)) == (7, {"trainer_state.json", "inner/weights"})
    (folder / "inner" / "weights").write_bytes(b"abcdeF")
    assert verify(folder, deep=False) is None
    assert verify(folder) == "inner/weights was changed after it was written: its checksum differs"
    (folder / "inner" / "weights").write_bytes(b"abc")
    assert verify(folder, deep=False) == "inner/weights has 3 bytes, 6 were written"
    (folder / "inner" / "weights").unlink()
    assert verify(folder) == "inner/weights: No such file or directory"
    (folder / CHECKSUMS).write_text("{")
    assert verify(folder) == "checksums.json is missing or can't be read"


def test_valid_checkpoints_are_the_latest_first(workshop: Workshop, tmp_path: Path) -> None:
    run = run_case(workshop, "sft-lora")
    spec = run.folder.read_spec()
    names = [path.name for path in valid_checkpoints(run.folder, spec)]
    assert names == ["epoch-3", "epoch-2", "epoch-1"]
    assert valid_checkpoints(JobFolder(tmp_path), spec) == []
