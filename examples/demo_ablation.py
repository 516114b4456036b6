"""Directional ablation of a benign concept, from start to end, through Llama Stack (`make demo-ablation`).

The concept is answering in French. The demo measures its direction in SmolLM2-135M-Instruct, upcycled to a
Mixture-of-Experts model (4 experts, top-2), shows after which blocks it is visible, and tries plans: which blocks, and
what share of the direction. The best one edits the model's weights. Every figure that is printed was measured in this
run; the plan is chosen on other prompts than those that measure its result. The exit code is not 0 if a goal is missed.

    $ python examples/demo_ablation.py [--state FOLDER] [--out FILE]
"""

import argparse
import json
import math
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import psutil
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent))
from demo import prepare
from demo_answers import quiet_libraries
from demo_jobs import artifact, cpu_dtype, follow, register, rows_of
from demo_prompts import CHOOSING, ENGLISH_HELD_OUT, HELD_OUT, contrast, rate
from demo_screen import DemoFailed, console, ended, say, title
from demo_server import Stack, serving
from smollm2 import cache_dir

from llama_stack_provider_moe.client.documents import Job

# The mean of a prompt's own last words: the 5 tokens after them are the template's.
MEASURED = {"position": -6, "span": 6}
# The frontier: from this block on, this share of the direction.
PLANS = ((0, 0.125), (0, 0.25), (0, 0.5), (10, 0.25), (10, 0.5))
GATES = (0.0, 0.5, 1.0)
CHOSEN_GATE = 0.5
GOALS = {"rate": 0.5, "perplexity": 0.05}  # at most this share of the rate before, and this rise
MOST_TOKENS = 24  # of an answer
SHOWN = 4
RETAINED = 16  # rows of each file of everyday questions
BATCH = 8


class Point(NamedTuple):
    """One plan of the frontier and what it does."""

    first: int
    scale: float
    rate: float
    rise: float


def main() -> int:
    """Run the demo."""
    parser = argparse.ArgumentParser(description="Take the direction of French out of a model, through Llama Stack.")
    parser.add_argument("--state", type=Path, default=cache_dir() / "demo", metavar="FOLDER",
                        help="state folder of the server (default: %(default)s)")  # fmt: skip
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON file for the figures (default: none)")
    arguments = parser.parse_args()
    state: Path = arguments.state.resolve()
    began_s = time.monotonic()

    def work() -> None:
        model = prepare(state)
        with serving(state) as stack:
            run = time.strftime("%m%d-%H%M%S")
            measured = measure(stack, model, run)
            found = Path(artifact(measured, "analysis")["path"])
            figures: dict[str, Any] = {"analysis": analysis(found)}
            best, figures["frontier"] = frontier(model, found)
            figures["chosen"] = best._asdict()
            edited = {gate: ablate(stack, model, measured["job_uuid"], best, gate, run) for gate in GATES}
        missed, figures["jobs"] = report(edited)
        more, figures["held_out"] = answers(model, Path(artifact(edited[CHOSEN_GATE], "model")["path"]))
        missed += more
        if arguments.out is not None:
            kept = {"command": "make demo-ablation", "machine": f"{platform.machine()}, {psutil.cpu_count()} cores",
                    "wall_s": round(time.monotonic() - began_s, 1), **figures}  # fmt: skip
            arguments.out.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")
        if missed:
            raise DemoFailed(f"goals missed: {'; '.join(missed)}")

    return ended(work, state)


def measure(stack: Stack, model: Path, run: str) -> Job:
    """Register all rows, and run the job that measures the direction; return it, completed."""
    title("3. Measure the direction of French: the same 64 sentences in French and in English")
    target, baseline = contrast()
    register(stack, target, f"french-{run}")
    register(stack, baseline, f"english-{run}")
    register(stack, retained(), f"everyday-{run}")
    job = f"french-measured-{run}"
    stack.server.submit({
        "recipe": "ablation_measure", "job_uuid": job, "model": str(model),
        "data": {"sets": {"target": f"french-{run}", "baseline": f"english-{run}"}},
        "measure": MEASURED, "training": {"dtype": cpu_dtype(), "batch_size": BATCH},
    })  # fmt: skip
    return follow(stack, job)


def retained() -> list[dict[str, str]]:
    """Return everyday questions with English answers, none of them about French: the text that must stay as it is."""
    return [
        {"prompt": row["prompt"], "completion": row.get("completion") or row["chosen"]}
        for file in ("instructions_heldout", "preferences_heldout")
        for row in rows_of(file)[:RETAINED]
    ]


