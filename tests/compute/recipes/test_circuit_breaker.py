"""Circuit-breaker jobs: every family reroutes and retains; which layers run, figures, and what is refused."""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from llama_stack_provider_moe.compute.data.mixture import PARTS, Collator, HeldOutRows, Mixture, MixtureSampler
from llama_stack_provider_moe.compute.methods.breaker import cosines, distances, reroute_loss, retain_loss, token_mean
from llama_stack_provider_moe.compute.models.hidden_states import Blocks
from llama_stack_provider_moe.compute.moe.layout import decoder_layers
from llama_stack_provider_moe.compute.worker.main import COMPLETED, FAILED
from tests.support import official_breaker, tiny_models
from tests.support.training_support import Run, Workshop, workshop

__all__ = ["workshop"]

FAMILIES = ("mixtral", "qwen3_moe", "granitemoe", "llama4_text", "glm4_moe")
KEPT = {"dataset_id": "kept", "validation_dataset_id": "kept-held-out"}
IDS = torch.randint(3, 300, (3, 12), generator=torch.Generator().manual_seed(3))
MASK = torch.ones_like(IDS)
MASK[0, 7:] = 0


def breaker(workshop: Workshop, family: str = "mixtral", layers: int = 4, **blocks: Any) -> Run:
    """A job on a model with `layers` blocks. By the rule, blocks 0 and 1 of 4 are its targets."""
    model = workshop.model(family, num_hidden_layers=layers)
    optimizer = {"lr": 2e-2, **blocks.pop("optimizer", {})}
    return workshop.run("circuit_breaker", model, optimizer=optimizer, **blocks)


@contextmanager
def passes(model: nn.Module) -> Iterator[list[str]]:
    """Names of the modules that run inside: blocks by number, and the head."""
    ran: list[str] = []
    watched = {str(i): block for i, block in enumerate(decoder_layers(model)[1])}
    watched["head"] = model.get_output_embeddings()  # type: ignore[operator]
    handles = [module.register_forward_hook(lambda *_, name=name: ran.append(name)) for name, module in watched.items()]
    yield ran
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_reroutes_and_retains(workshop: Workshop, family: str) -> None:
    # After 3 epochs, the held-out loss of two families is below the first one on some processors only.
    run = breaker(workshop, family, training={"n_epochs": 6 if family in ("llama4_text", "granitemoe") else 3})
    assert run.exit_code == COMPLETED, run.reason
    for block in (0, 1):
        before, *_, after = run.held_out(f"cosine/break/{block}")
        assert before == pytest.approx(1, abs=1e-5)
        assert after < 0.6
        assert run.held_out(f"cosine/retain/{block}")[-1] > after + 0.2
    assert run.held_out("validation_loss")[-1] < run.held_out("validation_loss")[0]
    assert run.held_out("distance/retain")[0] == pytest.approx(0, abs=1e-5)
    routing = run.events("routing")[-1]
    assert sorted(routing.sets) == ["break", "retain"]
    for layers in routing.sets.values():
        assert [each.layer for each in layers] == [each.layer for each in routing.layers]
    told = run.resolved["circuit_breaker"]
    assert (told["target_layers"], told["lora_layers"], told["all_blocks_run"]) == ([0, 1], "0-1", False)


def test_each_step_tells_losses_coefficients_and_cosines(workshop: Workshop) -> None:
    run = breaker(workshop, training={"n_epochs": 2}, circuit_breaker={"safe": {**KEPT, "ratio": 0.5}})
    steps = [event.metrics for event in run.events("step")]
    assert len(steps) == 8
    for t, metrics in enumerate(steps, start=1):
        assert metrics["reroute_coefficient"] == pytest.approx(10 * (1 - t / 16))
        assert metrics["retain_coefficient"] == pytest.approx(10 * t / 16)
        expected = (
            metrics["reroute_coefficient"] * metrics["reroute_loss"]
            + metrics["retain_coefficient"] * metrics["retain_loss"]
        )
        assert metrics["loss"] == pytest.approx(expected, rel=1e-4)
        assert metrics["breaker_loss"] == metrics["loss"]
        names = {name for name in metrics if name.startswith("cosine/")}
        assert names == {f"cosine/{part}/{block}" for part in PARTS for block in (0, 1)}
    assert steps[0]["reroute_loss"] == pytest.approx(1, abs=1e-5)
    assert {*run.events("routing")[0].sets} == {"break", "retain", "safe"}
    assert run.resolved["set_rows"] == {"break": 16, "retain": 12, "safe": 12}


