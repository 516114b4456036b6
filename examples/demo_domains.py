"""Domain experts from start to end, through Llama Stack (`make demo-domains`).

Three copies of SmolLM2-135M-Instruct are trained on a domain each: sums, cooking, code. They become the experts of one
model (Branch-Train-MiX), whose routers are then trained. With the same number of training rows, the demo trains the
dense model on all domains, and the dense model upcycled to three equal experts with random routers. It compares the
loss on held-out rows of each domain, and how far routers tell domains apart, beside a random router. Every figure was
measured in this run, whichever way it falls.

    $ python examples/demo_domains.py [--state FOLDER] [--model FOLDER] [--out FILE]
"""

import argparse
import json
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent))
from demo_clock import CpuTime
from demo_domain_rows import DOMAINS, held_out, rows
from demo_jobs import artifact, follow, register
from demo_screen import DemoFailed, console, ended, say, title
from demo_server import Stack, serving
from smollm2 import cache_dir, smollm2

from llama_stack_provider_moe.client.documents import Job, progress_of

BRANCH_STEPS, ROUTER_STEPS, BATCH = 4, 6, 8
ALL_STEPS = len(DOMAINS) * BRANCH_STEPS + ROUTER_STEPS  # of the models that train on everything at once
LR, ROUTER_LR = 1e-4, 3e-3
DTYPE = "fp32"  # in bf16, steps of all weights that are this small are lost in rounding
COLUMN = "domain"


