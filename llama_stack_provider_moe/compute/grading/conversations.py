"""An answer and its row as a conversation, for models that read both."""

from collections.abc import Mapping, Sequence

from llama_stack_provider_moe.graders.samples import GradeFailed, Sample


def messages_with_answer(sample: Sample) -> list[dict[str, str]]:
    """Return the messages of the row's prompt, and the answer as the assistant's.

    Raises:
        GradeFailed: the row has neither `messages` nor `prompt`.
    """
    for name in ("messages", "prompt"):
        given = sample.item.get(name)
        if isinstance(given, str):
            messages = [{"role": "user", "content": given}]
        elif isinstance(given, Sequence) and given:
            messages = [_message(each) for each in given]
            if messages[-1]["role"] == "assistant":
                messages.pop()  # the right answer, which is not what was said
        else:
            continue
        return [*messages, {"role": "assistant", "content": sample.output_text}]
    raise GradeFailed("unknown_name", "the row has neither `messages` nor `prompt`, which a model must read")


def _message(given: object) -> dict[str, str]:
    role = given.get("role") if isinstance(given, Mapping) else None
    content = given.get("content") if isinstance(given, Mapping) else None
    if not isinstance(role, str) or not isinstance(content, str):
        raise GradeFailed("bad_reference", "a message of the row has no role or no text")
    return {"role": role, "content": content}
