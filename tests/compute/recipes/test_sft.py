"""Laws of the SFT recipe, on tiny models, with the trainer and the files that users get."""

import math
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from llama_stack_provider_moe.compute.worker.main import COMPLETED, FAILED, STOPPED
from llama_stack_provider_moe.jobdir.events import read
from tests.support import tiny_models
from tests.support.training_support import Run, Workshop, said, sft_rows, workshop

__all__ = ["workshop"]


def mean_nll(model: Any, tokenizer: Any, rows: list[Any]) -> float:
    """Cross entropy of the answers' tokens, one row at a time: no batch, no padding, none of our code."""
    total, tokens = 0.0, 0
    for row in rows:
        prompt, answer = row["messages"]
        asked = tokenizer.apply_chat_template([prompt], tokenize=False, add_generation_prompt=True)
        before = len(tokenizer(asked, add_special_tokens=False)["input_ids"])
        ids = torch.tensor([tokenizer(asked + answer["content"] + "<|im_end|>", add_special_tokens=False)["input_ids"]])
        with torch.no_grad():
            log_probs = model(ids).logits[0, :-1].log_softmax(-1)
        picked = log_probs.gather(-1, ids[0, 1:, None])[before - 1 :, 0]
        total, tokens = total - picked.sum().item(), tokens + len(picked)
    return total / tokens


@pytest.fixture(scope="module")
def granite(workshop: Workshop) -> Run:
    """Two epochs on a Granite MoE with routers, checkpointing, and every option."""
    return workshop.run(
        "sft",
        "granitemoe",
        training={"n_epochs": 2},
        efficiency={"enable_activation_checkpointing": True},
        moe={"train_router": True, "router_z_loss_coef": 0.01, "router_aux_loss_coef": 0.02},
        options={"save_merged": True},
    )


def test_every_step_tells_what_an_engineer_looks_for(granite: Run) -> None:
    assert granite.exit_code == COMPLETED, granite.reason
    steps = granite.events("step")
    assert [(step.step, step.max_steps) for step in steps] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    for step in steps:
        wanted = {
            "loss",
            "ce",
            "aux_loss",
            "router_z_loss",
            "grad_norm",
            "learning_rate",
            "tokens",
            "tokens_per_s",
            "tokens_per_s_per_device",
            "tflops_per_device",
            "memory_bytes",
        }
        assert wanted <= step.metrics.keys()
        balance = 0.02 * step.metrics["aux_loss"] + 0.01 * step.metrics["router_z_loss"]
        assert step.metrics["loss"] == pytest.approx(step.metrics["ce"] + balance, rel=1e-5)
        assert step.metrics["aux_loss"] >= 1.99  # top-k at perfect balance
    routing = granite.events("routing")
    assert [event.step for event in routing] == [1, 2, 3, 4]
    for event in routing:
        assert [layer.layer for layer in event.layers] == [0, 1]
        for layer in event.layers:
            assert sum(layer.share) == pytest.approx(1, abs=1e-3)  # four digits
            assert 0 < layer.token_entropy <= layer.load_entropy <= math.log(4) + 1e-5


def test_held_out_loss_is_the_models_own_and_falls(granite: Run, workshop: Workshop) -> None:
    first, _, last = granite.held_out("validation_loss")
    assert last < 0.95 * first
    rows, folder = sft_rows(4, first=100), workshop.model("granitemoe")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    base = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert mean_nll(base, tokenizer, rows) == pytest.approx(first, abs=2e-5)
    tuned = PeftModel.from_pretrained(base, granite.folder.adapter).eval()
    assert mean_nll(tuned, tokenizer, rows) == pytest.approx(last, abs=2e-5)
    assert granite.held_out("perplexity")[-1] == pytest.approx(math.exp(last), rel=1e-5)


def test_merged_folder_is_base_plus_adapter(granite: Run, workshop: Workshop) -> None:
    ids = torch.arange(10, 60).unsqueeze(0)
    merged = AutoModelForCausalLM.from_pretrained(granite.folder.merged).eval()
    base = AutoModelForCausalLM.from_pretrained(workshop.model("granitemoe")).eval()
    tuned = PeftModel.from_pretrained(base, granite.folder.adapter).eval()
    with torch.no_grad():
        assert (merged(ids).logits - tuned(ids).logits).abs().max() < 1e-5
        with tuned.disable_adapter():
            assert (merged(ids).logits - tuned(ids).logits).abs().max() > 1e-2
    assert merged.config.to_dict().keys() == base.config.to_dict().keys()
    assert "num_experts" not in merged.config.to_dict()
    assert merged.config.output_router_logits is False  # as in the original config
    assert AutoTokenizer.from_pretrained(granite.folder.merged).chat_template


