"""The demo of reinforcement learning: its prompts, jobs and figures; with the mark `slow`, all of it."""

import importlib
import json
import math
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from llama_stack_provider_moe.spec import JOB_SPEC

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def demo(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module("demo_rl")


@pytest.fixture
def measuring(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module("demo_rl_measure")


def test_no_held_out_prompt_is_trained_on(demo: ModuleType, measuring: ModuleType) -> None:
    trained, held_out = demo.training_prompts(), demo.held_out_prompts()
    assert len(trained) == demo.STEPS * demo.BATCH // demo.GROUP, "each step has prompts of its own"
    assert len(held_out) == 56
    others = [row["prompt"] for row in measuring.other_text()]
    assert len({*trained, *held_out, *others}) == len(trained) + len(held_out) + len(others)


def test_the_control_differs_by_its_order_of_rewards_alone(demo: ModuleType) -> None:
    jobs = [JOB_SPEC.validate_python(demo.body(Path("m"), "j", "d", shuffles)) for shuffles in demo.RUNS.values()]
    trained, control = (job.model_dump() for job in jobs)
    assert (trained["rl"].pop("shuffle_rewards"), control["rl"].pop("shuffle_rewards")) == (False, True)
    assert trained == control
    assert jobs[0].reward[0].grader.most == demo.MOST_WORDS


@pytest.mark.parametrize(
    ("text", "ended", "keeps"),
    [
        ("one two three four five six seven eight nine ten eleven twelve", True, True),
        ("one two three four five six seven eight nine ten eleven twelve thirteen", True, False),
        ("Paris.", False, False),
        ("", True, False),
    ],
)
def test_an_answer_keeps_the_rule_if_it_ends_within_12_words(
    measuring: ModuleType, text: str, ended: bool, keeps: bool
) -> None:
    assert measuring.keeps_rule(measuring.Answered(text, [1], ended)) == keeps


class Table(torch.nn.Module):
    """A model whose next token depends on the token before it, by a table."""

    def __init__(self, chances: list[list[float]]) -> None:
        super().__init__()
        self.logits = torch.tensor(chances).log()

    def forward(self, input_ids: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.logits[input_ids])


def test_divergence_and_likelihood_are_of_the_answers_tokens(measuring: ModuleType) -> None:
    ours, theirs = Table([[0.5, 0.5], [0.9, 0.1]]), Table([[0.25, 0.75], [0.9, 0.1]])
    by_first = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)  # KL after token 0; after token 1 both are the same
    assert measuring.divergence(ours, theirs, [1, 0], [0, 1, 0]) == pytest.approx(2 * by_first, abs=1e-6)
    assert measuring.divergence(ours, ours, [0], [0, 1]) == 0

    class Tokenizer:
        def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
            return {"input_ids": [int(each) for each in text]}

        def apply_chat_template(self, messages: object, add_generation_prompt: bool) -> dict[str, list[int]]:
            return {"input_ids": [0]}

    found, count = measuring.nll(theirs, Tokenizer(), {"prompt": "", "completion": "101"})
    assert count == 3
    assert found == pytest.approx(-math.log(0.75 * 0.9 * 0.75), abs=1e-6)


def test_figures_are_those_of_the_answers(demo: ModuleType, measuring: ModuleType) -> None:
    short, long = (measuring.Answered(text, [1, 2], True) for text in ("yes", "word " * 13))
    measured = {
        "base": measuring.Measured([short, long, long, long], [0.0] * 4, [2.0, 4.0], [2, 2]),
        "trained": measuring.Measured([short] * 4, [0.2, 0.4, 0.2, 0.4], [3.0, 5.0], [2, 2]),
        "control": measuring.Measured([long, short, long, long], [0.0] * 4, [2.0, 4.0], [2, 2]),
    }
    found = demo.figures(measured)
    assert {name: each["value"] for name, each in found["rate"].items()} == {
        "base": 0.25, "trained": 1, "control": 0.25}  # fmt: skip
    assert (found["change"]["trained"]["value"], found["change"]["control"]["value"]) == (0.75, 0)
    assert found["kl"]["trained"]["value"] == pytest.approx(0.15)
    assert found["perplexity_ratio"]["trained"]["value"] == pytest.approx(math.exp(0.5))
    assert found["perplexity"]["base"]["value"] == pytest.approx(math.exp(1.5))
    assert found["words"]["base"] == [1, 13, 13, 13]


def test_a_goal_is_missed_below_its_start_or_the_control(demo: ModuleType) -> None:
    assert demo.goals_missed({"base": 0.1, "trained": 0.5, "control": 0.15}) == []
    (start,) = demo.goals_missed({"base": 0.3, "trained": 0.5, "control": 0.15})
    assert "over its start" in start
    (control,) = demo.goals_missed({"base": 0.1, "trained": 0.5, "control": 0.45})
    assert "over the control" in control


@pytest.mark.slow
def test_the_rule_is_learnt_and_not_by_the_control(tmp_path: Path) -> None:
    out = tmp_path / "figures.json"
    command = [sys.executable, str(EXAMPLES / "demo_rl.py"), "--state", str(tmp_path / "state"), "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(out.read_text(encoding="utf-8"))
    assert found["rate"]["trained"]["value"] >= found["rate"]["base"]["value"] + 0.3
    assert (tmp_path / "state" / "demo_rl.png").stat().st_size > 10_000
