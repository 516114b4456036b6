"""What the models of the demo answer, and which answers they prefer: by transformers, peft and llama.cpp."""

import logging
import tempfile
import warnings
from pathlib import Path
from typing import Any

from demo_jobs import rows_of
from demo_screen import DemoFailed, console, say, title
from demo_server import PATIENCE_S

from llama_stack_provider_moe.control.cli.show import size
from llama_stack_provider_moe.llama_cpp import find_toolchain
from llama_stack_provider_moe.llama_cpp.process import ask_llama

# One of the training prompts, to show how the style of the answer changes. Held-out rows measure what was learnt.
QUESTION = "How long should I boil an egg for a soft yolk?"
PAIRS = 8  # held-out pairs that are measured again
MOST_TOKENS = 120
# A plain question, and the word that a sensible answer contains; no row of the example data asks it. A model this small
# is sure of few answers; for the others, rounding decides. Measured: the smallest gap between the two most likely
# tokens of this greedy answer is 0.97 nats before training, 1.13 after SFT and 0.98 after DPO. For the capital of
# France it is 0.08 before training.
PLAIN_QUESTION, EXPECTED = "What is the capital of Japan?", "Tokyo"


def compare(moe: str, merged: str, adapter: str) -> None:
    """Answer a question and measure held-out pairs, before and after training, without any code of this project.

    Args:
        moe: folder of the model before training.
        merged: folder of the model after SFT.
        adapter: folder of the adapter that DPO trained on it.

    Raises:
        DemoFailed: the trained model repeats itself, or does not prefer the chosen answers.
    """
    title("7. Compare before and after, with plain transformers and peft")
    quiet_libraries()
    pairs = rows_of("preferences_heldout")[:PAIRS]
    with console.status("The models answer"):
        from peft import PeftModel
        from transformers import AutoModelForCausalLM, AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(merged)
        before = reply(AutoModelForCausalLM.from_pretrained(moe), tokenizer, QUESTION, MOST_TOKENS)
        tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(merged), adapter)
        with tuned.disable_adapter():
            reference = [preference(tuned, tokenizer, pair) for pair in pairs]
        tuned.merge_adapter()  # or PEFT would add B A to the weights of every expert again for each token
        after = reply(tuned, tokenizer, QUESTION, MOST_TOKENS)
        gains = [preference(tuned, tokenizer, pair) - was for pair, was in zip(pairs, reference, strict=True)]
    mean = sum(gains) / len(gains)
    say(f"Question: {QUESTION}\nBefore:   {before}\nAfter:    {after}")
    say(
        f"DPO moved the model towards the chosen answer in {sum(gain > 0 for gain in gains)} of {PAIRS} held-out "
        f"pairs; log p(chosen) - log p(rejected) rose by {mean:.2f} nats per pair on average."
    )
    if repetitive(after):
        raise DemoFailed("the trained model says nothing, or repeats itself")
    if mean <= 0:
        raise DemoFailed("the adapter, loaded by peft, does not prefer the chosen answers")


def ask_gguf(gguf: Path, size_bytes: int, merged: str) -> None:
    """Ask a GGUF file a plain question, through the chat template in the file, and print the answer of llama.cpp.

    Args:
        gguf: the file.
        size_bytes: size of the file.
        merged: folder of the model that the file was made from, for its tokenizer.

    Raises:
        DemoFailed: the answer is not sensible, or has no end.
    """
    title("8. Ask the GGUF file, with llama.cpp")
    from transformers import AutoTokenizer

    from llama_stack_provider_moe.compute.export.gguf_file import read_header

    template = read_header(gguf).metadata["tokenizer.chat_template"]
    tokenizer = AutoTokenizer.from_pretrained(merged)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": PLAIN_QUESTION}], chat_template=template, add_generation_prompt=True,
        return_dict=True,
    )["input_ids"]  # fmt: skip
    say(f"{gguf} ({size(size_bytes)})")
    with console.status("llama.cpp answers"), tempfile.TemporaryDirectory() as folder:
        request = {"do": "run", "gguf": str(gguf), "texts": [], "ids": prompt[:1], "ends": [], "prompt_ids": prompt,
                   "most_tokens": MOST_TOKENS}  # fmt: skip
        found = ask_llama(find_toolchain().library, request, Path(folder), PATIENCE_S)
    answer = " ".join(found["continuation"].split())
    say(f"Question: {PLAIN_QUESTION}\nAnswer:   {answer}")
    if EXPECTED not in answer:
        raise DemoFailed(f"the GGUF file does not answer sensibly: {EXPECTED!r} is not in its answer")
    if len(found["continuation_ids"]) == MOST_TOKENS:
        raise DemoFailed(f"the GGUF file did not end its answer within {MOST_TOKENS} tokens")


def quiet_libraries() -> None:
    """Silence warnings and progress bars of other libraries that tell a reader of the demo nothing."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of a 4-bit kernel, which is not used here
    # peft 0.21 reads this attribute.
    warnings.filterwarnings("ignore", ".is_gradient_checkpointing. is deprecated", FutureWarning)


def preference(model: Any, tokenizer: Any, pair: dict[str, str]) -> float:
    """Return log p(chosen) - log p(rejected) of the answers in a pair, in nats."""
    import torch

    logps = {}
    for answer in ("chosen", "rejected"):
        messages = [{"role": "user", "content": pair["prompt"]}, {"role": "assistant", "content": pair[answer]}]
        head = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True)["input_ids"]
        tokens = torch.tensor(tokenizer.apply_chat_template(messages)["input_ids"])
        with torch.inference_mode():
            logits = model(input_ids=tokens[None]).logits[0, len(head) - 1 : -1]  # one row per token of the answer
        logps[answer] = float(-torch.nn.functional.cross_entropy(logits, tokens[len(head) :], reduction="sum"))
    return logps["chosen"] - logps["rejected"]


def reply(model: Any, tokenizer: Any, question: str, most_tokens: int) -> str:
    """Return the greedy answer in one line; `[...]` marks an answer that is cut off.

    Args:
        model: model of transformers or peft.
        tokenizer: its tokenizer, with a chat template.
        question: message of the user.
        most_tokens: tokens after which the answer is cut off.
    """
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    tokens = model.generate(**prompt, max_new_tokens=most_tokens, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    said: str = tokenizer.decode(tokens, skip_special_tokens=True)
    cut_off = len(tokens) == most_tokens and tokens[-1] != tokenizer.eos_token_id
    return " ".join(said.split()) + (" [...]" if cut_off else "")


def repetitive(text: str) -> bool:
    """Return whether at most a third of the words are distinct, or there are none: the answers of a damaged model."""
    words = text.lower().split()
    return len(set(words)) * 3 <= len(words)
