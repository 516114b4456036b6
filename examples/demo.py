"""The main job, end to end, as a user of Llama Stack would run it (`make demo`).

SmolLM2-135M-Instruct is upcycled to a Mixture-of-Experts (4 experts, top-2). A Llama Stack server is started, rows
are registered with llama-stack-client, an SFT job and then a DPO job on its result are submitted over HTTP and
followed; what DPO left is merged, written as GGUF files, and loaded with plain transformers and peft. Every figure
printed was measured in this run. The exit code is not 0 where a job did not complete or did not help.

    $ python examples/demo.py [--state FOLDER]
"""

import argparse
import contextlib
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent))
from demo_exports import EXPORT, exported
from smollm2 import cache_dir, smollm2

from llama_stack_provider_moe.cli.follow import Follower
from llama_stack_provider_moe.cli.server import Server
from llama_stack_provider_moe.config import ProviderConfig
from llama_stack_provider_moe.errors import MoeError, ServerLost, ServerRefused
from llama_stack_provider_moe.jobs.store import JobStore

ROOT = Path(__file__).resolve().parent.parent
DATA = Path(__file__).resolve().parent / "data"
# One of the training prompts: to be looked at. What was learnt is measured on held-out rows.
QUESTION = "How long should I boil an egg for a soft yolk?"

# A few minutes of training on two cores; more steps teach more. Rows of the example data are short.
SFT_STEPS, DPO_STEPS, BATCH = 10, 16, 4
PAIRS = 8  # held-out ones that plain transformers and peft measure again
# SFT at a higher rate unlearns the model's first words before so few steps teach it new ones: at 5e-4 held-out loss
# falls more, and the greedy answer is one word again and again. DPO at a lower one learns little from so few pairs.
SFT_LR, DPO_LR = 2e-4, 5e-4
LORA = {
    "type": "LoRA", "rank": 8, "alpha": 16, "lora_attn_modules": ["q_proj", "k_proj", "v_proj", "output_proj"],
    "apply_lora_to_mlp": True, "apply_lora_to_output": False,
}  # fmt: skip
MOE = {"router_aux_loss_coef": 0.01, "train_router": True}
console = Console(highlight=False)


class DemoFailed(Exception):
    """Something did not go as it should; the text says what."""


class Stack(NamedTuple):
    """The running server."""

    server: Server
    client: Any
    submitted: list[str]


def main() -> int:
    """Run the demo."""
    parser = argparse.ArgumentParser(description="SFT, then DPO, of a Mixture-of-Experts model through Llama Stack.")
    parser.add_argument("--state", type=Path, default=cache_dir() / "demo", help="the server's state folder")
    state: Path = parser.parse_args().state.resolve()

    def work() -> None:
        moe = prepare(state)
        with serving(state) as stack:
            sft, dpo = train(stack, moe)
            title("6. Exports of the DPO job, by a job of their own")
            exported(stack.server, dpo["job_uuid"], stack.submitted, console)
        answers(moe, artifact(sft, "merged"), artifact(dpo, "adapter"))

    return ended(work, state)


