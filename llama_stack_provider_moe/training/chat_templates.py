"""Chat templates by name, for models that bring none.

Both end an assistant's turn with the tokenizer's end-of-sequence token, so that generation learns to stop whatever
the vocabulary; both render a conversation's beginning the same whatever follows, which the loss mask needs.
"""

from typing import Literal

from transformers import PreTrainedTokenizerBase

from llama_stack_provider_moe.errors import ModelError

# ChatML marks a turn's end itself. Where that mark is not the tokenizer's end-of-sequence token, an assistant's turn
# gets both: a frozen head can't be taught that a piece of plain text ends the answer.
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' }}"
    "{% if message['role'] == 'assistant' and eos_token != '<|im_end|>' %}{{ eos_token }}{% endif %}"
    "{{ '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

PLAIN = (
    "{% for message in messages %}"
    "{{ '### ' + message['role'] | capitalize + ':\n' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{{ '\n\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Assistant:\n' }}{% endif %}"
)

NAMED: dict[str, str] = {"chatml": CHATML, "plain": PLAIN}


def set_template(tokenizer: PreTrainedTokenizerBase, name: Literal["chatml", "plain"] | None, model: str) -> None:
    """Give `tokenizer` the named template, or check that it brings its own.

    A named template begins with the beginning-of-sequence token where the tokenizer puts one before plain text.
    """
    if name is None:
        if tokenizer.chat_template is None:
            raise ModelError(
                f"model: {model!r} has no chat template, so its rows can't be rendered; name one in "
                f"options.chat_template, one of {', '.join(NAMED)}"
            )
        if isinstance(tokenizer.chat_template, dict):
            raise ModelError(
                f"model: {model!r} has several chat templates ({', '.join(sorted(tokenizer.chat_template))}) and none "
                f"is its own; name one in options.chat_template, one of {', '.join(NAMED)}"
            )
        return
    if tokenizer.eos_token is None:
        raise ModelError(f"model: {model!r} has no end-of-sequence token; template {name!r} ends an answer with it")
    begins = tokenizer.bos_token is not None and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    tokenizer.chat_template = ("{{ bos_token }}" if begins else "") + NAMED[name]
