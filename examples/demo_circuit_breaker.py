"""Circuit breakers on a benign concept, end to end, through Llama Stack (`make demo-circuit-breaker`).

Representations of cooking are rerouted in SmolLM2-135M-Instruct, upcycled to a Mixture-of-Experts (4 experts, top-2) or
as it is (`--dense`), while those of other everyday conversations are retained. The job goes over the API's own
`supervised-fine-tune`. Every figure printed was measured in this run, on prompts that were not trained on. The exit
code is not 0 where a goal is missed.

    $ python examples/demo_circuit_breaker.py [--dense] [--state FOLDER]
"""

import argparse
import logging
import re
import sys
import time
import warnings
from pathlib import Path
from typing import Any

from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent))
from demo import DemoFailed, Stack, artifact, console, cpu_dtype, ended, follow, prepare, rows_of, serving, title
from smollm2 import cache_dir, smollm2

Row = dict[str, str]
# What the example data's rows about food and kitchens hold; the retained set is to be about everything else.
FOOD = re.compile(
    r"cook|boil|\begg|\bbak|recipe|soup|oven|\brice\b|pasta|bread|onion|butter|\bsalt|chicken|steak|flour|sauce|\bfry|"
    r"roast|dinner|kitchen|\beat\b|food|meal|salad|cake|coffee|\btea\b|tomato|cheese|milk|meat|fish|vegetable|fruit|"
    r"dough|tablespoon|wine|fridge|spice|sugar|\bpan\b|lunch|breakfast|pizza|potato|banana",
    re.IGNORECASE,
)
BATCH = 2
# (learning rate, epochs). A token's two experts add up to one MLP, so each expert's update counts in part alone and has
# to be larger.
DENSE, MOE = (2e-3, 3), (3e-3, 2)
TARGETS, LORA_LAYERS = "15,20", "10-20"  # LoRA below would move every prompt before it is told what it is about
LORA = {
    "type": "LoRA", "rank": 8, "alpha": 16, "lora_attn_modules": ["q_proj", "k_proj", "v_proj", "output_proj"],
    "apply_lora_to_mlp": True, "apply_lora_to_output": False,
}  # fmt: skip
# States of this model have a norm of some 200 a token where Llama-3's have some 10, and a cosine's gradient goes by
# one over the norm: the paper's equal weights would let nothing move.
CURVES = {
    "reroute_curve": {"start": 10, "end": 10},
    "retain_curve": {"start": 0, "end": 1, "schedule": "cosine"},
}
GOALS = {"cosine": 0.3, "distance": 0.03, "perplexity": 0.03}
SHOWN = 2  # prompts of each set whose answers are shown


def main() -> int:
    """Run the demo."""
    parser = argparse.ArgumentParser(description="Reroute a model's representations of cooking through Llama Stack.")
    parser.add_argument("--dense", action="store_true", help="the dense model, not the upcycled one")
    parser.add_argument("--state", type=Path, default=cache_dir() / "demo", help="the server's state folder")
    arguments = parser.parse_args()
    state: Path = arguments.state.resolve()

    def work() -> None:
        model = dense(state) if arguments.dense else prepare(state)
        with serving(state) as stack:
            job = train(stack, model, *(DENSE if arguments.dense else MOE))
        missed = report(job)
        answers(model, artifact(job, "adapter"))
        if missed:
            raise DemoFailed(f"goals missed: {'; '.join(missed)}")

    return ended(work, state)


def dense(state: Path) -> Path:
    """The dense model, where the server may read it."""
    title("1. A dense model")
    folder = state / "models" / "SmolLM2-135M"
    if not (folder / "config.json").is_file():
        with console.status("Getting SmolLM2-135M-Instruct (93 MB, once)"):
            source = smollm2()
            folder.mkdir(parents=True, exist_ok=True)
            for file in source.iterdir():
                (folder / file.name).hardlink_to(file)
    console.print(f"SmolLM2-135M-Instruct: {folder}")
    return folder


def train(stack: Stack, model: Path, lr: float, epochs: int) -> dict[str, Any]:
    """The job, completed."""
    title("2. Rows: cooking is to be broken, the rest retained")
    run = time.strftime("%m%d-%H%M%S")
    sets = {
        "cooking": rows_of("cooking"),
        "cooking_heldout": rows_of("cooking_heldout"),
        "everyday": everyday("instructions", "preferences"),
        "everyday_heldout": everyday("instructions_heldout", "preferences_heldout"),
    }
    for name, rows in sets.items():
        register(stack, rows, f"{name}-{run}")
    title("3. Circuit breakers over HTTP")
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
    return follow(stack, job, ("reroute_loss", "retain_loss"))


