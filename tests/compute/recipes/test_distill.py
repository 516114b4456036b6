"""Distillation: the loss is that of an own computation, with another teacher, the adapter off, or a frozen copy."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from llama_stack_provider_moe.compute.methods.distillation import distilled_log_prob, kl_from_teacher
from llama_stack_provider_moe.compute.models.adapted import with_adapter
from llama_stack_provider_moe.compute.moe.derive import find_layout
from llama_stack_provider_moe.compute.planning.throughput import count_flops
from llama_stack_provider_moe.compute.worker.main import COMPLETED, FAILED
from llama_stack_provider_moe.spec import JOB_SPEC
from tests.support import tiny_models
from tests.support.training_support import Row, Run, Workshop, sft_rows, workshop

__all__ = ["workshop"]
ONE_STEP = {"training": {"batch_size": 16}, "moe": {"router_aux_loss_coef": 0}}


def load(folder: Path | str) -> PreTrainedModel:
    found: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return found


def by_hand(student: Any, teacher: Any, folder: Path | str, rows: list[Row], temperature: float) -> tuple[float, float]:
    """Mean cross entropy and KL over the answers' tokens, one row at a time; none of our code."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ce = kl = 0.0
    tokens = 0
    for row in rows:
        prompt, answer = row["messages"]
        asked = tokenizer.apply_chat_template([prompt], tokenize=False, add_generation_prompt=True)
        before = len(tokenizer(asked, add_special_tokens=False)["input_ids"])
        ids = torch.tensor([tokenizer(asked + answer["content"] + "<|im_end|>", add_special_tokens=False)["input_ids"]])
        with torch.no_grad():
            mine, theirs = (model(ids).logits[0, before - 1 : -1] for model in (student, teacher))
        for label, here, there in zip(ids[0, before:], mine, theirs, strict=True):
            p, q = (there / temperature).softmax(-1), (here / temperature).softmax(-1)
            kl += float((p * (p.log() - q.log())).sum())
            ce -= float(here.log_softmax(-1)[label])
            tokens += 1
    return ce / tokens, kl / tokens


def done(run: Run) -> Run:
    assert run.exit_code == COMPLETED, run.reason
    return run


@pytest.fixture(scope="module")
def teacher(workshop: Workshop) -> Path:
    return tiny_models.build("qwen3_moe", workshop.root / "teacher", seed=5)


@pytest.mark.parametrize(("weight", "temperature"), [(0.5, 1.0), (1.0, 2.0), (0.25, 4.0)])
def test_another_teacher(workshop: Workshop, teacher: Path, weight: float, temperature: float) -> None:
    """A teacher of another family: the first step, and the first evaluation, by hand."""
    asked = {"model": str(teacher), "weight": weight, "temperature": temperature}
    run = done(workshop.run("sft", "granitemoe", distill=asked, **ONE_STEP))
    base = workshop.model("granitemoe")
    student, other = load(base), load(teacher)
    ce, kl = by_hand(student, other, base, sft_rows(16), temperature)
    (step,) = run.events("step")
    expected = (1 - weight) * ce + weight * temperature**2 * kl
    assert step.metrics["distill_kl"] == pytest.approx(kl, rel=1e-4)
    assert step.metrics["ce"] == pytest.approx(ce, rel=1e-4)
    assert step.metrics["distilled_loss"] == pytest.approx(expected, rel=1e-4)
    assert kl > 0.01
    first = run.events("evaluation")[0].metrics
    ce, kl = by_hand(student, other, base, sft_rows(4, first=100), temperature)
    assert first["distill_kl"] == pytest.approx(kl, rel=1e-4)
    assert first["validation_loss"] == pytest.approx((1 - weight) * ce + weight * temperature**2 * kl, rel=1e-4)
    assert first["perplexity"] == pytest.approx(math.exp(ce), rel=1e-4)
    assert run.resolved["distill"] == {"teacher": str(teacher), **asked}