@pytest.mark.parametrize("mask", ["response", "all"])
def test_a_step_is_the_same_in_one_micro_batch_or_four(workshop: Workshop, mask: str) -> None:
    """Rows of unequal length: batch 4, or 4 times batch 1, with half a retained row for each."""
    parts = {"circuit_breaker": {"retain": {**KEPT, "ratio": 0.5}, "mask": mask}, "options": {"max_grad_norm": 0}}
    whole = breaker(workshop, training={"batch_size": 4}, **parts)
    split = breaker(workshop, training={"batch_size": 1, "gradient_accumulation_steps": 4}, **parts)
    assert (whole.exit_code, split.exit_code) == (COMPLETED, COMPLETED), whole.reason + split.reason
    assert split.steps("reroute_coefficient") == whole.steps("reroute_coefficient")
    # While cosines are 1, Adam turns rounding errors into whole steps, so later steps can't be compared.
    for name in ("loss", "reroute_loss", "retain_loss", "cosine/break/1", "cosine/retain/0"):
        assert split.steps(name)[0] == pytest.approx(whole.steps(name)[0], abs=1e-5)


def test_the_schedule_ends_where_it_was_told(workshop: Workshop) -> None:
    run = breaker(workshop, circuit_breaker={"schedule_steps": 1, "schedule": "cosine", "alpha": 4})
    assert run.steps("reroute_coefficient") == pytest.approx([2, 0, 0, 0])
    curves = {"reroute_curve": {"start": 8, "end": 4}, "retain_curve": {"start": 0, "end": 6, "schedule": "cosine"}}
    run = breaker(workshop, circuit_breaker={"weighting": "dual", **curves})
    assert run.steps("reroute_coefficient") == pytest.approx([7, 6, 5, 4])
    assert run.steps("retain_coefficient") == pytest.approx([3 * (1 - math.cos(math.pi * t / 4)) for t in (1, 2, 3, 4)])


@pytest.mark.parametrize("family", [*FAMILIES, "llama", "deepseek_v3"])
def test_trap_3_blocks_are_counted_from_0(family: str) -> None:
    """Block i gives `hidden_states[i + 1]`; the official layer number is one more than ours."""
    model = tiny_models.model(family, num_hidden_layers=4)
    with torch.no_grad():
        states = Blocks(model).states([0, 2], IDS, MASK)
        hidden = model(IDS, attention_mask=MASK, output_hidden_states=True).hidden_states
    assert sorted(states) == [0, 2]
    for block, state in states.items():
        assert torch.equal(state, hidden[block + 1])
        assert not torch.allclose(state, hidden[block], atol=1e-3)