def ended(work: Callable[[], None], state: Path) -> int:
    """The exit code of a demo, which tells how it went and how long it took."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # by way of every `finally`
    began = time.monotonic()
    try:
        work()
    except (DemoFailed, MoeError) as failure:
        console.print(f"[bold red]The demo failed:[/] {failure}")
        return 1
    except KeyboardInterrupt:
        console.print("\nInterrupted; what was started has been stopped")
        return 130
    minutes, seconds = divmod(round(time.monotonic() - began), 60)
    console.print(f"\nDone in {minutes} min {seconds} s. Everything it made is in {state}")
    return 0


def prepare(state: Path) -> Path:
    """The Mixture-of-Experts model, made once and kept in the server's `models` folder."""
    title("1. A Mixture-of-Experts model")
    moe = state / "models" / "SmolLM2-4x135M"
    if not (moe / "config.json").is_file():
        with console.status("Getting SmolLM2-135M-Instruct (93 MB, once) and upcycling it"):
            dense = smollm2()
            cli = [str(Path(sys.executable).parent / "moe-train"), "upcycle", str(dense), str(moe)]
            done = subprocess.run([*cli, "--experts", "4", "--top-k", "2"], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise DemoFailed(f"moe-train upcycle ended with {done.returncode}: {done.stderr.strip()}")
        console.print(done.stdout.strip())
    console.print(f"SmolLM2-135M-Instruct, its MLPs copied to 4 experts with a top-2 router: {moe}")
    return moe


@contextlib.contextmanager
def serving(state: Path) -> Iterator[Stack]:
    """A Llama Stack server with our provider, until the block ends; then nothing of it is left running."""
    title("2. A Llama Stack server")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    state.mkdir(parents=True, exist_ok=True)
    log, url, began = state / "server.log", f"http://127.0.0.1:{port}", time.monotonic()
    command = [str(Path(sys.executable).parent / "llama"), "stack", "run", str(ROOT / "run_configs/quickstart.yaml")]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, "--port", str(port)], stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
            env={**os.environ, "MOE_STATE_DIR": str(state)}, start_new_session=True,
        )  # fmt: skip
    from llama_stack_client import LlamaStackClient  # seconds of imports, while the server starts

    logging.getLogger("httpx").setLevel(logging.WARNING)  # a line a request would drown the bar

    with Server(url) as server:
        stack = Stack(server, LlamaStackClient(base_url=url, max_retries=0), [])
        try:
            with console.status("Starting"):
                wait_until_healthy(stack, process, log)
            console.print(
                f"llama stack run run_configs/quickstart.yaml: healthy after {time.monotonic() - began:.0f} s"
            )
            yield stack
        finally:
            stop(stack, process, state)


def wait_until_healthy(stack: Stack, process: subprocess.Popen[bytes], log: Path) -> None:
    """Return once the provider answers; a server that died shows its last words."""
    while process.poll() is None:
        with contextlib.suppress(ServerLost):
            stack.server.health()
            return
        time.sleep(0.2)
    raise DemoFailed(f"the server ended with {process.returncode}; the end of {log}:\n{log.read_text()[-1500:]}")


def stop(stack: Stack, process: subprocess.Popen[bytes], state: Path) -> None:
    """Cancel what still runs, then end the supervisor and the server."""
    for job in stack.submitted:
        with contextlib.suppress(ServerLost, ServerRefused):  # refused: it has ended
            stack.server.cancel(job)
            for _ in Follower(stack.server, job, note=console.print, patience_s=10).statuses():
                pass
    store = JobStore(ProviderConfig(state_dir=state).url)
    supervisor = store.live_supervisor()
    if supervisor is not None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(supervisor.pid, signal.SIGTERM)
        wait_for(lambda: store.live_supervisor() is None, 20)
    store.close()
    process.terminate()
    try:
        process.wait(timeout=30)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def wait_for(met: Any, limit_s: float) -> None:
    """Wait until `met()`, or until the time is over."""
    deadline = time.monotonic() + limit_s
    while not met() and time.monotonic() < deadline:
        time.sleep(0.3)


