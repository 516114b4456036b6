"""What the models of `demo_rl` answer, how far they are from the base, and how likely other text is."""

import gc
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from demo_answers import quiet_libraries
from demo_jobs import rows_of

MOST_WORDS = 12
MOST_TOKENS = 36  # of an answer to a held-out prompt; one that reaches them does not keep the rule
BATCH = 28
# It asks for what is rewarded. With "Answer." none of 16 sampled answers ended within 28 tokens; with this one, 3 of 10
# ended within 34, one of them with at most 12 words, so that a model has short answers to learn from.
SYSTEM = "Answer in a few words."


class Answered(NamedTuple):
    """A greedy answer.

    Attributes:
        text: without special tokens.
        tokens: its token ids, the end's too.
        ended: whether it ended before the limit.
    """

    text: str
    tokens: list[int]
    ended: bool


class Measured(NamedTuple):
    """What was measured of a model; sums are in nats, one for each row.

    Attributes:
        answers: to the held-out prompts.
        kl: sum over an answer's tokens of KL(model || base), over the whole vocabulary.
        nll: of each of the other texts.
        tokens: of each of the other texts.
    """

    answers: list[Answered]
    kl: list[float]
    nll: list[float]
    tokens: list[int]


def asked(prompt: str) -> list[dict[str, str]]:
    """Return the messages that ask for an answer."""
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": prompt}]


def keeps_rule(answer: Answered) -> bool:
    """Return whether an answer has ended, and has 1 to 12 words."""
    return answer.ended and 1 <= len(answer.text.split()) <= MOST_WORDS


def other_text() -> list[dict[str, str]]:
    """Return rows whose answers measure the perplexity: recipes, each longer than the rule allows."""
    return rows_of("cooking_heldout")


def measure(base: Path, adapter: Path | None, prompts: Sequence[str]) -> Measured:
    """Measure the base, or the base with an adapter.

    Args:
        base: folder of the model before training.
        adapter: folder of an adapter; None: the base itself.
        prompts: the held-out ones.
    """
    quiet_libraries()
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base, padding_side="left")
    before: Any = AutoModelForCausalLM.from_pretrained(base).eval()
    model = before
    if adapter is not None:
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).merge_and_unload().eval()
    said = [
        answer for at in range(0, len(prompts), BATCH) for answer in answers(model, tokenizer, prompts[at : at + BATCH])
    ]
    kl = [0.0] * len(said)
    if adapter is not None:
        kl = [
            divergence(model, before, opening(tokenizer, prompt), answer.tokens)
            for prompt, answer in zip(prompts, said, strict=True)
        ]
    pairs = [nll(model, tokenizer, row) for row in other_text()]
    del model, before
    gc.collect()
    return Measured(said, kl, [sum_ for sum_, _ in pairs], [count for _, count in pairs])


def opening(tokenizer: Any, prompt: str) -> list[int]:
    """Return the token ids of a prompt, up to where the answer begins."""
    ids: list[int] = tokenizer.apply_chat_template(asked(prompt), add_generation_prompt=True)["input_ids"]
    return ids


def answers(model: Any, tokenizer: Any, prompts: Sequence[str]) -> list[Answered]:
    """Return the greedy answers to some prompts."""
    import torch

    batch = tokenizer.pad({"input_ids": [opening(tokenizer, each) for each in prompts]}, return_tensors="pt")
    with torch.inference_mode():
        found = model.generate(**batch, max_new_tokens=MOST_TOKENS, do_sample=False)
    end = tokenizer.eos_token_id
    rows = []
    for row in found[:, batch["input_ids"].shape[1] :].tolist():
        ended = end in row
        tokens = row[: row.index(end) + 1] if ended else row
        text = " ".join(tokenizer.decode(tokens, skip_special_tokens=True).split())
        rows.append(Answered(text, tokens, ended))
    return rows


def logprobs(model: Any, head: list[int], tail: list[int]) -> Any:
    """Return the log-probabilities of all tokens of the vocabulary at each token of `tail`, (tail, vocabulary)."""
    import torch

    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([head + tail])).logits[0, len(head) - 1 : -1]
    return logits.float().log_softmax(-1)


def divergence(model: Any, base: Any, head: list[int], tail: list[int]) -> float:
    """Return the sum over an answer's tokens of KL(model || base)."""
    ours, theirs = logprobs(model, head, tail), logprobs(base, head, tail)
    return float((ours.exp() * (ours - theirs)).sum())


def nll(model: Any, tokenizer: Any, row: dict[str, str]) -> tuple[float, int]:
    """Return the negative log-likelihood of a row's answer, and its number of tokens."""
    tail = tokenizer(row["completion"], add_special_tokens=False)["input_ids"]
    found = logprobs(model, opening(tokenizer, row["prompt"]), tail)
    return -float(found[range(len(tail)), tail].sum()), len(tail)