def test_each_epoch_leaves_a_checkpoint_with_its_metrics(granite: Run) -> None:
    artifacts = granite.manifest.artifacts
    assert [(each.kind, each.epoch, each.step) for each in artifacts] == [
        ("checkpoint", 1, 2), ("checkpoint", 2, 4), ("adapter", 2, 4), ("merged", 2, 4),
    ]  # fmt: skip
    held_out, trained = granite.held_out("validation_loss"), granite.steps("ce")
    for epoch, artifact in enumerate(artifacts[:2], start=1):
        assert artifact.metrics is not None
        assert artifact.metrics.validation_loss == held_out[epoch]
        assert artifact.metrics.train_loss == pytest.approx(sum(trained[2 * epoch - 2 : 2 * epoch]) / 2)
    for artifact in artifacts:
        files = [path for path in Path(artifact.path).rglob("*") if path.is_file()]
        assert sum(path.stat().st_size for path in files) == artifact.bytes
        assert not [path for path in files if path.suffix == ".bin"]


def test_start_is_told_in_resolved_json_and_on_the_output(granite: Run, capsys: pytest.CaptureFixture[str]) -> None:
    resolved = granite.resolved
    assert resolved["layout"]["moe_layers"] == [0, 1]
    assert resolved["moe"]["aux_coef"] == 0.02
    targets = resolved["adapter"]["targets"]
    assert targets["block_sparse_moe.experts.gate_up_proj"] == targets["block_sparse_moe.router.weight"] == 2
    assert resolved["adapter"]["trainable_parameters"] == sum(tensor.numel() for tensor in granite.adapter().values())
    assert granite.events("plan")[0].plan == resolved


def difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    return max((one[name] - other[name]).abs().max().item() for name in one)


def test_checkpointing_changes_memory_and_not_one_gradient(workshop: Workshop) -> None:
    """Reentrant checkpointing would remove the aux loss's gradient, and so these routers' updates."""
    moe = {"train_router": True, "router_aux_loss_coef": 1.0, "router_z_loss_coef": 0.1}
    runs = [
        workshop.run("sft", "mixtral", moe=moe, efficiency={"enable_activation_checkpointing": on})
        for on in (True, False)
    ]
    assert difference(runs[0].adapter(), runs[1].adapter()) < 1e-6
    assert [event.layers for event in runs[0].events("routing")] == [
        event.layers for event in runs[1].events("routing")
    ]


@pytest.mark.parametrize("family", ["granitemoe", "mixtral", "qwen3_moe"])
def test_aux_coefficient_reaches_the_router(workshop: Workshop, family: str) -> None:
    """One SGD step: compared with a coefficient of 0, the router moves by -lr * coef * its aux gradient."""
    lr, coef = 0.1, 2.0
    rows = sft_rows(8)
    common: dict[str, Any] = {
        "rows": rows, "adapter": None, "optimizer": {"optimizer_type": "sgd", "lr": lr},
        "options": {"max_grad_norm": 0}, "training": {"batch_size": 8},
    }  # fmt: skip
    without = workshop.run("sft", family, moe={"router_aux_loss_coef": 0}, **common).model()
    with_aux = workshop.run("sft", family, moe={"router_aux_loss_coef": coef}, **common).model()
    expected = aux_gradients(workshop.model(family), rows)
    assert len(expected) == 2
    for name, gradient in expected.items():
        moved = with_aux[name] - without[name]
        assert gradient.abs().max() > 1e-4
        assert (moved + lr * coef * gradient).abs().max() < 1e-3 * lr * coef * gradient.abs().max()


