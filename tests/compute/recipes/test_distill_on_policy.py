"""Laws of recipe `distill`, on tiny models: the loss by hand, its teacher, its answers, and what it wins back."""

import doctest
import json
import math
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from trl.trainer.distillation_trainer import _chunked_divergence_loss

from llama_stack_provider_moe.compute.methods import distillation
from llama_stack_provider_moe.compute.methods.distillation import divergence_from_teacher, entropy_of
from llama_stack_provider_moe.compute.recipes.distill import OnPolicyDistillation
from llama_stack_provider_moe.compute.worker.main import COMPLETED, STOPPED
from llama_stack_provider_moe.ground import liveness
from llama_stack_provider_moe.jobdir.folder import JobFolder, write_atomic
from llama_stack_provider_moe.jobdir.samples import GeneratedSample
from llama_stack_provider_moe.spec import JOB_SPEC
from tests.support import surgery_models
from tests.support.alike import curve
from tests.support.training_support import Run, Workshop, prompt_rows, sft_rows, workshop

__all__ = ["workshop"]

STILL: dict[str, Any] = {"optimizer": {"lr": 1e-12}, "moe": {"router_aux_loss_coef": 0}}


def done(run: Run) -> Run:
    assert run.exit_code == COMPLETED, run.reason
    return run


def load(folder: Path | str) -> PreTrainedModel:
    found: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return found


def samples(run: Run) -> dict[int, list[GeneratedSample]]:
    """Step -> the answers that it learns from."""
    files = sorted(run.folder.samples.glob("*.jsonl"))
    return {
        int(file.stem): [GeneratedSample.model_validate_json(line) for line in file.read_text().splitlines()]
        for file in files
    }


# The formula.


def test_the_formulas_example() -> None:
    assert doctest.testmod(distillation).failed == 0


def by_hand(p: list[float], q: list[float], beta: float) -> float:
    """Equation 1 of arXiv 2306.13649, of a teacher's probabilities p and a student's q; its ends are the KLs."""
    if beta in (0, 1):
        here, there = (p, q) if beta == 0 else (q, p)
        return sum(a * math.log(a / b) for a, b in zip(here, there, strict=True))
    mixed = [beta * a + (1 - beta) * b for a, b in zip(p, q, strict=True)]
    return sum(
        share * sum(a * math.log(a / m) for a, m in zip(of, mixed, strict=True))
        for share, of in ((beta, p), (1 - beta, q))
    )