def analysis(folder: Path) -> dict[str, Any]:
    """Print the figures of the direction after some of the blocks; return those of the block with the best quality."""
    report = json.loads((folder / "directions.json").read_text(encoding="utf-8"))
    names = ("cosine", "signal_to_noise", "separation", "auc", "stability", "reach", "quality")
    table = Table("block", *names, box=None, padding=(0, 2, 0, 0))
    best = report["recommended"]
    for each in report["layers"]:
        if each["layer"] in best or each["layer"] % 5 == 0:
            table.add_row(f"{each['layer']}{' *' * (each['layer'] in best)}", *(f"{each[name]:.3f}" for name in names))
    console.print(table)
    say(f"* the blocks with the best quality. The charts are in {folder}")
    first = max(report["layers"], key=lambda each: each["quality"])
    return {name: first[name] for name in ("layer", *names)}


def edits(first: int, scale: float, blocks: int) -> list[dict[str, float]]:
    """Return the entries of a plan: every block from `first` on loses a share of the direction measured after it."""
    return [{"layer": block, "measurement": block, "scale": scale} for block in range(first, blocks)]


def frontier(model: Path, folder: Path) -> tuple[Point, dict[str, Any]]:
    """Try plans at run time, without changing a weight; print what each does, and return the best and all figures."""
    title("4. Try plans: how much French is lost, and how much of other text")
    quiet_libraries()
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from llama_stack_provider_moe.compute.ablation.measurements import read
    from llama_stack_provider_moe.compute.ablation.run_time import removal
    from llama_stack_provider_moe.spec.ablation import MEASUREMENTS_FILE, StreamEdit

    found = read(folder / MEASUREMENTS_FILE, "measurements")
    tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, _TORCH[cpu_dtype()])).eval()
    table = Table("blocks", "scale", "answers in French", "perplexity of other text", box=None, padding=(0, 2, 0, 0))
    base, was = nll(loaded, tokenizer), rate(replies(loaded, tokenizer, CHOOSING))
    table.add_row("none", "", f"{was:.0%}", f"{math.exp(base):.2f}")
    points = []
    for first, scale in PLANS:
        entries = edits(first, scale, found.provenance.layers)
        plan = StreamEdit.model_validate({"ablate_individual_experts": True, "gate_scale": CHOSEN_GATE,
                                          "ablate": entries})  # fmt: skip
        with console.status(f"From block {first} on, {scale:.0%} of the direction"), \
                removal(loaded, plan, found).taken_out(loaded):  # fmt: skip
            rise = math.exp(nll(loaded, tokenizer) - base) - 1
            point = Point(first, scale, rate(replies(loaded, tokenizer, CHOOSING)), rise)
        points.append(point)
        table.add_row(f"{first} to {len(entries) + first - 1}", f"{scale:g}", f"{point.rate:.0%}",
                      f"{math.exp(base) * (1 + rise):.2f} ({rise:+.1%})")  # fmt: skip
    console.print(table)
    within = [point for point in points if point.rise < GOALS["perplexity"]]
    best = min(within, key=lambda point: (point.rate, point.rise)) if within else min(points, key=lambda p: p.rise)
    say(f"Chosen: from block {best.first} on, {best.scale:.0%} of the direction of each block.")
    return best, {
        "base": {"rate": was, "perplexity": math.exp(base)},
        "plans": [point._asdict() | {"perplexity": math.exp(base) * (1 + point.rise)} for point in points],
        "prompts": len(CHOOSING), "rows": len(retained()), "last_block": found.provenance.layers - 1,
    }  # fmt: skip


_TORCH = {"bf16": "bfloat16", "fp32": "float32"}


