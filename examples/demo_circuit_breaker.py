"""Circuit breakers on a benign concept, from start to end, through Llama Stack (`make demo-circuit-breaker`).

The demo reroutes representations of cooking in SmolLM2-135M-Instruct, upcycled to a Mixture-of-Experts model (4
experts, top-2) or unchanged (`--dense`), and retains those of other everyday conversations. It submits the job through
the API's `supervised-fine-tune`. Every figure that is printed was measured in this run, on prompts that it was not
trained on. The exit code is not 0 if a goal is missed.

    $ python examples/demo_circuit_breaker.py [--dense] [--state FOLDER]
"""

import argparse
import re
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent))
from demo import prepare
from demo_answers import quiet_libraries, reply
from demo_jobs import LORA, artifact, balance, cpu_dtype, evaluations, follow, register, rows_of
from demo_screen import DemoFailed, console, ended, say, title
from demo_server import Stack, serving
from smollm2 import cache_dir, smollm2

from llama_stack_provider_moe.client.documents import Job, progress_of

Row = dict[str, str]
# Words in those rows of the example data that are about food; the retained set is about everything else.
FOOD = re.compile(
    r"cook|boil|\begg|\bbak|recipe|soup|oven|\brice\b|pasta|bread|onion|butter|\bsalt|chicken|steak|flour|sauce|\bfry|"
    r"roast|dinner|kitchen|\beat\b|food|meal|salad|cake|coffee|\btea\b|tomato|cheese|milk|meat|fish|vegetable|fruit|"
    r"dough|tablespoon|wine|fridge|spice|sugar|\bpan\b|lunch|breakfast|pizza|potato|banana",
    re.IGNORECASE,
)
BATCH = 2
# (learning rate, epochs). The two experts of a token add up to one MLP, so the update of each expert counts only in
# part and must be larger.
DENSE, MOE = (2e-3, 3), (3e-3, 2)
TARGETS, LORA_LAYERS = "15,20", "10-20"  # LoRA in lower layers would move every prompt before the model knows its topic
# Hidden states of this model have a norm of some 200 per token, those of Llama-3 some 10, and the gradient of a cosine
# is proportional to one over the norm: with the paper's equal weights, nothing would move.
CURVES = {
    "reroute_curve": {"start": 10, "end": 10},
    "retain_curve": {"start": 0, "end": 1, "schedule": "cosine"},
}
GOALS = {"cosine": 0.3, "distance": 0.03, "perplexity": 0.03}
SHOWN = 2  # prompts of each set whose answers are shown
MOST_TOKENS = 60  # of an answer


def main() -> int:
    """Run the demo."""
    parser = argparse.ArgumentParser(description="Reroute a model's representations of cooking through Llama Stack.")
    parser.add_argument("--dense", action="store_true", help="use the dense model instead of the upcycled one")
    parser.add_argument("--state", type=Path, default=cache_dir() / "demo", metavar="FOLDER",
                        help="state folder of the server (default: %(default)s)")  # fmt: skip
    arguments = parser.parse_args()
    state: Path = arguments.state.resolve()

    def work() -> None:
        model = dense(state) if arguments.dense else prepare(state)
        with serving(state) as stack:
            job = train(stack, model, *(DENSE if arguments.dense else MOE))
        missed = report(job)
        answers(model, artifact(job, "adapter")["path"])
        if missed:
            raise DemoFailed(f"goals missed: {'; '.join(missed)}")

    return ended(work, state)


def dense(state: Path) -> Path:
    """Return the dense model, in a folder that the server may read."""
    title("1. Get a dense model")
    folder = state / "models" / "SmolLM2-135M"
    if not (folder / "config.json").is_file():
        with console.status("SmolLM2-135M-Instruct is downloaded (93 MB, once)"):
            source = smollm2()
            folder.mkdir(parents=True, exist_ok=True)
            for file in source.iterdir():
                (folder / file.name).hardlink_to(file)
    say(f"SmolLM2-135M-Instruct is in {folder}")
    return folder