def aux_gradients(folder: Path, rows: list[Any]) -> dict[str, Tensor]:
    """Gradients of transformers' aux loss, by the routers' names on disk."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = [tokenizer.apply_chat_template(row["messages"], tokenize=False) for row in rows]
    batch = tokenizer(texts, padding=True, return_tensors="pt", add_special_tokens=False)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model(**batch, output_router_logits=True).aux_loss.backward()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
            assert name
    out = folder.parent / f"{folder.name}-gradients"
    model.save_pretrained(out)
    from safetensors.torch import load_file

    tensors = load_file(out / "model.safetensors")
    return {name: tensor for name, tensor in tensors.items() if "router.layer" in name or name.endswith(".gate.weight")}


def test_accumulated_micro_batches_are_one_batch(workshop: Workshop) -> None:
    """Token counts differ between micro-batches, so a mean of means is wrong. (The aux loss is not linear: off.)"""
    moe = {"router_aux_loss_coef": 0.0}
    pieces = {"batch_size": 2, "gradient_accumulation_steps": 4}
    whole = workshop.run("sft", "mixtral", moe=moe)
    parts = workshop.run("sft", "mixtral", moe=moe, training=pieces)
    assert parts.steps("ce") == pytest.approx(whole.steps("ce"), rel=1e-5)
    assert difference(whole.adapter(), parts.adapter()) < 2e-5


def test_packed_rows_do_not_see_each_other(workshop: Workshop) -> None:
    """All rows in one step: the same tokens, the same loss, the same update, packed or padded."""
    rows = sft_rows(8)
    moe = {"router_aux_loss_coef": 0.0}
    padded = workshop.run("sft", "mixtral", rows, moe=moe, options={"max_length": 256})
    packed = workshop.run("sft", "mixtral", rows, moe=moe, data={"packed": True}, options={"max_length": 256})
    assert packed.resolved["train_sequences"] < 8 == padded.resolved["train_sequences"]
    assert packed.steps("ce") == pytest.approx(padded.steps("ce"), rel=1e-5)
    assert difference(padded.adapter(), packed.adapter()) < 2e-5


def test_packing_is_refused_where_state_runs_through(workshop: Workshop) -> None:
    run = workshop.run("sft", "granitemoehybrid", data={"packed": True})
    assert run.exit_code == FAILED
    assert "data.packed: true is not valid for this model" in run.reason


def test_a_cap_ends_each_epoch_and_not_the_run(workshop: Workshop) -> None:
    training = {"n_epochs": 3, "max_steps_per_epoch": 2, "batch_size": 2}
    run = workshop.run("sft", "llama", training=training)
    assert len(run.events("step")) == 6
    made = [(each.epoch, each.step) for each in run.manifest.artifacts if each.kind == "checkpoint"]
    assert made == [(1, 2), (2, 4), (3, 6)]


def test_learning_rate_rises_and_falls_as_asked(workshop: Workshop) -> None:
    run = workshop.run(
        "sft",
        "llama",
        training={"batch_size": 2},
        optimizer={"lr": 0.01, "num_warmup_steps": 4, "optimizer_type": "adam", "weight_decay": 0.1},
        options={"lr_scheduler": "linear"},
    )
    assert run.steps("learning_rate") == pytest.approx([0, 0.0025, 0.005, 0.0075, 0.01, 0.0075, 0.005, 0.0025])


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"data": {"train_on_input": True}}, "ce"),
        ({"data": {"shuffle": False}}, "ce"),
        ({"options": {"seed": 7}}, "ce"),
        ({"options": {"max_grad_norm": 0.01}}, "ce"),
        ({"options": {"max_length": 38}}, "ce"),
        ({"options": {"chat_template": "plain"}}, "ce"),
        ({"adapter": {"alpha": 64}}, "ce"),
        ({"adapter": {"use_rslora": True}}, "ce"),
        ({"adapter": {"apply_lora_to_mlp": False}}, "ce"),
        ({"adapter": {"apply_lora_to_output": True}}, "ce"),
        ({"adapter": {"lora_attn_modules": ["q_proj"]}}, "ce"),
        ({"optimizer": {"optimizer_type": "sgd"}}, "ce"),
        ({"optimizer": {"weight_decay": 5.0}}, "ce"),
        ({"moe": {"expert_dropout": 0.5}}, "ce"),
        ({"moe": {"router_aux_loss_coef": 1.0}}, "loss"),
        ({"training": {"dtype": "bf16"}}, "ce"),
    ],
    ids=lambda value: "-".join(f"{k}.{n}" for k, b in value.items() for n in b) if isinstance(value, dict) else "",
)  # fmt: skip
def test_no_setting_is_read_by_nobody(workshop: Workshop, plain: Run, changes: dict[str, Any], name: str) -> None:
    """Each of these changes the loss of later steps."""
    changed = workshop.run("sft", "mixtral", training={"batch_size": 4, **changes.get("training", {})},
                           **{key: block for key, block in changes.items() if key != "training"})  # fmt: skip
    assert changed.exit_code == COMPLETED, changed.reason
    assert changed.steps(name) != plain.steps(name)
    assert all(math.isfinite(value) for value in changed.steps(name))


@pytest.fixture(scope="module")
def plain(workshop: Workshop) -> Run:
    return workshop.run("sft", "mixtral", training={"batch_size": 4})


def test_a_run_repeats_exactly(workshop: Workshop, plain: Run) -> None:
    again = workshop.run("sft", "mixtral", training={"batch_size": 4})
    assert again.steps("loss") == plain.steps("loss")
    assert difference(again.adapter(), plain.adapter()) == 0


def test_evaluation_leaves_no_trace_in_training(workshop: Workshop, plain: Run) -> None:
    unmeasured = workshop.run(
        "sft",
        "mixtral",
        training={"batch_size": 4},
        data={"validation_dataset_id": None},
        options={"validation_split": 0, "eval_before_training": False},
    )
    assert not unmeasured.events("evaluation")
    assert unmeasured.manifest.artifacts[0].metrics is None
    assert difference(unmeasured.adapter(), plain.adapter()) == 0


def test_eager_and_our_experts_learn_alike(workshop: Workshop, plain: Run) -> None:
    eager = workshop.run("sft", "mixtral", training={"batch_size": 4}, moe={"enable_moe_optimizations": False})
    assert (eager.resolved["moe"]["experts_implementation"], plain.resolved["moe"]["experts_implementation"]) == (
        "eager", "moe_torch",
    )  # fmt: skip
    assert eager.steps("ce") == pytest.approx(plain.steps("ce"), rel=1e-5)


def test_a_run_that_diverges_fails_and_says_what_to_change(workshop: Workshop) -> None:
    run = workshop.run("sft", "llama", training={"n_epochs": 20}, adapter=None,
                       optimizer={"optimizer_type": "sgd", "lr": 10.0}, options={"max_grad_norm": 0})  # fmt: skip
    assert run.exit_code == FAILED
    assert "diverged" in run.reason
    assert run.folder.read_manifest() is None


def test_sigterm_finishes_the_step_and_leaves_a_checkpoint(workshop: Workshop) -> None:
    """Like the supervisor: send the signal to this process once the second step is in the events."""
    number = workshop.jobs + 1
    path = workshop.root / "jobs" / f"sft-{number}" / "events.jsonl"

    def watch() -> None:
        while sum(event.type == "step" for event in read(path).events) < 2:
            time.sleep(0.005)
        os.kill(os.getpid(), signal.SIGTERM)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    run = workshop.run("sft", "mixtral", training={"n_epochs": 500, "batch_size": 2})
    watcher.join()
    assert run.exit_code == STOPPED
    assert run.folder.read_manifest() is None
    (saved,) = [event.artifact for event in run.events("saved") if "step-" in event.artifact["identifier"]]
    last = run.events("step")[-1].step
    assert saved["step"] == last == run.events("cancelled")[0].step
    assert saved["path"].endswith(f"step-{last}")
    assert (Path(saved["path"]) / "adapter_model.safetensors").is_file()
    assert (Path(saved["path"]) / "optimizer.pt").is_file()


@pytest.mark.parametrize("family", [*tiny_models.FAMILIES])
def test_every_family_trains(workshop: Workshop, family: str) -> None:
    run = workshop.run("sft", family, sft_rows(8), [*sft_rows(2, 50)])
    assert run.exit_code == COMPLETED, run.reason
    layout = run.resolved["layout"]
    assert (layout is None) == (family in tiny_models.DENSE)
    assert bool(run.events("routing")[0].layers if layout else None) == (layout is not None)
    assert ("aux_loss" in run.events("step")[0].metrics) == bool(layout and layout["aux_loss"])
    before, after = run.held_out("validation_loss")
    assert after < before


@pytest.mark.parametrize("family", ["glm4_moe", "deepseek_v3", "llama4_text"])
def test_an_aux_loss_that_the_model_has_not_is_computed_here(workshop: Workshop, family: str) -> None:
    run = workshop.run("sft", family, moe={"router_aux_loss_coef": 0.01, "train_router": True})
    assert run.exit_code == COMPLETED, run.reason
    losses = run.steps("aux_loss")
    assert all(loss > 0.9 for loss in losses)
    for step, loss in zip(run.events("step"), losses, strict=True):
        assert step.metrics["loss"] == pytest.approx(step.metrics["ce"] + 0.01 * loss, rel=1e-5)


def test_a_model_folder_without_weights_fails_with_its_name(workshop: Workshop, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    tiny_models.config("mixtral").save_pretrained(empty)
    run = workshop.run("sft", empty)
    assert run.exit_code == FAILED
    assert f"model: the model in '{empty}' can't be loaded" in run.reason or str(empty) in run.reason


def test_bad_rows_fail_by_number_before_the_first_step(workshop: Workshop) -> None:
    rows = [*sft_rows(5), {"messages": [said("user", "many " * 200), said("assistant", "B")]}]
    run = workshop.run("sft", "llama", rows)
    assert run.exit_code == FAILED
    left_out = "1 of 6 rows (16.7%) would be left out, more than options.max_dropped = 0.05 allows"
    assert f"dataset 'train': {left_out}: row 6: no token to learn" in run.reason


def test_deterministic_is_for_this_job_alone(workshop: Workshop) -> None:
    """It is set in torch while the job runs, and reset by the next; the plan shows the setting."""
    finished = workshop.run("sft", "mixtral", sft_rows(8), options={"deterministic": True})
    assert finished.exit_code == COMPLETED, finished.reason
    assert torch.are_deterministic_algorithms_enabled()
    assert workshop.run("sft", "mixtral", sft_rows(8)).exit_code == COMPLETED
    assert not torch.are_deterministic_algorithms_enabled()