@pytest.mark.parametrize("beta", [0.0, 0.2, 0.5, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_divergence_is_the_papers_and_trls(beta: float, temperature: float) -> None:
    """Values by hand; values, gradients and entropies as TRL's head computes them from hidden states."""
    drawn = torch.Generator().manual_seed(0)
    states, theirs = torch.randn(1, 5, 4, generator=drawn), torch.randn(1, 5, 6, generator=drawn)
    head, other = torch.randn(7, 4, generator=drawn), torch.randn(7, 6, generator=drawn)
    student, teacher = (states @ head.T)[0].requires_grad_(), (theirs @ other.T)[0]
    found = divergence_from_teacher(student, teacher, beta, temperature)
    for mine, here, there in zip(found, student, teacher, strict=True):
        p, q = ((each / temperature).softmax(-1).tolist() for each in (there, here))
        assert mine.item() == pytest.approx(by_hand(p, q, beta), rel=1e-5)
    own = states.clone().requires_grad_()
    loss, entropies, tokens = _chunked_divergence_loss(
        own, theirs, head, other, torch.tensor([[1, 1, 1, 0, 1]]), beta, temperature=temperature
    )
    kept = [0, 1, 2, 4]
    assert (loss.item(), int(tokens)) == (pytest.approx(found[kept].mean().item(), rel=1e-5), 4)
    assert entropies.item() == pytest.approx(entropy_of(student[kept], temperature).sum().item(), rel=1e-5)
    loss.backward()
    found[kept].mean().backward()
    assert own.grad is not None
    assert student.grad is not None
    torch.testing.assert_close(own.grad[0], student.grad @ head, rtol=1e-4, atol=1e-6)


# A job.


class Seen:
    """The generations of a job, in order: prompts and answers as ids, and whether the job evaluated."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.training: list[list[tuple[list[int], list[int]]]] = []
        self.evaluating: list[list[tuple[list[int], list[int]]]] = []
        write = OnPolicyDistillation._generate_and_score_completions

        def written(trainer: OnPolicyDistillation, inputs: Any) -> Any:
            batch = write(trainer, inputs)
            pairs = [
                (prompt[there.bool()].tolist(), answer[counts.bool()].tolist())
                for prompt, there, answer, counts in zip(
                    batch["prompt_ids"], batch["prompt_mask"], batch["completion_ids"], batch["completion_mask"],
                    strict=True)
            ]  # fmt: skip
            (self.training if trainer.model.training else self.evaluating).append(pairs)
            return batch

        monkeypatch.setattr(OnPolicyDistillation, "_generate_and_score_completions", written)


def mean_divergence(
    student: Any, teacher: Any, pairs: list[tuple[list[int], list[int]]], beta: float, temperature: float
) -> float:
    """Over all tokens of the answers, one row at a time; none of our code."""
    total, tokens = 0.0, 0
    for prompt, answer in pairs:
        ids = torch.tensor([prompt + answer])
        with torch.no_grad():
            mine, theirs = (model(ids).logits[0, len(prompt) - 1 : -1] / temperature for model in (student, teacher))
        for here, there in zip(mine.double().softmax(-1), theirs.double().softmax(-1), strict=True):
            total += by_hand(there.tolist(), here.tolist(), beta)
            tokens += 1
    return total / tokens


def that_ends(workshop: Workshop, family: str) -> Path:
    """A tiny model many of whose tokens end an answer, so that answers differ in length."""
    folder = workshop.root / f"{family}-that-ends"
    if not folder.is_dir():
        shutil.copytree(workshop.model(family), folder)
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, *range(4, 60)]}))
    return folder


@pytest.mark.parametrize(
    ("family", "beta", "temperature"), [("granitemoe", 1.0, 1.0), ("qwen3_moe", 0.3, 1.5), ("llama4_text", 0.0, 1.0)]
)
def test_a_steps_loss_is_the_mean_over_its_tokens(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch, family: str, beta: float, temperature: float
) -> None:
    """Two micro-batches of answers of unequal lengths; Granite divides logits, Llama 4 hides its backbone."""
    seen, model, teacher = Seen(monkeypatch), that_ends(workshop, family), workshop.model("granitemoe", seed=5)
    run = done(workshop.run(
        "distill", model, beta=beta, teacher=str(teacher), training={"batch_size": 4, "gradient_accumulation_steps": 2},
        generation={"max_completion_length": 12, "temperature": temperature}, **STILL,
    ))  # fmt: skip
    student, other = load(model), load(teacher)
    assert len(seen.training) == 2
    assert len({len(answer) for pairs in seen.training for _, answer in pairs}) > 3
    for step, pairs in enumerate(seen.training):
        wanted = mean_divergence(student, other, pairs, beta, temperature)
        assert run.steps("divergence")[step] == pytest.approx(wanted, rel=1e-4)
        assert run.steps("loss")[step] == run.steps("divergence")[step]
    assert wanted > 0.01
    first, held = run.events("evaluation")[0].metrics, seen.evaluating[0]
    assert first["validation_loss"] == pytest.approx(mean_divergence(student, other, held, beta, temperature), rel=1e-4)
    assert first["completions/mean_length"] == pytest.approx(sum(len(answer) for _, answer in held) / len(held))
    for prompt, answer in held:
        logits = student(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        assert answer == logits.argmax(-1).tolist(), "held-out prompts are answered greedily"
    assert run.resolved["teacher"] == str(teacher)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_a_model_has_nothing_to_learn_from_itself(workshop: Workshop, beta: float) -> None:
    run = done(workshop.run("distill", "granitemoe", beta=beta, teacher=str(workshop.model("granitemoe")),
                            moe={"router_aux_loss_coef": 0}, optimizer={"optimizer_type": "sgd"}))  # fmt: skip
    assert max(map(abs, run.steps("divergence"))) < 1e-6
    assert max(run.steps("grad_norm")) < 1e-4


@pytest.fixture(scope="module")
def balanced(workshop: Workshop) -> Run:
    """LoRA on attention, experts and routers, with a balance loss."""
    return done(workshop.run("distill", "granitemoe", adapter={"apply_lora_to_mlp": True},
                             moe={"train_router": True, "router_aux_loss_coef": 0.1}))  # fmt: skip


@pytest.mark.parametrize("form", ["switch", "gshard"])
def test_the_balance_loss_stays_beside_and_reaches_routers(workshop: Workshop, balanced: Run, form: str) -> None:
    """`gshard` is computed here, `switch` by the model."""
    run = (
        balanced
        if form == "switch"
        else done(
            workshop.run(
                "distill",
                "granitemoe",
                moe={"train_router": True, "router_aux_loss_coef": 0.1, "moe_load_balancing": form},
            )
        )
    )
    for step in run.events("step"):
        wanted = step.metrics["divergence"] + 0.1 * step.metrics["aux_loss"]
        assert step.metrics["loss"] == pytest.approx(wanted, rel=1e-5)
    assert len(run.events("routing")) == len(run.events("step"))
    itself = {"teacher": str(workshop.model("granitemoe")), "training": {"batch_size": 16}}
    found = [
        done(workshop.run("distill", "granitemoe", **itself,
                          moe={"train_router": True, "router_aux_loss_coef": each, "moe_load_balancing": form}))
        for each in (0.0, 1.0)
    ]  # fmt: skip
    norms = [run.steps("grad_norm")[0] for run in found]
    assert norms[0] < 1e-4 < 1e-2 < norms[1], "from itself only the balance loss has a gradient"
    moved = [
        name for name, weight in found[1].adapter().items() if "router" in name and "lora_B" in name and weight.any()
    ]
    assert moved


def test_experts_learn_and_answers_are_kept(balanced: Run) -> None:
    moved = [
        name for name, weight in balanced.adapter().items() if "experts" in name and "lora_B" in name and weight.any()
    ]
    assert len(moved) >= 2
    kept = samples(balanced)
    assert sorted(kept) == [1, 2]
    for step, answers in kept.items():
        assert [each.group for each in answers] == list(range(8))
        assert all((each.step, each.rewards, each.reward, each.advantage) == (step, {}, None, None) for each in answers)
        assert all("Write" in each.prompt and 1 <= each.tokens <= 6 for each in answers)
    assert "samples" not in (balanced.folder.output.read_text() if balanced.folder.output.exists() else "")


def test_old_answers_are_deleted(workshop: Workshop) -> None:
    found = workshop.run("distill", "granitemoe", generation={"keep_samples": 8}, training={"n_epochs": 2})
    assert sorted(samples(found)) == [4]
    none = workshop.run("distill", "granitemoe", generation={"keep_samples": 0})
    assert not none.folder.samples.exists()


def test_a_four_bit_model_learns_from_a_whole_one(workshop: Workshop) -> None:
    run = done(workshop.run("distill", "granitemoe", teacher=str(workshop.model("granitemoe")),
                            adapter={"quantize_base": True}, training={"n_epochs": 4}))  # fmt: skip
    assert run.held_out("validation_loss")[0] > 1e-5, "what four bits cost"


def test_a_step_needs_enough_prompts(workshop: Workshop) -> None:
    found = workshop.run("distill", "granitemoe", prompt_rows(3))
    assert "has 3 prompts to train on; expected at least 8, those of one step" in found.reason
    tight = workshop.run("distill", "granitemoe", generation={"max_completion_length": 94})
    assert "2 tokens, which generation.max_completion_length 94 leaves of options.max_length 96" in tight.reason
    assert "Lower generation.max_completion_length" in tight.reason


def test_a_request_to_stop_ends_generating_within_a_token(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """The job resumes bitwise from the step before, and writes the same answers."""
    blocks: dict[str, Any] = {"adapter": {"dropout": 0.1}, "options": {"eval_before_training": False}}
    unbroken = done(workshop.run("distill", "granitemoe", **blocks))
    advance, at = liveness.Counter.advance, []

    def advancing(counter: liveness.Counter, count: int = 1) -> None:
        advance(counter, count)
        if counter.work.stage == "generating":
            at.append(counter.work.done)
            if at.count(2) == 2 and at[-1] == 2:
                os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(liveness.Counter, "advance", advancing)
    broken = workshop.run("distill", "granitemoe", **blocks)
    assert (broken.exit_code, at[-1]) == (STOPPED, 2)
    assert [event.step for event in broken.events("cancelled")] == [1]
    assert sorted(samples(broken)) == [1]
    monkeypatch.undo()
    resumed = done(workshop.again(broken))
    assert curve(resumed) == curve(unbroken)
    assert samples(resumed) == samples(unbroken)
    assert all(torch.equal(tensor, unbroken.adapter()[name]) for name, tensor in resumed.adapter().items())


# A pruned model.


def pruned(workshop: Workshop, model: Path) -> Path:
    """The model with four of its eight experts in each layer, by a surgery job."""
    folder = JobFolder(workshop.root / "jobs" / "pruned")
    folder.data.mkdir(parents=True)
    dropped = {"action": "prune", "drop": {"0": "4-7", "1": "4-7"}}
    body = {"recipe": "surgery", "job_uuid": "pruned", "model": str(model), "surgery": dropped}
    write_atomic(folder.spec, JOB_SPEC.validate_python(body))
    done(workshop.again(Run(folder, 0)))
    return folder.model


def test_a_pruned_model_is_healed_by_the_model_before(workshop: Workshop) -> None:
    """On held-out prompts the divergence from the whole model falls; without learning it stays what pruning made it."""
    eight = surgery_models.build("granitemoe", workshop.root / "eight")
    whole = done(workshop.run("sft", eight, sft_rows(32), adapter=None, optimizer={"lr": 3e-3},
                              training={"n_epochs": 8}, options={"eval_before_training": False}))  # fmt: skip
    less = pruned(workshop, whole.folder.model)
    heal: dict[str, Any] = {"teacher": str(whole.folder.model), "adapter": None, "beta": 0.5,
                            "generation": {"max_completion_length": 12}}  # fmt: skip
    healed = done(
        workshop.run("distill", less, prompt_rows(32), optimizer={"lr": 3e-3}, training={"n_epochs": 6}, **heal)
    )
    control = done(workshop.run("distill", less, prompt_rows(32), optimizer={"lr": 1e-12}, **heal))
    before, after = healed.held_out("validation_loss")[0], healed.held_out("validation_loss")[-1]
    assert after < 0.5 * before  # measured: 0.0257 to 0.0062 nats a token
    assert control.held_out("validation_loss")[-1] == pytest.approx(before, rel=1e-3)
    assert surgery_models.layout_of(load(healed.folder.model)).num_experts == 4