def main() -> int:
    """Run the demo."""
    parser = argparse.ArgumentParser(description="Branch, train, mix: three domains, one model, through Llama Stack.")
    parser.add_argument("--state", type=Path, default=cache_dir() / "demo", metavar="FOLDER",
                        help="state folder of the server (default: %(default)s)")  # fmt: skip
    parser.add_argument(
        "--model", type=Path, metavar="FOLDER", help="dense Llama model (default: SmolLM2-135M-Instruct)"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON file for the figures (default: none)")
    arguments = parser.parse_args()
    state: Path = arguments.state.resolve()

    def work() -> None:
        began, cpu = time.monotonic(), CpuTime()
        title("1. The dense model, and the same upcycled to three equal experts")
        dense = placed(arguments.model or smollm2(), state / "models")
        twins = upcycled(dense, state / "models" / f"{dense.name}-3x")
        with serving(state) as stack, cpu:
            found = compare(stack, dense, twins)
        found |= {
            "command": "make demo-domains" if arguments.model is None else f"demo_domains --model {dense.name}",
            "model": dense.name, "dtype": DTYPE, "machine": f"{platform.machine()}, {psutil.cpu_count()} cores",
            "steps": {"branch": BRANCH_STEPS, "routers": ROUTER_STEPS, "all": ALL_STEPS, "rows_a_step": BATCH},
            "wall_s": round(time.monotonic() - began, 1), "cpu_s": round(cpu.seconds, 1),
        }  # fmt: skip
        say(f"\n{found['wall_s']:.0f} s by the clock, {found['cpu_s']:.0f} s of processors' time")
        if arguments.out is not None:
            arguments.out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")

    return ended(work, state)


def placed(model: Path, models: Path) -> Path:
    """Return a copy of the model in the server's models folder, which is made once."""
    target = models / model.name
    if not (target / "config.json").is_file():
        shutil.copytree(model, target, dirs_exist_ok=True)
    return target


def upcycled(dense: Path, target: Path) -> Path:
    """Return the dense model with each MLP copied to three experts and random routers; made once."""
    if not (target / "config.json").is_file():
        words = ["upcycle", str(dense), str(target), "--experts", str(len(DOMAINS)), "--top-k", "2"]
        command = [str(Path(sys.executable).parent / "moe-train"), *words]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise DemoFailed(f"moe-train upcycle ended with exit code {done.returncode}: {done.stderr.strip()}")
        say(f"$ moe-train {' '.join(words)}\n{done.stdout.strip()}")
    return target


def compare(stack: Stack, dense: Path, twins: Path) -> dict[str, Any]:
    """Train all models, print what they measured, and return it."""
    run = time.strftime("%m%d-%H%M%S")
    title("3. Register rows of three domains")
    for name in DOMAINS:
        register(stack, rows(name, BRANCH_STEPS * BATCH), f"{name}-{run}")
        register(stack, held_out(name), f"{name}-held-{run}")
    both = {"everything": lambda name: rows(name, BRANCH_STEPS * BATCH), "everything-held": held_out}
    for dataset, of in both.items():
        register(stack, [{**row, COLUMN: name} for name in DOMAINS for row in of(name)], f"{dataset}-{run}")
    title("4. Branch: train a copy of the dense model on each domain")
    for name in DOMAINS:
        data = {"dataset_id": f"{name}-{run}", "validation_dataset_id": f"{name}-held-{run}"}
        train(stack, f"branch-{name}-{run}", dense, data, BRANCH_STEPS)
    title("5. Mix: each branch becomes an expert")
    mixed = f"mixed-{run}"
    stack.server.submit({
        "recipe": "mix", "job_uuid": mixed, "model": str(dense), "method": "btx", "top_k": 2, "router": "random",
        "branches": [{"name": name, "model": f"branch-{name}-{run}"} for name in DOMAINS],
    })  # fmt: skip
    model = Path(artifact(follow(stack, mixed), "model")["path"])
    data = {
        "dataset_id": f"everything-{run}",
        "validation_dataset_id": f"everything-held-{run}",
        "domain_column": COLUMN,
    }
    title("6. Train the routers alone, on rows of all domains")
    moe = {"train_router_only": True}
    routers = train(stack, f"routers-{run}", model, data, ROUTER_STEPS, ROUTER_LR, moe)
    title("7. The same number of rows for the dense model, and for the upcycled one")
    whole = train(stack, f"dense-{run}", dense, data, ALL_STEPS)
    random = train(stack, f"upcycled-{run}", twins, data, ALL_STEPS)
    losses = {
        "dense model, untrained": losses_of(whole, "first"), "dense, trained on all": losses_of(whole, "last"),
        "upcycled, trained on all": losses_of(random, "last"), "mixed, routers random": losses_of(routers, "first"),
        "mixed, routers trained": losses_of(routers, "last"),
    }  # fmt: skip
    information = {
        "mixed, routers trained": information_of(routers),
        "upcycled, trained on all": information_of(random),
    }
    tell(losses, information)
    return {"losses": losses, "mutual_information": information}


def train(
    stack: Stack,
    job: str,
    model: Path,
    data: Mapping[str, object],
    steps: int,
    lr: float = LR,
    moe: Mapping[str, object] | None = None,
) -> Job:
    """Train all weights of a model, or those that `moe` names; return the job, completed."""
    stack.server.submit({
        "recipe": "sft", "job_uuid": job, "model": str(model), "data": data, "adapter": None, "moe": moe or {},
        "training": {"dtype": DTYPE, "n_epochs": 1, "max_steps_per_epoch": steps, "batch_size": BATCH}
        if steps <= len(DOMAINS) * BRANCH_STEPS else
        {"dtype": DTYPE, "n_epochs": 2, "max_steps_per_epoch": steps // 2, "batch_size": BATCH},
        "optimizer": {"lr": lr, "num_warmup_steps": 1, "weight_decay": 0.0},
        "options": {"max_length": 128, "keep_checkpoints": 1},
    })  # fmt: skip
    return follow(stack, job)


def losses_of(job: Job, when: str) -> dict[str, float]:
    """Return the loss on held-out rows of each domain, and of all, before (`first`) or after (`last`) training."""
    found = progress_of(job).get("evaluation")
    if found is None:
        raise DemoFailed(f"job {job['job_uuid']} was not evaluated")
    metrics = found["first" if when == "first" else "last"]["metrics"]
    by_domain = {name: round(float(metrics[f"validation_loss/{name}"]), 4) for name in DOMAINS}
    return by_domain | {"mean": round(sum(by_domain.values()) / len(by_domain), 4)}


def information_of(job: Job) -> list[dict[str, float]]:
    """Return the mutual information of domain and expert of each layer, beside a random router's."""
    (folder,) = [each["path"] for each in job["checkpoints"] if each["name"] == "domains"]
    report = json.loads((Path(folder) / "routing.json").read_text(encoding="utf-8"))
    names = {"mutual_information": "found", "random_router": "random_router", "chance_high": "chance_high"}
    return [
        {"layer": layer["layer"], **{ours: round(layer[theirs], 4) for theirs, ours in names.items()}}
        for layer in report["layers"]
    ]


def tell(losses: Mapping[str, Mapping[str, float]], information: Mapping[str, list[dict[str, float]]]) -> None:
    """Print what was measured, and say which way it fell."""
    title("8. Loss on held-out rows, nats per token; every trained model saw the same number of rows")
    table = Table("", *DOMAINS, "mean", box=None, padding=(0, 2, 0, 0))
    for name, each in losses.items():
        table.add_row(name, *(f"{each[column]:.3f}" for column in (*DOMAINS, "mean")))
    console.print(table)
    title("9. Mutual information of domain and expert, nats; at most ln 3 = 1.099")
    table = Table("layer", *(f"{name}{more}" for name in information for more in ("", ": a random router")), box=None)
    for at in zip(*information.values(), strict=True):
        figures = (f"{each[key]:.3f}" for each in at for key in ("found", "random_router"))
        if at[0]["layer"] % 5 == 0:
            table.add_row(str(at[0]["layer"]), *figures)
    console.print(table)
    best = min(("dense, trained on all", "upcycled, trained on all", "mixed, routers trained"),
               key=lambda name: losses[name]["mean"])  # fmt: skip
    say(f"The lowest mean loss is that of: {best}.")
    for name, layers in information.items():
        above = sum(each["found"] > each["random_router"] for each in layers)
        say(f"{name}: routers tell domains apart more than a random router in {above} of {len(layers)} layers.")


if __name__ == "__main__":
    sys.exit(main())
