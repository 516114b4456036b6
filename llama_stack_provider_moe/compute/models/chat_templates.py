"""Named chat templates, for models that have none.

Both mark what the assistant generates, which the loss mask uses. Both end an assistant's turn with the tokenizer's
end-of-sequence token, so that the model learns to stop with any vocabulary.
"""

from typing import Literal

from transformers import PreTrainedTokenizerBase

from llama_stack_provider_moe.errors import ModelError

# ChatML has its own end-of-turn mark. If that mark is not the tokenizer's end-of-sequence token, an assistant's turn
# gets both: a frozen head can't learn that a piece of plain text ends the answer.
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}"
    "{{ message['content'] + '<|im_end|>' }}{% if eos_token != '<|im_end|>' %}{{ eos_token }}{% endif %}"
    "{% endgeneration %}"
    "{% else %}"
    "{{ message['content'] + '<|im_end|>' }}"
    "{% endif %}"
    "{{ '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

PLAIN = (
    "{% for message in messages %}"
    "{{ '### ' + message['role'] | capitalize + ':\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}"
    "{{ message['content'] }}"
    "{% endif %}"
    "{{ '\n\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Assistant:\n' }}{% endif %}"
)

NAMED: dict[str, str] = {"chatml": CHATML, "plain": PLAIN}


def default_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The chat template for conversations without tools: the only one, or of several the one named `default`."""
    templates: dict[str, str] | str | None = tokenizer.chat_template
    return templates.get("default") if isinstance(templates, dict) else templates


def set_template(
    tokenizer: PreTrainedTokenizerBase, name: Literal["chatml", "plain"] | None, model: str, needed: bool = True
) -> None:
    """Give `tokenizer` the named template, or check that it has one.

    A named template starts with the beginning-of-sequence token if the tokenizer puts one before plain text.

    Args:
        tokenizer: of the model.
        name: of the template; None: its own.
        model: for errors.
        needed: whether it must have one; plain texts need none.

    Raises:
        ModelError: there is no template, several without a `default`, or no end-of-sequence token for the named one.
    """
    if name is None:
        if not needed:
            return
        if tokenizer.chat_template is None:
            raise ModelError(
                f"model: {model!r} has no chat template, so its rows can't be rendered; set options.chat_template to "
                f"one of {', '.join(NAMED)}"
            )
        if isinstance(tokenizer.chat_template, dict) and "default" not in tokenizer.chat_template:
            raise ModelError(
                f"model: {model!r} has several chat templates ({', '.join(sorted(tokenizer.chat_template))}), "
                f"none of them 'default'; set options.chat_template to one of {', '.join(NAMED)}"
            )
        return
    if tokenizer.eos_token is None:
        raise ModelError(f"model: {model!r} has no end-of-sequence token, which template {name!r} needs")
    begins = tokenizer.bos_token is not None and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    tokenizer.chat_template = ("{{ bos_token }}" if begins else "") + NAMED[name]