def train(stack: Stack, model: Path, lr: float, epochs: int) -> Job:
    """Run the job; return it, completed.

    Args:
        stack: the server.
        model: folder of the model.
        lr: learning rate.
        epochs: number of epochs.
    """
    title("3. Register rows: break cooking, retain the rest")
    run = time.strftime("%m%d-%H%M%S")
    sets = {
        "cooking": rows_of("cooking"),
        "cooking_heldout": rows_of("cooking_heldout"),
        "everyday": everyday("instructions", "preferences"),
        "everyday_heldout": everyday("instructions_heldout", "preferences_heldout"),
    }
    for name, rows in sets.items():
        register(stack, rows, f"{name}-{run}")
    title("4. Train circuit breakers")
    job = f"breaker-{run}"
    stack.client.alpha.post_training.supervised_fine_tune(
        job_uuid=job,
        model=str(model),
        training_config={
            "n_epochs": epochs,
            "dtype": cpu_dtype(),
            "data_config": {
                "dataset_id": f"cooking-{run}", "validation_dataset_id": f"cooking_heldout-{run}",
                "batch_size": BATCH, "shuffle": True, "data_format": "instruct",
            },
            "optimizer_config": {"optimizer_type": "adamw", "lr": lr, "weight_decay": 0.0, "num_warmup_steps": 0},
        },
        algorithm_config=LORA,
        hyperparam_search_config={},
        logger_config={},
        extra_body={"adapter": {"layers": LORA_LAYERS}, "options": {
            "max_length": 128,
            "lr_scheduler": "cosine",
            "circuit_breaker": {
                "retain": {
                    "dataset_id": f"everyday-{run}", "validation_dataset_id": f"everyday_heldout-{run}", "ratio": 2,
                },
                "target_layers": TARGETS,
                "weighting": "dual",
                **CURVES,
            },
        }},
    )  # fmt: skip
    return follow(stack, job)


def everyday(*files: str) -> list[Row]:
    """Return instructions, and chosen answers of preferences, that are not about food."""
    rows = [
        {"prompt": r["prompt"], "completion": r.get("completion") or r["chosen"]} for f in files for r in rows_of(f)
    ]
    return [row for row in rows if not FOOD.search(row["prompt"] + row["completion"])]


def report(job: Job) -> list[str]:
    """Print metrics on held-out rows before and after training; return the goals that were missed."""
    # What the job decided from the model, and metrics that are all numbers here: documents with many kinds of values.
    resolved: Mapping[str, Any] = job["resolved"] or {}
    plan = resolved["circuit_breaker"]
    before, after = ({name: float(value) for name, value in each.items()} for each in evaluations(job))
    table = Table("held out", "before", "after", "goal", box=None, padding=(0, 2, 0, 0))
    missed = []

    def row(name: str, was: float, now: float, goal: float | None = None, met: float | None = None) -> None:
        table.add_row(name, f"{was:.3f}", f"{now:.3f}", "" if goal is None else f"< {goal:g}")
        if goal is not None and met is not None and met >= goal:
            missed.append(f"{name}: {met:.3f}, goal < {goal:g}")

    for part, name in (("break", "cooking"), ("retain", "everyday")):
        for block in plan["target_layers"]:
            figure = f"cosine/{part}/{block}"
            goal = GOALS["cosine"] if part == "break" else None
            row(f"cosine with the base at block {block}, {name}", before[figure], after[figure], goal, after[figure])
    distance = after["relative_distance/retain"]
    row("relative distance from the base, everyday", 0.0, distance, GOALS["distance"], distance)
    row("relative distance from the base, cooking", 0.0, after["relative_distance/break"])
    row("perplexity of everyday answers", before["perplexity"], after["perplexity"])
    change = after["perplexity"] / before["perplexity"] - 1
    row("change of the perplexity", 0.0, change, GOALS["perplexity"], change)
    console.print(table)
    say(f"Rerouted at blocks {plan['target_layers']}, counted from 0. LoRA on blocks {plan['lora_layers']}.")
    routing = progress_of(job).get("routing")
    if routing is not None:
        for part, figures in routing.get("sets", {}).items():
            say(f"Routing of {part} rows in the last step: {balance(figures, routing['experts'])}.")
    return missed


def answers(model: Path, adapter: str) -> None:
    """Print greedy answers to held-out prompts, by plain transformers and peft, without any code of this project."""
    title("5. Compare answers before and after, with plain transformers and peft")
    quiet_libraries()
    prompts = [
        row["prompt"] for rows in (rows_of("cooking_heldout"), everyday("instructions_heldout")) for row in rows[:SHOWN]
    ]
    with console.status("The models answer"):
        from peft import PeftModel
        from transformers import AutoModelForCausalLM, AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(model)
        broken = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), adapter)
        with broken.disable_adapter():
            before = [reply(broken, tokenizer, prompt, MOST_TOKENS) for prompt in prompts]
        broken.merge_adapter()  # or PEFT would add B A to the weights of every expert again for each token
        after = [reply(broken, tokenizer, prompt, MOST_TOKENS) for prompt in prompts]
    for prompt, one, other in zip(prompts, before, after, strict=True):
        say(f"Question: {prompt}\nBefore:   {one}\nAfter:    {other}\n")


if __name__ == "__main__":
    sys.exit(main())
