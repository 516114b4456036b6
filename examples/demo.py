"""Trains a small Mixture-of-Experts model through a Llama Stack server, on a CPU, from start to end (`make demo`).

SmolLM2-135M-Instruct is upcycled to a Mixture-of-Experts model (4 experts, top-2). The demo starts a Llama Stack
server, registers rows with llama-stack-client, and submits an SFT job, then a DPO job on its result. The result of DPO
is merged, exported to GGUF files, and loaded with plain transformers, peft and llama.cpp. Every figure that is printed
was measured in this run. The exit code is not 0 if a job did not complete or did not help.

    $ python examples/demo.py [--state FOLDER] [--host 0.7|ogx --programs FOLDER] [--stay]
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from demo_answers import ask_gguf, compare
from demo_exports import EXPORT, exported
from demo_jobs import LORA, artifact, follow, register, report, rows_of, training
from demo_screen import DemoFailed, console, ended, say, title
from demo_server import Stack, page_of, serving, stay
from smollm2 import cache_dir, smollm2

from llama_stack_provider_moe.client.documents import Job
from llama_stack_provider_moe.control.cli.hosts import HostName
from llama_stack_provider_moe.llama_cpp import find_toolchain

# A few minutes of training on two cores; more steps teach more.
SFT_STEPS, DPO_STEPS = 10, 16
# A higher rate of SFT makes the model forget its first words before so few steps teach it new ones: at 5e-4 the loss on
# held-out rows falls more, but the greedy answer repeats one word. At a lower rate of DPO it learns little from so few
# pairs.
SFT_LR, DPO_LR = 2e-4, 5e-4
MOE = {"router_aux_loss_coef": 0.01, "train_router": True}
SERVED = "gguf-q8_0"  # artifact that answers at the end


def main() -> int:
    """Run the demo."""
    parser = argparse.ArgumentParser(
        description="Train a small Mixture-of-Experts model with SFT, then DPO, through a Llama Stack server, on a CPU."
    )
    parser.add_argument("--state", type=Path, metavar="FOLDER",
                        help="state folder of the server (default: one in the cache folder)")  # fmt: skip
    parser.add_argument("--host", type=HostName, choices=list(HostName), default=HostName.LLAMA_STACK_0_6,
                        help="what the server runs on (default: %(default)s)")  # fmt: skip
    parser.add_argument("--programs", type=Path, metavar="FOLDER", help="bin folder of the host's environment")
    parser.add_argument("--stay", action="store_true", help="keep the server up at the end, until Ctrl-C")
    asked = parser.parse_args()
    name = "demo" if asked.host is HostName.LLAMA_STACK_0_6 else f"demo-{asked.host}"
    state: Path = (asked.state or cache_dir() / name).resolve()

    def work() -> None:
        say("This demo trains a small Mixture-of-Experts model on the CPU, exports it, and asks it a question.\n"
            "It takes some minutes.")  # fmt: skip
        find_toolchain()  # raises NoToolchain: better now than after the training
        moe = prepare(state)
        with serving(state, asked.host, asked.programs) as stack:
            sft, dpo = train(stack, moe)
            title("6. Export the result: the merged model and GGUF files")
            exports = exported(stack, dpo)
            compare(str(moe), artifact(sft, "merged")["path"], artifact(dpo, "adapter")["path"])
            served = exports[SERVED]
            (gguf,) = Path(served["path"]).glob("*.gguf")
            ask_gguf(gguf, served["bytes"], exports["merged"]["path"])
            show(stack, dpo, asked.stay)

    return ended(work, state)


def prepare(state: Path) -> Path:
    """Return the Mixture-of-Experts model; it is made once and kept in the server's `models` folder."""
    title("1. Make a Mixture-of-Experts model")
    moe = state / "models" / "SmolLM2-4x135M"
    say(
        "SmolLM2-135M-Instruct is a small chat model. Each of its MLPs is copied to 4 experts, and a new router picks\n"
        "2 of them for each token. Before training, the result computes the same as the model that it was made from."
    )
    if not (moe / "config.json").is_file():
        with console.status("SmolLM2-135M-Instruct is downloaded (93 MB, once) and upcycled"):
            dense = smollm2()
            words = ["upcycle", str(dense), str(moe), "--experts", "4", "--top-k", "2"]
            command = [str(Path(sys.executable).parent / "moe-train"), *words]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise DemoFailed(f"moe-train upcycle ended with exit code {done.returncode}: {done.stderr.strip()}")
        say(f"$ moe-train {' '.join(words)}\n{done.stdout.strip()}")
    say(f"The model is in {moe}")
    return moe


def train(stack: Stack, moe: Path) -> tuple[Job, Job]:
    """Run an SFT job, then a DPO job on its result; return both jobs, which have completed.

    Args:
        stack: the server.
        moe: folder of the model.
    """
    run = time.strftime("%m%d-%H%M%S")
    title("3. Register example rows with the server")
    names = {name: register(stack, rows_of(name), f"{name}-{run}") for name in (
        "instructions", "instructions_heldout", "preferences", "preferences_heldout")}  # fmt: skip
    api = stack.client.alpha.post_training
    title("4. Supervised fine-tuning (SFT): learn the answers of the examples")
    options = {"max_length": 256, "lr_scheduler": "cosine"}
    api.supervised_fine_tune(
        job_uuid=f"sft-{run}",
        model=str(moe),
        training_config=training(names["instructions"], names["instructions_heldout"], SFT_STEPS, SFT_LR),
        algorithm_config=LORA,
        hyperparam_search_config={},
        logger_config={},
        extra_body={"moe": MOE, "options": {**options, "save_merged": True}},
    )
    sft = follow(stack, f"sft-{run}")
    report(sft, "cross entropy of held-out answers, in nats per token; lower is better")
    title("5. Preference optimisation (DPO): prefer the better of two answers")
    api.preference_optimize(
        job_uuid=f"dpo-{run}",
        finetuned_model=artifact(sft, "merged")["path"],
        training_config=training(names["preferences"], names["preferences_heldout"], DPO_STEPS, DPO_LR),
        algorithm_config={"beta": 0.1, "loss_type": "sigmoid"},
        hyperparam_search_config={},
        logger_config={},
        extra_body={"adapter": {key: LORA[key] for key in LORA if key != "type"}, "moe": MOE, "options": options,
                    "export": EXPORT},
    )  # fmt: skip
    dpo = follow(stack, f"dpo-{run}")
    report(dpo, "DPO loss of held-out pairs, in nats per pair; lower is better")
    return sft, dpo


def show(stack: Stack, job: Job, stays: bool) -> None:
    """Print the address of a job's page on the dashboard, and keep the server up if it is to stay."""
    title("The job in the dashboard: curves, experts, settings, files")
    say(page_of(stack, job["job_uuid"]))
    if stays:
        stay(stack)
    else:
        say("The server stops now. To look at the page, keep the server up: make demo STAY=1")


if __name__ == "__main__":
    sys.exit(main())