def test_trap_4_what_of_a_row_counts() -> None:
    rows: dict[Any, Any] = {
        "break": [{"input_ids": [5, 6, 7, 8], "said": [0, 0, 1, 1]}],
        "retain": [{"input_ids": [9, 10, 11], "said": [0, 1, 1]}],
    }
    item = Mixture(rows)[(("retain", 0), ("break", 0))]
    answers, everything = (Collator(0, answers_alone=alone)([item]) for alone in (True, False))
    assert answers["counted"].tolist() == [[0, 0, 1, 1], [1, 1, 1, 0]]
    assert everything["counted"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
    for batch in (answers, everything):
        assert batch["input_ids"].tolist() == [[5, 6, 7, 8], [9, 10, 11, 0]], "break rows come first"
        assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
        assert batch["labels"].tolist() == [[-100] * 4, [-100, 10, 11, -100]]
        assert (batch["part"].tolist(), batch["answer_at"].tolist()) == ([0, 1], [1, 0])
    # The official mask is everything's. Where the answer is rerouted whole and the request not at all, its loss still
    # counts 2 of 4 tokens, and always would: by hand, cosines 1, 1, 0, 0.
    official = torch.tensor([official_breaker.counted(request=2, response=2)])
    assert official.tolist() == everything["counted"][:1].tolist() != answers["counted"][:1].tolist()
    base = torch.tensor([[[1.0, 0.0]] * 4])
    hidden = torch.tensor([[[1.0, 0.0]] * 2 + [[0.0, 1.0]] * 2])
    assert official_breaker.reroute_loss([hidden], [base], official).item() == pytest.approx(0.5)
    assert reroute_loss([hidden], [base], answers["counted"][:1]).item() == 0
    assert reroute_loss([hidden], [base], everything["counted"][:1]).item() == pytest.approx(0.5)


@pytest.mark.parametrize("family", FAMILIES)
def test_trap_5_no_block_above_the_last_target_runs(family: str) -> None:
    model = tiny_models.model(family, num_hidden_layers=4)
    with passes(model) as ran, torch.no_grad():
        Blocks(model).states([0, 1], IDS, MASK)
        assert ran == ["0", "1"]
        Blocks(model).states([0, 1], IDS, MASK, whole=True)
        assert ran == ["0", "1", "0", "1", "2", "3"], "never the head"
        model(IDS)
        assert ran[6:] == ["0", "1", "2", "3", "head"], "the whole model runs again"


@pytest.mark.parametrize("family", FAMILIES)
def test_trap_5_a_pass_leaves_its_targets_states_and_no_others(family: str) -> None:
    """2 of 4 blocks: 2 tensors, where the official pass leaves 5, and runs the blocks above and the head for them."""
    model = tiny_models.model(family, num_hidden_layers=4)
    one = IDS.numel() * model.config.hidden_size * 4
    with torch.no_grad(), passes(model) as ran:
        ours = Blocks(model).states([0, 2], IDS, MASK)
        assert ran == ["0", "1", "2"]
        theirs = model(IDS, attention_mask=MASK, output_hidden_states=True).hidden_states
        assert ran[3:] == ["0", "1", "2", "3", "head"]
    assert storage_bytes(list(ours.values())) == 2 * one
    assert storage_bytes(list(theirs)) == official_breaker.held(4, *IDS.shape, model.config.hidden_size, 4) == 5 * one


def storage_bytes(states: list[Tensor]) -> int:
    """The memory that they keep alive; views of one storage count once."""
    return sum({each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in states}.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_trap_5_gradients_are_those_of_hidden_states_and_of_checkpointing(family: str) -> None:
    def gradients(how: str) -> dict[str, Tensor]:
        model = tiny_models.model(family, num_hidden_layers=4).train()
        model.requires_grad_(True)
        if how == "checkpointed":
            model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        if how == "hidden_states":
            out = model(IDS, attention_mask=MASK, output_hidden_states=True, use_cache=False).hidden_states
            found = [out[1], out[3]]
        else:
            states = Blocks(model).states([0, 2], IDS, MASK)
            found = [states[0], states[2]]
        base = [torch.ones_like(state) for state in found]
        (reroute_loss(found, base, MASK) + retain_loss(found, base, MASK)).backward()  # type: ignore[no-untyped-call]
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}

    plain, checkpointed, official = (gradients(how) for how in ("plain", "checkpointed", "hidden_states"))
    assert plain.keys() == checkpointed.keys() == official.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient)
        torch.testing.assert_close(official[name], gradient)