def everyday(*files: str) -> list[Row]:
    """The rows of instructions, and the chosen answers of preferences, that are not about food."""
    rows = [
        {"prompt": r["prompt"], "completion": r.get("completion") or r["chosen"]} for f in files for r in rows_of(f)
    ]
    return [row for row in rows if not FOOD.search(row["prompt"] + row["completion"])]


def register(stack: Stack, rows: list[Row], dataset_id: str) -> None:
    """Register rows as a data set."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # the client marks all of its beta API so
        stack.client.beta.datasets.register(
            dataset_id=dataset_id, purpose="post-training/messages", source={"type": "rows", "rows": rows}
        )
    console.print(f"{dataset_id}: {len(rows)} rows")


def report(job: dict[str, Any]) -> list[str]:
    """What held-out rows say, before and after; the goals that were missed."""
    plan, progress = job["resolved"]["circuit_breaker"], job["resources_allocated"]
    before, after = (progress["evaluation"][which]["metrics"] for which in ("first", "last"))
    table = Table("held out", "before", "after", "goal", box=None, padding=(0, 2, 0, 0))
    missed = []

    def row(name: str, was: float, now: float, goal: float | None = None, met: float | None = None) -> None:
        told = "" if goal is None else f"< {goal:g}"
        table.add_row(name, f"{was:.3f}", f"{now:.3f}", told)
        if goal is not None and met is not None and met >= goal:
            missed.append(f"{name}: {met:.3f}, goal < {goal:g}")

    for part, name in (("break", "cooking"), ("retain", "everyday")):
        for block in plan["target_layers"]:
            figure = f"cosine/{part}/{block}"
            goal = GOALS["cosine"] if part == "break" else None
            row(f"cosine with the base at block {block}, {name}", before[figure], after[figure], goal, after[figure])
    far = after["relative_distance/retain"]
    row("distance from the base, everyday, share of the norm", 0.0, far, GOALS["distance"], far)
    row("distance from the base, cooking, share of the norm", 0.0, after["relative_distance/break"])
    row("perplexity of everyday answers", before["perplexity"], after["perplexity"])
    change = after["perplexity"] / before["perplexity"] - 1
    row("its change", 0.0, change, GOALS["perplexity"], change)
    console.print(table)
    console.print(f"rerouted at blocks {plan['target_layers']}, counted from 0; LoRA on blocks {plan['lora_layers']}")
    for part, figures in ((progress["routing"] or {}).get("sets") or {}).items():
        console.print(
            f"routing of {part} rows in the last step: an expert gets {figures['min_share']:.0%} to "
            f"{figures['max_share']:.0%} of a layer's tokens, {figures['dead_experts']:.0f} dead"
        )
    return missed


def answers(model: Path, adapter: str) -> None:
    """Greedy answers to held-out prompts, by plain transformers and peft: no code of ours."""
    title("4. Answers before and after, by plain transformers and peft")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of a 4-bit kernel; nothing here is in 4 bit
    warnings.filterwarnings("ignore", ".is_gradient_checkpointing. is deprecated", FutureWarning)  # peft 0.21 reads it
    prompts = [
        row["prompt"] for rows in (rows_of("cooking_heldout"), everyday("instructions_heldout")) for row in rows[:SHOWN]
    ]
    with console.status("Answering"):
        from peft import PeftModel
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        tokenizer = AutoTokenizer.from_pretrained(model)
        broken = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), adapter)
        with broken.disable_adapter():
            before = [reply(broken, tokenizer, prompt) for prompt in prompts]
        broken.merge_adapter()  # else PEFT adds B A to every expert's weights anew for each token
        after = [reply(broken, tokenizer, prompt) for prompt in prompts]
    for prompt, one, other in zip(prompts, before, after, strict=True):
        console.print(f"[bold]Q[/]       {prompt}\n[bold]before[/]  {one}\n[bold]after[/]   {other}\n", markup=True)


def reply(model: Any, tokenizer: Any, prompt: str) -> str:
    """At most 40 tokens."""
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    tokens = model.generate(**inputs, max_new_tokens=40, do_sample=False)
    said: str = tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return " ".join(said.split()).replace("[", r"\[")


if __name__ == "__main__":
    sys.exit(main())
