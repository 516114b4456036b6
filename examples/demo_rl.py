"""Reinforcement learning of a rule that anyone sees at once, through Llama Stack (`make demo-rl`).

The rule: an answer has at most 12 words. Two jobs of recipe `grpo` train the same model (SmolLM2-135M-Instruct,
upcycled to 4 experts, top-2) on the same prompts, with the same settings. In the second, the control, each answer
learns from the reward of a random answer of its group (`rl.shuffle_rewards`), so that nothing can be learnt from the
grader. Both are measured on prompts that no job has seen, by plain transformers and peft. Every figure that is printed
was measured in this run. The exit code is not 0 if a goal is missed.

    $ python examples/demo_rl.py [--state FOLDER] [--steps COUNT] [--lr RATE] [--out FILE]
"""

import argparse
import json
import platform
import sys
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import psutil
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent))
from demo import prepare
from demo_clock import CpuTime, Parts
from demo_jobs import LORA, artifact, follow, register, rows_of
from demo_rl_measure import MOST_WORDS, Measured, asked, keeps_rule, measure
from demo_screen import DemoFailed, console, ended, say, title
from demo_server import Stack, serving
from smollm2 import cache_dir

from llama_stack_provider_moe.client.documents import Job
from llama_stack_provider_moe.compute.analysis import plots
from llama_stack_provider_moe.compute.evaluation import statistics

STEPS, BATCH, GROUP = 6, 16, 8  # answers of a step, and to each prompt
LR = 1e-3
LONGEST = 32  # tokens of an answer in training
NEAR = 16  # about 12 words, in tokens
SHORT_PROMPT = 60  # characters
GOAL = 0.3  # rise of the rate on held-out prompts, over its start and over the control's end
SHOWN = 4
RESAMPLES, SEED = 2000, 0
KEPT = "rewards/short/mean"  # share of a step's answers that keep the rule
RUNS = {"trained": False, "control": True}  # whether rewards are shuffled
PACKAGES = ("torch", "transformers", "trl", "peft", "llama-stack")


def main() -> int:
    """Run the demo."""
    parser = argparse.ArgumentParser(description="Teach a model a rule by rewards, through Llama Stack.")
    parser.add_argument("--state", type=Path, default=cache_dir() / "demo", metavar="FOLDER",
                        help="state folder of the server (default: %(default)s)")  # fmt: skip
    parser.add_argument("--steps", type=int, default=STEPS, metavar="COUNT",
                        help="optimiser steps of each job (default: %(default)s)")  # fmt: skip
    parser.add_argument("--lr", type=float, default=LR, metavar="RATE", help="learning rate (default: %(default)s)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON file for the figures (default: none)")
    arguments = parser.parse_args()
    state: Path = arguments.state.resolve()
    settings = Settings(arguments.steps, arguments.lr)

    def work() -> None:
        began, parts = time.monotonic(), Parts(CpuTime())
        with parts.cpu:
            with parts.part("model"):
                model = prepare(state)
            with serving(state) as stack:
                jobs, rewards = train(stack, model, settings, parts)
            found = compare(model, jobs, parts)
        found |= {"rewards": rewards, "chart": str(chart(rewards, found, state))}
        found |= provenance(settings, parts, time.monotonic() - began)
        missed = tell(found)
        if arguments.out is not None:
            kept = {name: value for name, value in found.items() if name != "chart"}
            arguments.out.write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        if missed:
            raise DemoFailed(f"goals missed: {'; '.join(missed)}")

    return ended(work, state)


class Settings(NamedTuple):
    """What may be changed on the command line."""

    steps: int = STEPS
    lr: float = LR