@pytest.mark.parametrize("family", ["mixtral", "llama4_text"])
@pytest.mark.parametrize("asked", [{"router_aux_loss_coef": 0.02}, {"router_z_loss_coef": 0.01}])
def test_balance_runs_every_block_and_is_told(workshop: Workshop, family: str, asked: dict[str, float]) -> None:
    checkpointing = {"enable_activation_checkpointing": True}
    run = breaker(workshop, family, moe={"train_router": True, **asked}, efficiency=checkpointing)
    assert run.exit_code == COMPLETED, run.reason
    assert run.resolved["circuit_breaker"]["all_blocks_run"]
    name = "aux_loss" if "router_aux_loss_coef" in asked else "router_z_loss"
    layers = [each.layer for each in run.events("routing")[0].layers]
    assert layers == run.resolved["layout"]["moe_layers"]
    (coefficient,) = asked.values()
    for event in run.events("step"):
        assert event.metrics[name] > 0
        balance = event.metrics["loss"] - event.metrics["breaker_loss"]
        assert balance == pytest.approx(coefficient * event.metrics[name], rel=1e-3)
    routers = [t for n, t in run.adapter().items() if ("gate" in n or "router" in n) and "lora_B" in n]
    assert any(weight.any() for weight in routers)


def test_checkpointing_changes_nothing(workshop: Workshop) -> None:
    plain = breaker(workshop)
    checkpointed = breaker(workshop, efficiency={"enable_activation_checkpointing": True})
    assert checkpointed.exit_code == COMPLETED, checkpointed.reason
    assert checkpointed.steps("reroute_loss")[0] == plain.steps("reroute_loss")[0]
    assert checkpointed.held_out("cosine/break/1")[-1] < 0.9


@pytest.mark.parametrize("family", FAMILIES)
def test_on_a_base_in_4_bits(workshop: Workshop, family: str) -> None:
    run = breaker(workshop, family, training={"n_epochs": 3}, adapter={"quantize_base": True})
    assert run.exit_code == COMPLETED, run.reason
    assert run.resolved["quantized"]["bits"] == 4
    assert run.held_out("cosine/break/1")[0] == pytest.approx(1, abs=1e-5)
    assert run.held_out("cosine/break/1")[-1] < 0.7


def test_plans_trunk_and_per_expert(workshop: Workshop) -> None:
    trunk = breaker(workshop, adapter={"plan": "trunk"})
    assert trunk.exit_code == COMPLETED, trunk.reason
    assert not any("experts" in name for name in trunk.adapter())
    chosen = breaker(workshop, adapter={"plan": "per_expert", "rules": [{"experts": {"1": 4}}]})
    assert chosen.exit_code == COMPLETED, chosen.reason
    updates = [tensor for name, tensor in chosen.adapter().items() if "experts" in name and "lora_B" in name]
    assert len(updates) == 4, "both projections of layers 0 and 1, which the rule did not name"
    for update in updates:
        by_expert = update.view(update.shape[0], -1, 4).abs().sum(dim=(0, 1))
        assert [bool(each) for each in by_expert] == [False, True, False, False]


def test_repbend(workshop: Workshop) -> None:
    run = breaker(workshop, training={"n_epochs": 2}, circuit_breaker={"variant": "repbend"})
    assert run.exit_code == COMPLETED, run.reason
    assert run.resolved["circuit_breaker"]["all_blocks_run"]
    for event in run.events("step"):
        told = event.metrics
        assert told["reroute_loss"] == pytest.approx(-0.5 * told["push_distance"] - 0.1 * told["alike"], abs=1e-4)
        assert told["retain_loss"] == pytest.approx(told["retain_distance"] / 2 + 0.3 * told["kl"], abs=1e-4)
        assert told["loss"] == pytest.approx(told["reroute_loss"] + told["retain_loss"], abs=1e-4)
    assert run.held_out("distance/break")[-1] > 2 * run.held_out("distance/retain")[-1]
    short = breaker(workshop, circuit_breaker={"variant": "repbend", "repbend": {"kl": 0}})
    assert short.exit_code == COMPLETED, short.reason
    assert not short.resolved["circuit_breaker"]["all_blocks_run"]


