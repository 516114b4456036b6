"""What the integration tests of Llama Stack 0.6.1 take from the hub, made small and here.

Two models by their ids, in a cache of the hub: a chat model, and one without a chat template. Two data sets, in folders
of their ids where the server is started: the host's provider of `huggingface://` looks there first.
"""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GPT2Config

from tests.support import tiny_models
from tests.support.host_harness import QUICKSTART, hub_cache, run_config

CHAT_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
PLAIN_MODEL = "distilgpt2"
QUESTIONS = "llamastack/simpleqa"
PREFERENCES = "trl-internal-testing/hh-rlhf-helpful-base-trl-style"
ROWS = 40


def question(number: int) -> dict[str, Any]:
    """A row of the data set of questions: the prompt is JSON text."""
    asked = f"What is {number} plus one?"
    return {
        "input_query": asked, "expected_answer": str(number + 1),
        "chat_completion_input": json.dumps([{"role": "user", "content": asked}]),
    }  # fmt: skip


def preference(number: int) -> dict[str, Any]:
    """A row of the data set of preferences: the prompt is the first text, and both answers are whole conversations."""
    first = f"Tell me about the number {number}."
    common = [{"content": first, "role": "user"}]
    if number % 2:
        common += [{"content": "Do you like odd numbers?", "role": "assistant"}, {"content": "I do.", "role": "user"}]
    answers = {"chosen": f"After it comes {number + 1}.", "rejected": "I do not know."}
    return {
        "prompt": first,
        **{name: [*common, {"content": text, "role": "assistant"}] for name, text in answers.items()},
    }


def build(folder: Path) -> Path:
    """Make models and data sets in `folder`, and return a run YAML for Llama Stack 0.6.1, to be started there."""
    cache = hub_cache(folder / "hub", CHAT_MODEL, PLAIN_MODEL)
    chat, plain = (next((cache / f"models--{model.replace('/', '--')}" / "snapshots").iterdir())
                   for model in (CHAT_MODEL, PLAIN_MODEL))  # fmt: skip
    tiny_models.build("llama", chat)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = GPT2Config(vocab_size=tiny_models.VOCAB_SIZE, n_embd=32, n_layer=2, n_head=4, n_positions=256,
                            bos_token_id=None, eos_token_id=1)  # fmt: skip
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(plain)
    tokenizer = tiny_models.tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(plain)
    for name, row in ((QUESTIONS, question), (PREFERENCES, preference)):
        (folder / name).mkdir(parents=True)
        lines = "".join(json.dumps(row(number)) + "\n" for number in range(ROWS))
        (folder / name / "train.jsonl").write_text(lines, encoding="utf-8")
    provider = {
        # A model without a chat template needs one for conversations; this server decides it for all jobs.
        "defaults": {"options": {"chat_template": "plain"}},
        "child_env": {"HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        "supervisor": {"poll_s": 0.5},
    }
    kept = {"namespace": "datasetio", "backend": "kv_default"}
    reading = [
        {"provider_id": f"{name}", "provider_type": kind, "config": {"kvstore": {**kept, "namespace": name}}}
        for name, kind in (("localfs", "inline::localfs"), ("huggingface", "remote::huggingface"))
    ]
    return run_config(QUICKSTART, folder, provider, {"providers": {"datasetio": reading}})