def replies(model: Any, tokenizer: Any, questions: Sequence[str]) -> list[str]:
    """Return the greedy answers, each in one line."""
    import torch

    texts = [
        tokenizer.apply_chat_template([{"role": "user", "content": each}], add_generation_prompt=True, tokenize=False)
        for each in questions
    ]
    batch = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
    with torch.inference_mode():
        tokens = model.generate(**batch, max_new_tokens=MOST_TOKENS, do_sample=False)
    said = tokenizer.batch_decode(tokens[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return [" ".join(each.split()) for each in said]


def nll(model: Any, tokenizer: Any) -> float:
    """Return the mean negative log-likelihood of the answers of the retained rows, in nats per token."""
    import torch

    total, count = 0.0, 0
    for row in retained():
        asked = [{"role": "user", "content": row["prompt"]}]
        head = tokenizer.apply_chat_template(asked, add_generation_prompt=True)["input_ids"]
        whole = [*asked, {"role": "assistant", "content": row["completion"]}]
        ids = torch.tensor(tokenizer.apply_chat_template(whole)["input_ids"])
        with torch.inference_mode():
            logits = model(input_ids=ids[None]).logits[0, len(head) - 1 : -1].float()
        total += float(torch.nn.functional.cross_entropy(logits, ids[len(head) :], reduction="sum"))
        count += len(ids) - len(head)
    return total / count


def ablate(stack: Stack, model: Path, measured: str, best: Point, gate: float, run: str) -> Job:
    """Edit the model's weights with the chosen plan in a job that measures before and after; return it, completed."""
    title(f"5. Edit the weights; routers lose {gate:.0%} of what the blocks lose")
    blocks = json.loads((model / "config.json").read_text(encoding="utf-8"))["num_hidden_layers"]
    job = f"ablated-{gate:g}-{run}"
    stack.server.submit({
        "recipe": "ablation", "job_uuid": job, "model": str(model), "measurements": measured,
        "ablate_individual_experts": True, "gate_scale": gate, "norm_preserving": "off",
        "ablate": edits(best.first, best.scale, blocks), "training": {"dtype": cpu_dtype()},
        "eval": {"retain_dataset_id": f"everyday-{run}", "batch_size": BATCH},
    })  # fmt: skip
    return follow(stack, job)


def report(edited: Mapping[float, Job]) -> tuple[list[str], dict[str, Any]]:
    """Print what the jobs measured on other text, for each share of the routers' edit.

    Return the goals missed, and the figures by that share.
    """
    title("6. What the edits cost on other text")
    table = Table("routers' share", "perplexity before", "after", "KL to the base", "choices of experts that changed",
                  box=None, padding=(0, 2, 0, 0))  # fmt: skip
    missed, figures = [], {}
    for gate, job in edited.items():
        folder = Path(artifact(job, "evaluation")["path"])
        found = json.loads((folder / "eval.json").read_text(encoding="utf-8"))["measured"]
        before, after = found["before"]["perplexity"]["value"], found["after"]["perplexity"]["value"]
        rise = after / before - 1
        kl, shift = found["after"]["kl_to_base"], found["after"]["routing_shift"]
        table.add_row(f"{gate:g}", f"{before:.2f}", f"{after:.2f} ({rise:+.1%})", f"{kl['value']:.4f} nats",
                      f"{shift['value']:.1%} ({shift['low']:.1%} to {shift['high']:.1%})")  # fmt: skip
        figures[f"{gate:g}"] = {"rise": rise, "kl": kl["value"], "routing_shift": shift["value"]}
        if gate == CHOSEN_GATE and rise >= GOALS["perplexity"]:
            missed.append(f"perplexity of other text: {rise:+.1%}, goal < +{GOALS['perplexity']:.0%}")
    console.print(table)
    return missed, figures


def answers(model: Path, edited: Path) -> tuple[list[str], dict[str, Any]]:
    """Print held-out answers before and after, by plain transformers; return the goals missed, and the rates."""
    title("7. Compare answers to held-out prompts, with plain transformers")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
    said = []
    for folder in (model, edited):
        loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, _TORCH[cpu_dtype()])).eval()
        said.append(replies(loaded, tokenizer, [*HELD_OUT, *ENGLISH_HELD_OUT]))
        del loaded
    shown = [*range(SHOWN), *range(len(HELD_OUT), len(HELD_OUT) + len(ENGLISH_HELD_OUT))]
    for at in shown:
        say(f"Question: {[*HELD_OUT, *ENGLISH_HELD_OUT][at]}\nBefore:   {said[0][at]}\nAfter:    {said[1][at]}\n")
    was, now = (rate(each[: len(HELD_OUT)]) for each in said)
    say(f"Answers in French to {len(HELD_OUT)} held-out French prompts: {was:.0%} before, {now:.0%} after.")
    missed = now > GOALS["rate"] * was
    goal = f"answers in French: {now:.0%} of {was:.0%} before, goal at most {GOALS['rate']:.0%} of it"
    return [goal] * missed, {"prompts": len(HELD_OUT), "before": was, "after": now}


if __name__ == "__main__":
    sys.exit(main())