def test_the_operations_of_a_step_have_those_of_another_teacher(workshop: Workshop, teacher: Path) -> None:
    """They did not: the figure of such a job was that of a job without a teacher."""
    runs = [
        done(workshop.run("sft", "granitemoe", **more, **ONE_STEP))
        for more in ({}, {"distill": {"model": str(teacher)}})
    ]
    (plain,), (taught,) = (run.events("step") for run in runs)
    each = [step.metrics["tflops_per_device"] * 1e12 / step.metrics["tokens_per_s"] for step in (plain, taught)]
    other, tokenizer = load(teacher).requires_grad_(False), AutoTokenizer.from_pretrained(teacher)
    texts = [tokenizer.apply_chat_template(row["messages"], tokenize=False) for row in sft_rows(16)]
    lengths = [len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
    work = count_flops(other, find_layout(other))
    assert each[1] - each[0] == pytest.approx(work.of(lengths) / sum(lengths), rel=1e-3)


def test_the_last_model_is_nearer_to_its_teacher(workshop: Workshop, teacher: Path) -> None:
    """By the teacher's term alone, the divergence on rows that were not learnt falls."""
    run = done(
        workshop.run("sft", "granitemoe", distill={"model": str(teacher), "weight": 1}, training={"n_epochs": 12})
    )
    found = run.held_out("distill_kl")
    assert found[-1] < 0.9 * found[0]
    base = workshop.model("granitemoe")
    student = with_adapter(load(base), run.folder.adapter, None).eval()
    _, kl = by_hand(student, load(teacher), base, sft_rows(4, first=100), 1.0)
    assert found[-1] == pytest.approx(kl, rel=1e-3)


@pytest.mark.parametrize("family", ["granitemoe", "gpt_oss", "phimoe", "llama"])
def test_the_adapter_off_is_the_teacher(workshop: Workshop, family: str) -> None:
    """It begins with no divergence, learns less than without a teacher, and the base is what it is measured against."""
    training = {"n_epochs": 3}
    held = done(workshop.run("sft", family, distill={"weight": 0.9}, training=training))
    free = done(workshop.run("sft", family, training=training))
    assert held.held_out("distill_kl")[0] == pytest.approx(0, abs=1e-6)
    assert held.steps("distill_kl")[-1] > 1e-4
    assert held.resolved["distill"]["teacher"] == "the model with its adapter off"
    base = workshop.model(family)
    rows, found = sft_rows(4, first=100), []
    for run in (held, free):
        student = with_adapter(load(base), run.folder.adapter, None).eval()
        found.append(by_hand(student, load(base), base, rows, 1.0)[1])
    assert found[0] < 0.8 * found[1]
    assert held.held_out("distill_kl")[-1] == pytest.approx(found[0], rel=1e-2, abs=1e-6)


def test_a_frozen_copy_where_all_weights_train(workshop: Workshop) -> None:
    run = done(workshop.run("sft", "mixtral", distill={}, adapter=None, training={"n_epochs": 2},
                            optimizer={"lr": 1e-3}))  # fmt: skip
    assert run.resolved["distill"]["teacher"] == "a frozen copy of the model"
    assert run.held_out("distill_kl")[0] == pytest.approx(0, abs=1e-6)
    base = workshop.model("mixtral")
    _, kl = by_hand(load(run.folder.model), load(base), base, sft_rows(4, first=100), 1.0)
    assert run.held_out("distill_kl")[-1] == pytest.approx(kl, rel=1e-3)
    assert kl > 1e-4


def test_a_step_has_one_loss_however_it_is_cut(workshop: Workshop, teacher: Path) -> None:
    """16 rows of several lengths as 16 x 1, 4 x 4 and 6 x 3: the same loss, gradient and adapter."""
    found = []
    for size, accumulation in ((16, 1), (4, 4), (6, 3)):
        run = done(
            workshop.run(
                "sft", "granitemoe", distill={"model": str(teacher)}, data={"shuffle": False},
                training={"batch_size": size, "gradient_accumulation_steps": accumulation},
                optimizer={"optimizer_type": "sgd"}, moe={"router_aux_loss_coef": 0},
            )
        )  # fmt: skip
        (step,) = run.events("step")
        found.append((*(step.metrics[name] for name in ("distilled_loss", "distill_kl", "ce", "grad_norm")), run))
    for each in found[1:]:
        assert each[:4] == pytest.approx(found[0][:4], rel=1e-4)
        assert all(torch.allclose(tensor, found[0][4].adapter()[name], atol=1e-6)
                   for name, tensor in each[4].adapter().items())  # fmt: skip


def test_balance_terms_stay_beside_it(workshop: Workshop, teacher: Path) -> None:
    """The weight of the teacher does not scale the routers' balance loss; checkpointing changes nothing."""
    blocks: dict[str, Any] = {"distill": {"model": str(teacher), "weight": 0.75}, "training": {"batch_size": 16}}
    blocks["moe"] = {"train_router": True, "router_aux_loss_coef": 0.1}
    plain = done(workshop.run("sft", "granitemoe", **blocks))
    kept = done(workshop.run("sft", "granitemoe", **blocks, efficiency={"enable_activation_checkpointing": True}))
    for run in (plain, kept):
        metrics = run.events("step")[0].metrics
        expected = metrics["distilled_loss"] + 0.1 * metrics["aux_loss"]
        assert metrics["loss"] == pytest.approx(expected, rel=1e-5)
        assert metrics["distilled_loss"] == pytest.approx(
            0.25 * metrics["ce"] + 0.75 * metrics["distill_kl"], rel=1e-4
        )  # fmt: skip
    assert plain.events("step")[0].metrics["grad_norm"] == pytest.approx(
        kept.events("step")[0].metrics["grad_norm"], rel=1e-4
    )


def test_a_four_bit_base_is_its_own_teacher(workshop: Workshop) -> None:
    run = done(workshop.run("sft", "granitemoe", distill={}, adapter={"quantize_base": True}))
    assert run.held_out("distill_kl")[0] == pytest.approx(0, abs=1e-6)
    assert run.held_out("distill_kl")[-1] > 0


@pytest.mark.parametrize(("recipe", "field"), [("sft", "distill.model"), ("distill", "teacher")])
@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"vocab_size": 512}, "has a vocabulary of 512, and the model one of 384; expected the same"),
        ({}, "has another tokenizer than the model"),
    ],
)
def test_a_teacher_of_other_tokens_is_refused(
    workshop: Workshop, changes: dict[str, Any], expected: str, recipe: str, field: str, tmp_path: Path
) -> None:
    """By the recipe `distill`, and by the block of SFT."""
    other = tiny_models.build("llama", tmp_path / "other", **changes)
    if not changes:
        tokenizer = AutoTokenizer.from_pretrained(other)
        tokenizer.add_tokens(["garden"])
        tokenizer.save_pretrained(other)
    teacher: dict[str, Any] = {"distill": {"model": str(other)}} if recipe == "sft" else {"teacher": str(other)}
    run = workshop.run(recipe, "granitemoe", **teacher)
    assert run.exit_code == FAILED
    assert f"{field}: {str(other)!r} {expected}" in run.reason
    assert not run.events("step")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"distill": {"weight": 1}}, "distill.weight: 1.0 is not valid without distill.model"),
        ({"data": {"dataset_id": "a", "packed": True}}, "distill: is not valid with data.packed true"),
        ({"moe": {"moe_load_balancing": "aux_free"}}, "distill: is not valid with moe.moe_load_balancing 'aux_free'"),
        ({"moe": {"router_jitter": 0.1}}, "distill: is not valid with moe.router_jitter"),
        ({"resources": {"processes": 2, "gpus": 0, "strategy": "fsdp"}}, "a distill block, whose teacher"),
        ({"resources": {"processes": 2, "gpus": 0, "strategy": "ep"}}, "a distill block, whose teacher"),
        ({"loader": "unsloth"}, "a distill block"),
        ({"distill": {"temperature": 0}}, "greater than or equal to 0.1"),
        ({"distill": {"kind": "gkd"}}, "Extra inputs are not permitted"),
        ({"recipe": "dpo"}, "Extra inputs are not permitted"),
    ],
)
def test_what_can_not_be_is_named_at_the_door(changes: dict[str, Any], expected: str) -> None:
    body = {"recipe": "sft", "model": "m", "data": {"dataset_id": "a"}, "adapter": {"rank": 4}, "distill": {}}
    with pytest.raises(ValidationError) as caught:
        JOB_SPEC.validate_python(body | changes)
    assert expected in str(caught.value)