def train(stack: Stack, moe: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """SFT, then DPO on what it left; each as the job whole, completed."""
    run = time.strftime("%m%d-%H%M%S")
    title("3. Rows, registered with the server")
    names = {name: register(stack, name, f"{name}-{run}") for name in (
        "instructions", "instructions_heldout", "preferences", "preferences_heldout")}  # fmt: skip
    api = stack.client.alpha.post_training
    title("4. SFT over HTTP: answer first, then stop")
    common: dict[str, Any] = {"hyperparam_search_config": {}, "logger_config": {}}
    options = {"max_length": 256, "lr_scheduler": "cosine"}
    api.supervised_fine_tune(
        job_uuid=f"sft-{run}",
        model=str(moe),
        training_config=training(names["instructions"], names["instructions_heldout"], SFT_STEPS, SFT_LR),
        algorithm_config=LORA,
        extra_body={"moe": MOE, "options": {**options, "save_merged": True}},
        **common,
    )
    sft = follow(stack, f"sft-{run}", ("ce", "aux_loss"))
    report(sft, "cross entropy of held-out answers, nats a token")
    title("5. DPO over HTTP, on the model that SFT left")
    api.preference_optimize(
        job_uuid=f"dpo-{run}",
        finetuned_model=artifact(sft, "merged"),
        training_config=training(names["preferences"], names["preferences_heldout"], DPO_STEPS, DPO_LR),
        algorithm_config={"beta": 0.1, "loss_type": "sigmoid"},
        extra_body={"adapter": {key: LORA[key] for key in LORA if key != "type"}, "moe": MOE, "options": options,
                    "export": EXPORT},
        **common,
    )  # fmt: skip
    dpo = follow(stack, f"dpo-{run}", ("preference_loss", "rewards/accuracies", "aux_loss"))
    report(dpo, "DPO loss of held-out pairs, nats a pair")
    return sft, dpo


def training(train_id: str, heldout_id: str, steps: int, lr: float) -> dict[str, Any]:
    """A `training_config` of the API."""
    return {
        "n_epochs": 1,
        "max_steps_per_epoch": steps,
        "dtype": cpu_dtype(),
        "gradient_accumulation_steps": 1,
        "data_config": {
            "dataset_id": train_id, "validation_dataset_id": heldout_id, "batch_size": BATCH, "shuffle": True,
            "data_format": "instruct",
        },
        "optimizer_config": {"optimizer_type": "adamw", "lr": lr, "weight_decay": 0.0, "num_warmup_steps": 2},
    }  # fmt: skip


def cpu_dtype() -> str:
    """`bf16` where the processor has instructions for it, else `fp32`."""
    with contextlib.suppress(OSError):
        flags = set(Path("/proc/cpuinfo").read_text(encoding="utf-8").split())
        if flags & {"avx512_bf16", "amx_bf16", "bf16"}:
            return "bf16"
    return "fp32"


def rows_of(file: str) -> list[dict[str, str]]:
    """The rows of one file of example data."""
    with (DATA / f"{file}.jsonl").open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def register(stack: Stack, file: str, dataset_id: str) -> str:
    """Register the rows of one file as a data set."""
    rows = rows_of(file)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # the client marks all of its beta API so
        stack.client.beta.datasets.register(
            dataset_id=dataset_id, purpose="post-training/messages", source={"type": "rows", "rows": rows}
        )
    console.print(f"{dataset_id}: {len(rows)} rows")
    return dataset_id


def follow(stack: Stack, job: str, figures: tuple[str, ...]) -> dict[str, Any]:
    """A live bar (or, where no terminal is, a line a step) until the job has ended; it must have completed."""
    columns = (TextColumn("{task.description}"), BarColumn(24), MofNCompleteColumn(), TimeElapsedColumn(),
               TextColumn("{task.fields[told]}"))  # fmt: skip
    stack.submitted.append(job)
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task, last = bar.add_task(job, total=None, told="queued"), None
        for status in Follower(stack.server, job, note=console.print, poll_s=2).statuses():
            now = status["resources_allocated"]
            told = progress_text(now, figures)
            bar.update(task, completed=now["step"] or 0, total=now["max_steps"], told=told)
            if not console.is_terminal and told != last:
                console.print(f"{job} {now['step'] or 0}/{now['max_steps'] or '?'} {told}", soft_wrap=True)
            last = told
    found = stack.server.job(job)
    if found["status"] != "completed":
        raise DemoFailed(f"job {job} ended as {found['status']}: {found['reason']}")
    return found


def progress_text(now: dict[str, Any], figures: tuple[str, ...]) -> str:
    """`training  ce 2.31  aux_loss 2.02  41 s left`."""
    metrics = now["metrics"] or {}
    parts = [now["stage"], *(f"{name} {metrics[name]:.3f}" for name in figures if name in metrics)]
    if now["eta_s"]:
        parts.append(f"{now['eta_s']:.0f} s left")
    return "  ".join(parts)


def report(job: dict[str, Any], meaning: str) -> None:
    """What a job was asked to do, did and left; a job that did not help ends the demo."""
    plan, progress = job["resolved"], job["resources_allocated"]
    layout, adapter, routing = plan["layout"], plan["adapter"], progress["routing"]
    before, after = (progress["evaluation"][which]["metrics"] for which in ("first", "last"))
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column()
    table.add_column(overflow="fold")  # a path is of use only whole
    table.add_row("experts", f"{layout['num_experts']}, top-{layout['top_k']}, in {len(layout['moe_layers'])} layers")
    table.add_row("LoRA on", ", ".join(f"{name} x{count}" for name, count in adapter["targets"].items()))
    share = adapter["trainable_parameters"] / adapter["total_parameters"]
    table.add_row("trained", f"{adapter['trainable_parameters']:,} of {adapter['total_parameters']:,} ({share:.1%})")
    table.add_row("held out", f"{before['validation_loss']:.4f} -> {after['validation_loss']:.4f}  ({meaning})")
    if "rewards/accuracies" in after:
        table.add_row("", f"chosen preferred in {after['rewards/accuracies']:.0%} of pairs, "
                          f"margin {after['rewards/margins']:.3f} (before: policy is reference, margin 0)")  # fmt: skip
    table.add_row("aux loss", f"{progress['metrics']['aux_loss']:.4f} (2 at perfect balance of top-2)")
    table.add_row(
        "balance",
        f"an expert gets {routing['min_share']:.0%} to {routing['max_share']:.0%} of a layer's tokens (even: 25%), "
        f"{routing['dead_experts']} dead, entropy of the mean load {routing['load_entropy']:.3f} of at most 1.386, "
        f"of a token {routing['token_entropy']:.3f}",
    )
    for each in job["checkpoints"]:
        table.add_row(each["kind"], f"{each['bytes'] / 2**20:,.0f} MiB  {each['path']}")
    console.print(table)
    if after["validation_loss"] >= before["validation_loss"]:
        raise DemoFailed(f"held-out loss of {job['job_uuid']} did not fall")


def artifact(job: dict[str, Any], kind: str) -> str:
    """The folder of a job's one artifact of a kind."""
    (path,) = [each["path"] for each in job["checkpoints"] if each["kind"] == kind]
    return str(path)


def answers(moe: Path, merged: str, adapter: str) -> None:
    """Greedy answers, and held-out pairs measured again, by plain transformers and peft: no code of ours."""
    title("7. Before and after, by plain transformers and peft")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of a 4-bit kernel; nothing here is in 4 bit
    warnings.filterwarnings("ignore", ".is_gradient_checkpointing. is deprecated", FutureWarning)  # peft 0.21 reads it
    pairs = rows_of("preferences_heldout")[:PAIRS]
    with console.status("Loading"):
        from peft import PeftModel
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        tokenizer = AutoTokenizer.from_pretrained(merged)
        before = reply(AutoModelForCausalLM.from_pretrained(moe), tokenizer)
        tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(merged), adapter)
        with tuned.disable_adapter():
            reference = [preference(tuned, tokenizer, pair) for pair in pairs]
        tuned.merge_adapter()  # else PEFT adds B A to every expert's weights anew for each token
        after = reply(tuned, tokenizer)
        gains = [preference(tuned, tokenizer, pair) - was for pair, was in zip(pairs, reference, strict=True)]
    mean = sum(gains) / len(gains)
    console.print(
        f"[bold]Q[/]       {QUESTION}\n[bold]before[/]  {before}\n[bold]after[/]   {after}\n"
        f"[bold]pairs[/]   DPO moved the model to the chosen answer in {sum(gain > 0 for gain in gains)} of {PAIRS} "
        f"held-out pairs; log p(chosen) - log p(rejected) rose by {mean:.2f} nats a pair"
    )
    if repetitive(after):
        raise DemoFailed("the tuned model says nothing, or the same again and again")
    if mean <= 0:
        raise DemoFailed("the adapter, loaded by peft, does not prefer the chosen answers")