def test_without_held_out_sets_each_set_is_split(workshop: Workshop) -> None:
    run = breaker(
        workshop, data={"validation_dataset_id": None}, options={"validation_split": 0.25},
        circuit_breaker={"retain": {"dataset_id": "kept"}},
    )  # fmt: skip
    assert run.exit_code == COMPLETED, run.reason
    assert run.resolved["set_rows"] == {"break": 12, "retain": 9}
    assert run.resolved["validation_rows"] == 7


def test_lengths(workshop: Workshop) -> None:
    run = breaker(workshop, circuit_breaker={"request_length": 4, "response_length": 3}, options={"max_length": 36})
    assert run.exit_code == COMPLETED, run.reason
    told = "\n".join(event.text for event in run.events("message") if event.level == "warning")
    lengths = "circuit_breaker.request_length 4 and response_length 3; they were cut"
    assert f"16 of 16 rows of 'train' were longer than {lengths}" in told
    assert f"4 of 4 rows of 'held-out' were longer than {lengths}" in told
    assert "of 12 rows of 'kept' were longer than options.max_length = 36 tokens; their ends were cut off" in told


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"circuit_breaker": {"target_layers": "1,4"}}, "circuit_breaker.target_layers: '1,4' names block 4; this model"),
    ({"circuit_breaker": {"preset": "llama-3-8b"}}, "circuit_breaker.preset: 'llama-3-8b' names block 19; this model"),
    (
        {"adapter": {"layers": "0-2"}},
        "adapter.layers: '0-2' names layer 2, above the last target, block 1; no block",
    ),
    ({"adapter": {"layers": "2-3"}}, "adapter.layers: '2-3' starts above the last target, block 1"),
    ({"adapter": {"apply_lora_to_output": True}}, "adapter.apply_lora_to_output: true is not valid here"),
]


@pytest.mark.parametrize(("blocks", "expected"), REFUSED)
def test_what_could_not_work_is_refused(workshop: Workshop, blocks: dict[str, Any], expected: str) -> None:
    run = breaker(workshop, **blocks)
    assert run.exit_code == FAILED
    assert expected in run.reason


def test_lora_above_the_targets_where_every_block_runs(workshop: Workshop) -> None:
    run = breaker(workshop, adapter={"layers": "0-2"}, circuit_breaker={"retain_layers": "all"})
    assert run.exit_code == COMPLETED, run.reason
    assert run.resolved["circuit_breaker"]["retain_layers"] == ["embeddings", 0, 1, 2, "final norm"]
    moved = {name.split("layers.")[1][0] for name, tensor in run.adapter().items() if "lora_B" in name and tensor.any()}
    assert moved == {"0", "1", "2"}


def test_mixing() -> None:
    rows: dict[Any, Any] = {"break": 5, "retain": 4, "safe": 3}
    ratios: dict[Any, float] = {"retain": 1.5, "safe": 0.29}
    sampler = MixtureSampler(rows, ratios, 100, shuffle=True, seed=7)
    items = list(sampler)
    assert len(items) == len(sampler) == 5
    assert [len(item) - 1 for item in items] == [1, 2, 1, 3, 1], "7 of retain, and 1 of safe once 4 * 0.29 is over 1"
    assert sorted(item[0][1] for item in items) == [0, 1, 2, 3, 4]
    retained = [row for item in items for part, row in item if part == "retain"]
    assert sorted(retained[:4]) == [0, 1, 2, 3], "all rows of a set before one repeats"
    assert items == list(sampler)
    sampler.set_epoch(1)
    assert items != list(sampler)
    straight = MixtureSampler(rows, {"retain": 1.0}, 3, shuffle=False, seed=7)
    assert [item[1][1] for item in straight] == [0, 1, 2]
    straight.set_epoch(1)
    assert [item[1][1] for item in straight] == [3, 0, 1], "it continues where the previous epoch ended"
    held_out = HeldOutRows({"break": [{"row": 0}, {"row": 1}], "retain": [{"row": 2}, {"row": 3}, {"row": 4}]})
    assert len(held_out) == 5
    assert [held_out[i] for i in range(5)] == [[{"part": "break" if i < 2 else "retain", "row": i}] for i in range(5)]