def test_another_teacher_does_not_mind_how_the_model_routes() -> None:
    body = {"recipe": "sft", "model": "m", "data": {"dataset_id": "a"}, "adapter": {"rank": 4},
            "distill": {"model": "t", "weight": 1}, "moe": {"moe_load_balancing": "aux_free"}}  # fmt: skip
    assert JOB_SPEC.validate_python(body)


def test_the_formula_on_numbers_to_follow() -> None:
    """p = (3/4, 1/4), q = (1/2, 1/2): KL = 3/4 ln 3/2 + 1/4 ln 1/2; of doubled logits at temperature 2 as well."""
    teacher_NV = torch.tensor([[math.log(3.0), 0.0]])
    student_NV = torch.zeros(1, 2)
    expected = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert float(kl_from_teacher(student_NV, teacher_NV, 1.0)) == pytest.approx(expected, rel=1e-6)
    assert float(kl_from_teacher(student_NV, 2 * teacher_NV, 2.0)) == pytest.approx(expected, rel=1e-6)
    assert float(kl_from_teacher(teacher_NV, teacher_NV + 5, 1.0)) == pytest.approx(0, abs=1e-7)
    log_prob, kl = torch.tensor([-2.0]), torch.tensor([0.5])
    assert float(distilled_log_prob(log_prob, kl, 0.25, 2.0)) == pytest.approx(0.75 * -2.0 - 0.25 * 4 * 0.5)


def test_the_gradient_is_the_difference_of_probabilities() -> None:
    """d KL / d student = (q - p) / temperature (arXiv 1503.02531, equation 2)."""
    drawn = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(3, 5, generator=drawn) for _ in range(2))
    student.requires_grad_()
    kl_from_teacher(student, teacher, 2.0).sum().backward()
    expected: Tensor = ((student / 2).softmax(-1) - (teacher / 2).softmax(-1)) / 2
    assert student.grad is not None
    assert torch.allclose(student.grad, expected, atol=1e-6)