def preference(model: Any, tokenizer: Any, pair: dict[str, str]) -> float:
    """log p(chosen) - log p(rejected) of a pair's answers, in nats."""
    import torch

    logps = {}
    for answer in ("chosen", "rejected"):
        messages = [{"role": "user", "content": pair["prompt"]}, {"role": "assistant", "content": pair[answer]}]
        head = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True)["input_ids"]
        tokens = torch.tensor(tokenizer.apply_chat_template(messages)["input_ids"])
        with torch.inference_mode():
            logits = model(input_ids=tokens[None]).logits[0, len(head) - 1 : -1]  # of each token of the answer
        logps[answer] = float(-torch.nn.functional.cross_entropy(logits, tokens[len(head) :], reduction="sum"))
    return logps["chosen"] - logps["rejected"]


def reply(model: Any, tokenizer: Any) -> str:
    """At most 60 tokens."""
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    tokens = model.generate(**prompt, max_new_tokens=60, do_sample=False)
    said: str = tokenizer.decode(tokens[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    return " ".join(said.split())


def repetitive(text: str) -> bool:
    """Whether a third of the words or fewer are distinct, or there are none: what a spoilt model says."""
    words = text.lower().split()
    return len(set(words)) * 3 <= len(words)


def title(text: str) -> None:
    """A heading."""
    console.print(f"\n[bold cyan]{text}[/]")


if __name__ == "__main__":
    sys.exit(main())
