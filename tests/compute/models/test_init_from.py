"""`adapter.init_from`: a job starts from the other adapter, and still compares with the base."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from llama_stack_provider_moe.compute.worker.main import COMPLETED, FAILED
from tests.support import tiny_models
from tests.support.alike import assert_alike
from tests.support.together import Office, office
from tests.support.training_support import Run, Workshop, dpo_rows, workshop

__all__ = ["workshop"]

RULES = [{"layers": "0", "experts": {"0": 4, "2-3": 2}}, {"layers": "1", "experts": {"1": 3}}]
# Name -> family, adapter and other blocks, the same for both jobs.
KINDS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "all experts": ("mixtral", {}, {}),
    "an expert's own rank": ("granitemoe", {"plan": "per_expert", "rules": RULES}, {}),
    "routers, head": ("qwen3_moe", {"apply_lora_to_output": True, "router_rank": 2}, {"moe": {"train_router": True}}),
    "rsLoRA": ("llama", {"use_rslora": True, "layers": "1"}, {}),
    "DoRA": ("llama", {"use_dora": True}, {}),
    "4 bits": ("mixtral", {"quantize_base": True}, {}),
    "moved biases": ("deepseek_v3", {}, {"moe": {"moe_load_balancing": "aux_free", "router_bias_rate": 0.05}}),
}  # fmt: skip


def sft(workshop: Workshop, kind: str, start: Path | None = None, recipe: str = "sft", **more: Any) -> Run:
    """A job of a kind, with a fresh adapter or one that starts from `start`."""
    family, adapter, blocks = KINDS[kind]
    asked = {**adapter, **more.pop("adapter", {}), **({} if start is None else {"init_from": str(start)})}
    return workshop.run(recipe, family, adapter=asked, **{**blocks, **more})


@pytest.fixture(scope="module")
def first(workshop: Workshop) -> Run:
    run = sft(workshop, "all experts", training={"n_epochs": 3})
    assert run.exit_code == COMPLETED, run.reason
    return run


@pytest.mark.parametrize("kind", KINDS)
def test_a_job_begins_where_the_other_ended(workshop: Workshop, kind: str) -> None:
    one = sft(workshop, kind)
    two = sft(workshop, kind, one.folder.adapter)
    assert (one.exit_code, two.exit_code) == (COMPLETED, COMPLETED), one.reason + two.reason
    before, after = two.held_out("validation_loss")[0], two.held_out("validation_loss")[-1]
    assert before == pytest.approx(one.held_out("validation_loss")[-1], abs=1e-6)
    assert after < before < one.held_out("validation_loss")[0]
    assert f"starts from the adapter in {one.folder.adapter}" in str(two.resolved["adapter"]["notes"])
    mine, its = two.final(), one.final()
    assert {name: tensor.shape for name, tensor in mine.items()} == {name: tensor.shape for name, tensor in its.items()}
    if kind == "an expert's own rank":
        (down,) = [name for name in mine if "layers.0." in name and "experts" in name and name.count("lora_A") == 1][:1]
        assert torch.equal(mine[down].view(4, -1, mine[down].shape[1])[1], torch.zeros(4, mine[down].shape[1]))
    if kind == "moved biases":
        bias = load_file(two.folder.adapter / "router_bias.safetensors")
        moved = load_file(one.folder.adapter / "router_bias.safetensors")
        assert all((bias[name] - moved[name]).abs().max() < 0.2 for name in moved)
        assert any(not torch.equal(bias[name], moved[name]) for name in moved)


@pytest.mark.parametrize("ahead", [True, False])
def test_a_preference_is_compared_with_the_base(workshop: Workshop, first: Run, ahead: bool) -> None:
    """With and without a reference computed ahead, where TRL would use its copy of the adapter as the reference."""
    options = {"precompute_ref_log_probs": ahead}
    run = sft(workshop, "all experts", first.folder.adapter, "dpo", options=options)
    assert run.exit_code == COMPLETED, run.reason
    margin = run.held_out("rewards/margins")[0]
    base, adapted = (_log_ratio(workshop, first, with_adapter) for with_adapter in (False, True))
    assert abs(adapted - base) > 0.1
    assert margin == pytest.approx(0.1 * (adapted - base), abs=1e-4)
    assert abs(run.steps("loss")[0] - math.log(2)) > 1e-3
    assert run.resolved["reference"] == "the adapter off"
    assert not [name for name in run.final() if ".ref." in name]


def _log_ratio(workshop: Workshop, run: Run, with_adapter: bool) -> float:
    """The mean of log p(chosen) - log p(rejected) over the held-out pairs, with plain transformers and PEFT."""
    folder = workshop.model("mixtral")
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if with_adapter:
        model = PeftModel.from_pretrained(model, run.folder.adapter)
    tokenizer = tiny_models.tokenizer()
    total = 0.0
    for row in dpo_rows(4, first=100):
        for sign, answer in ((1, row["chosen"]), (-1, row["rejected"])):
            prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, tokenize=False)
            whole = tokenizer.apply_chat_template([*row["prompt"], *answer], tokenize=False)
            start = len(tokenizer(prompt)["input_ids"])
            ids = torch.tensor([tokenizer(whole.rstrip("\n"))["input_ids"]])
            with torch.no_grad():
                log_p = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
            total += sign * float(log_p[start - 1 :].sum()) / 4
    return total


def test_a_breaker_goes_on_where_the_other_ended(workshop: Workshop) -> None:
    model = workshop.model("mixtral", num_hidden_layers=4)
    one = workshop.run("circuit_breaker", model, optimizer={"lr": 2e-2}, training={"n_epochs": 2})
    assert one.exit_code == COMPLETED, one.reason
    start = {"init_from": str(one.folder.adapter), "layers": "0-1"}
    two = workshop.run("circuit_breaker", model, optimizer={"lr": 2e-2}, adapter=start)
    assert two.exit_code == COMPLETED, two.reason
    for name in ("cosine/break/1", "distance/retain"):
        assert two.held_out(name)[0] == pytest.approx(one.held_out(name)[-1], abs=1e-5)
    assert two.held_out("cosine/break/1")[0] < 0.9


def test_an_adapter_that_peft_wrote(workshop: Workshop, tmp_path: Path) -> None:
    folder = workshop.model("llama")
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), config)
    model.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    lora = {"lora_attn_modules": ["q_proj", "v_proj"], "apply_lora_to_mlp": False}
    fresh = workshop.run("sft", "llama", adapter=lora)
    run = workshop.run("sft", "llama", adapter=lora | {"init_from": str(tmp_path / "theirs")})
    assert (fresh.exit_code, run.exit_code) == (COMPLETED, COMPLETED), run.reason
    assert abs(run.held_out("validation_loss")[0] - fresh.held_out("validation_loss")[0]) > 1e-3
    started = load_file(tmp_path / "theirs" / "adapter_model.safetensors")
    assert run.final().keys() == started.keys()


@pytest.mark.parametrize(
    ("adapter", "blocks", "told"),
    [
        ({"rank": 8}, {}, "weights have another shape (rank, or model)"),
        ({"alpha": 4}, {}, "its scale is 2, this job's 1 (alpha, rank, use_rslora)"),
        ({"lora_attn_modules": ["q_proj"]}, {}, "of its weights are not in this job"),
        ({"apply_lora_to_output": True}, {}, "2 weights of this job are not in it: base_model.model.lm"),
        ({"plan": "per_expert", "rules": [{"experts": {"0-2": 4, "3": 2}}]}, {}, "experts have other ranks in "),
        ({}, {"moe": {"train_router": True}}, "weights of this job are not in it"),
    ],
)  # fmt: skip
def test_another_layout_ends_the_job_by_name(
    workshop: Workshop, first: Run, adapter: dict[str, Any], blocks: dict[str, Any], told: str
) -> None:
    run = sft(workshop, "all experts", first.folder.adapter, adapter=adapter, **blocks)
    assert run.exit_code == FAILED
    assert run.reason.startswith(f"adapter.init_from: the adapter in {first.folder.adapter} does not match this job")
    assert told in run.reason


def test_biases_that_would_be_lost_end_the_job(workshop: Workshop, first: Run, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (folder / name).write_bytes((first.folder.adapter / name).read_bytes())
    save_file({"a": torch.zeros(1)}, folder / "router_bias.safetensors")
    run = sft(workshop, "all experts", folder)
    assert (run.exit_code, "it has trained router biases" in run.reason) == (FAILED, True)
    (folder / "router_bias.safetensors").unlink()
    (folder / "adapter_model.safetensors").write_bytes(b"no weights")
    run = sft(workshop, "all experts", folder)
    assert (run.exit_code, "adapter_model.safetensors can't be read" in run.reason) == (FAILED, True)


def test_a_resumed_job_goes_on_from_its_own_checkpoint(workshop: Workshop, first: Run) -> None:
    unbroken = sft(workshop, "all experts", first.folder.adapter, training={"n_epochs": 2})
    copy = workshop.copied(unbroken)
    for path in (copy.root / "checkpoints").iterdir():
        if path.name == "epoch-2":
            path.rename(path.with_name(".gone"))
    resumed = workshop.again(Run(copy, 0))
    assert resumed.exit_code == COMPLETED, resumed.reason
    assert [event.checkpoint for event in resumed.events("resumed")] == ["epoch-1"]
    mine, its = resumed.final(), unbroken.final()
    assert all(torch.equal(mine[name], tensor) for name, tensor in its.items())


@pytest.fixture(scope="module")
def desk(workshop: Workshop) -> Iterator[Office]:
    with office(workshop) as made:
        yield made


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "ep"])
def test_processes_that_train_together_start_from_it(
    workshop: Workshop, desk: Office, first: Run, strategy: str
) -> None:
    start = {"init_from": str(first.folder.adapter)}
    one = sft(workshop, "all experts", first.folder.adapter)
    resources = {"gpus": 0, "processes": 2, "strategy": strategy}
    folder = workshop.job("sft", "mixtral", adapter=start, resources=resources, training={"batch_size": 4})
    desk.submit(folder)
    two = desk.ended(folder)
    assert (one.exit_code, two.exit_code) == (COMPLETED, COMPLETED), one.reason + two.reason
    assert_alike(two, one, atol=1e-4)