def test_sets_of_one_size_are_shuffled_apart() -> None:
    """torch's generator reads 32 bits of a seed, and these must differ between sets."""
    sampler = MixtureSampler({"break": 6, "retain": 6, "safe": 6}, {"retain": 1, "safe": 1}, 6, shuffle=True, seed=3)
    orders = []
    for at, part in enumerate(PARTS):
        orders.append(tuple(row for item in sampler for name, row in item[at : at + 1] if name == part))
    assert all(sorted(order) == list(range(6)) for order in orders)
    assert len(set(orders)) == 3


def test_the_official_loss_and_ours_on_one_batch(workshop: Workshop) -> None:
    """The three known differences: padding in the mean, the layers' numbers, and the schedule."""
    torch.manual_seed(0)
    model = get_peft_model(
        tiny_models.model("llama", num_hidden_layers=6), LoraConfig(r=4, target_modules=["q_proj", "down_proj"])
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
        blocks = Blocks(model)
        moved = blocks.states(range(6), IDS, MASK)
        hidden = model(IDS, attention_mask=MASK, output_hidden_states=True).hidden_states
        with model.disable_adapter():
            still = blocks.states(range(6), IDS, MASK)
            base = model(IDS, attention_mask=MASK, output_hidden_states=True).hidden_states
    # Layers: the official 2 and 4 are our blocks 1 and 3; there the rerouting losses are one number.
    ours = reroute_loss([moved[1], moved[3]], [still[1], still[3]], MASK)
    theirs = official_breaker.reroute_loss([hidden[2], hidden[4]], [base[2], base[4]], MASK)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
    misread = reroute_loss([moved[2], moved[4]], [still[2], still[4]], MASK)
    assert abs(misread.item() - theirs.item()) > 0.01
    # Padding: 31 of 36 tokens count, so its retain loss is 31/36 of the distance at the same layers.
    fill = MASK.sum().item() / MASK.numel()
    kept = retain_loss(hidden, base, MASK)
    assert official_breaker.retain_loss(hidden, base, MASK).item() == pytest.approx(fill * kept.item(), rel=1e-5)
    # Of its 7 layers the first is the embeddings', which nothing moves, and the last is normed.
    assert token_mean(distances([hidden[0]], [base[0]])[0], MASK).item() == 0
    assert torch.equal(hidden[5], moved[4])
    assert token_mean(cosines([hidden[6]], [base[6]])[0], MASK) < 1


def test_the_official_settings_are_presets() -> None:
    from llama_stack_provider_moe.spec.breaker import PRESETS, depth_rule, preset_for

    assert preset_for("llama", 32, 4096)[0] == "llama-3-8b"
    assert preset_for("granitemoe", 24, 1024)[0] == "granite-moe"
    assert preset_for("llama", 30, 576)[0] is None
    assert (depth_rule(32), depth_rule(48), depth_rule(1)) == ((9, 20), (15, 31), (0,))
    # hidden_states 10 and 20 of the official code are the outputs of blocks 9 and 19.
    assert [PRESETS[name].targets for name in ("llama-3-8b", "mistral-7b")] == [(9, 19)] * 2
    assert [PRESETS[name].alpha for name in ("llama-3-8b", "mistral-7b")] == [10, 5]
    assert all(preset.source for preset in PRESETS.values())
    assert json.dumps([preset.targets for preset in PRESETS.values()])