def training_prompts(steps: int = STEPS) -> list[str]:
    """Return short prompts, each for one group of answers."""
    prompts = [row["prompt"] for file in ("instructions", "preferences") for row in rows_of(file)]
    return [each for each in prompts if len(each) <= SHORT_PROMPT][: steps * BATCH // GROUP]


def held_out_prompts() -> list[str]:
    """Return the prompts that measure the result."""
    return [row["prompt"] for file in ("instructions_heldout", "preferences_heldout") for row in rows_of(file)]


def body(model: Path, job: str, dataset: str, shuffles: bool, lr: float = LR) -> dict[str, Any]:
    """Return the request of a job.

    Args:
        model: folder of the model.
        job: its name.
        dataset: id of the prompts.
        shuffles: whether it is the control.
        lr: learning rate.
    """
    return {
        "recipe": "grpo", "job_uuid": job, "model": str(model), "data": {"dataset_id": dataset},
        "training": {"dtype": "fp32", "n_epochs": 1, "batch_size": BATCH},
        "optimizer": {"lr": lr, "num_warmup_steps": 0, "weight_decay": 0.0},
        "adapter": {key: LORA[key] for key in LORA if key != "type"},
        "rl": {"n_generations": GROUP, "max_completion_length": LONGEST, "shuffle_rewards": shuffles},
        "reward": [
            {"grader": {"type": "length", "name": "short", "most": MOST_WORDS}},
            # Without it, answers that all break the rule would not differ. In tokens, because of two answers that are
            # cut off, that of longer words would have fewer words.
            {"grader": {"type": "length", "name": "near", "unit": "tokens", "most": NEAR, "margin": LONGEST - NEAR},
             "weight": 0.5},
        ],
        "options": {"max_length": 128, "lr_scheduler": "constant", "validation_split": 0.0},
    }  # fmt: skip


def train(stack: Stack, model: Path, settings: Settings, parts: Parts) -> tuple[dict[str, Job], dict[str, list[float]]]:
    """Run both jobs; return them, and the share of each step's answers that keep the rule."""
    run = time.strftime("%m%d-%H%M%S")
    title("3. Register prompts")
    dataset = register(
        stack, [{"messages": asked(each)} for each in training_prompts(settings.steps)], f"questions-{run}"
    )
    jobs, rewards = {}, {}
    for at, (name, shuffles) in enumerate(RUNS.items()):
        title(f"{at + 4}. {'Control: the same with shuffled rewards' if shuffles else 'Reward short answers'}")
        with parts.part(name):
            stack.server.submit(body(model, f"{name}-{run}", dataset, shuffles, settings.lr))
            jobs[name] = follow(stack, f"{name}-{run}")
        series = stack.server.metrics(f"{name}-{run}", [KEPT])
        rewards[name] = [round(float(each), 4) for each in series["metrics"][KEPT] if each is not None]
    return jobs, rewards


def compare(model: Path, jobs: Mapping[str, Job], parts: Parts) -> dict[str, Any]:
    """Measure the base and both results on held-out prompts and on other text; print some answers."""
    title("6. Compare answers to held-out prompts, with plain transformers and peft")
    prompts = held_out_prompts()
    measured = {}
    for name in ("base", *jobs):
        with parts.part(f"measure {name}"), console.status(f"The model answers: {name}"):
            adapter = None if name == "base" else Path(artifact(jobs[name], "adapter")["path"])
            measured[name] = measure(model, adapter, prompts)
    for at in range(SHOWN):
        said = (f"{name + ':':<9} {each.answers[at].text}" for name, each in measured.items())
        say("\n".join([f"Question: {prompts[at]}", *said, ""]))
    return {"prompts": len(prompts), "other_rows": len(measured["base"].nll), **figures(measured),
            "samples": [{"prompt": prompts[at], **{name: each.answers[at].text for name, each in measured.items()}}
                        for at in range(SHOWN)]}  # fmt: skip


def figures(measured: Mapping[str, Measured]) -> dict[str, Any]:
    """Return, by model, the rate of the rule, KL to the base, and perplexity, each with its 95 % interval."""
    found: dict[str, Any] = {name: {} for name in ("rate", "change", "kl", "perplexity", "perplexity_ratio", "words")}
    base = measured["base"]
    was = [keeps_rule(each) for each in base.answers]
    for name, each in measured.items():
        now = [keeps_rule(answer) for answer in each.answers]
        found["rate"][name] = statistics.wilson(sum(now), len(now))._asdict()
        found["words"][name] = [len(answer.text.split()) for answer in each.answers]
        found["perplexity"][name] = statistics.perplexity(each.nll, each.tokens, RESAMPLES, SEED)._asdict()
        if name == "base":
            continue
        found["change"][name] = statistics.paired_difference(was, now, RESAMPLES, SEED)._asdict()
        lengths = [len(answer.tokens) for answer in each.answers]
        found["kl"][name] = statistics.per_token(each.kl, lengths, RESAMPLES, SEED)._asdict()
        ratio = statistics.perplexity_ratio(base.nll, each.nll, each.tokens, RESAMPLES, SEED)
        found["perplexity_ratio"][name] = ratio._asdict()
    return found


def tell(found: Mapping[str, Any]) -> list[str]:
    """Print the figures; return the goals missed."""
    title(f"7. {found['prompts']} held-out prompts, and {found['other_rows']} texts on cooking; 95 % intervals")
    table = Table("", f"at most {MOST_WORDS} words", "KL to the base, nats a token", "perplexity of other text",
                  box=None, padding=(0, 2, 0, 0))  # fmt: skip
    for name, rate in found["rate"].items():
        table.add_row(
            name,
            interval(rate, ".0%"),
            interval(found["kl"][name], ".3f") if name in found["kl"] else "",
            interval(found["perplexity"][name], ".2f"),
        )
    console.print(table)
    for name, each in found["parts"].items():
        say(f"{name}: {each['wall_s'] / 60:.1f} min by the clock, {each['cpu_s'] / 60:.1f} min of processors' time")
    say(f"The chart is {found['chart']}")
    return goals_missed({name: rate["value"] for name, rate in found["rate"].items()})


def goals_missed(rates: Mapping[str, float]) -> list[str]:
    """Return the goals that the rates on held-out prompts miss.

    Args:
        rates: of the base, of the trained model, and of the control.
    """
    missed = []
    for other, words in (("base", "its start"), ("control", "the control")):
        above = rates["trained"] - rates[other]
        if above < GOAL:
            missed.append(f"rate of short answers: {above:+.2f} over {words}, goal {GOAL:+.2f}")
    return missed


def interval(found: Mapping[str, float], form: str) -> str:
    """Say a figure with its interval."""
    return f"{found['value']:{form}} ({found['low']:{form}} to {found['high']:{form}})"


def chart(rewards: Mapping[str, list[float]], found: Mapping[str, Any], folder: Path) -> Path:
    """Draw the share of each step's answers that keep the rule, and the words of held-out answers; return the file.

    Raises:
        DemoFailed: matplotlib is not installed.
    """
    if not plots.installed():
        raise DemoFailed(plots.MISSING)
    figure = plots.new_figure(10, 4)
    left, right = figure.subplots(1, 2)
    for name, values in rewards.items():
        left.plot(range(1, len(values) + 1), values, marker="o", label=name)
    left.set(xlabel="step", ylabel=f"share of its answers with at most {MOST_WORDS} words", ylim=(0, 1))
    left.legend()
    for name, words in found["words"].items():
        ordered = sorted(words)
        right.step(ordered, [(at + 1) / len(ordered) for at in range(len(ordered))], where="post", label=name)
    right.axvline(MOST_WORDS, color="grey", linestyle=":")
    right.set(xlabel="words of a held-out answer", ylabel="share of answers with at most so many", ylim=(0, 1))
    right.legend()
    path = folder / "demo_rl.png"
    figure.savefig(path, dpi=plots.DPI)
    return path


def provenance(settings: Settings, parts: Parts, wall_s: float) -> dict[str, Any]:
    """Return how the figures came about: settings, machine, versions, times."""
    return {
        "command": "make demo-rl" if settings == Settings() else f"demo_rl --steps {settings.steps} --lr {settings.lr}",
        "machine": f"{platform.machine()}, {psutil.cpu_count()} cores",
        "versions": {name: version(name) for name in PACKAGES},
        "settings": {**settings._asdict(), "answers_a_step": BATCH, "answers_a_prompt": GROUP,
                     "longest": LONGEST, "most_words": MOST_WORDS},
        "parts": parts.seconds, "wall_s": round(wall_s, 1), "cpu_s": round(parts.cpu.seconds, 1),
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
