"""Preference rows, as people write them -> canonical rows."""

from collections.abc import Mapping

from llama_stack_provider_moe.spec.rows.chat_formats import (
    alpaca_prompt,
    context,
    is_transcript,
    must_follow,
    said,
    transcript,
    with_system,
)
from llama_stack_provider_moe.spec.rows.conversation_rules import Part, check_calls, joined
from llama_stack_provider_moe.spec.rows.images import images_of, words_of
from llama_stack_provider_moe.spec.rows.message_reading import messages
from llama_stack_provider_moe.spec.rows.messages import Message, Preference
from llama_stack_provider_moe.spec.rows.tool_calls import Settings, settings
from llama_stack_provider_moe.spec.rows.values import BadRow, Source, absent, filled

ANSWERS = ("chosen", "rejected")


def of_answers(source: Source) -> Preference:
    """`prompt`, `chosen`, `rejected`: answers alone, or whole conversations whose common beginning is the prompt."""
    missing = [column for column in ANSWERS if column not in source.columns]
    if missing:
        raise BadRow(missing[0], "is missing; a preference row has prompt, chosen, rejected")
    chosen, rejected = said(source, "chosen", "assistant"), said(source, "rejected", "assistant")
    given = said(source, "prompt", "user") if "prompt" in source.columns else None
    whole = [part for part in (chosen, rejected) if part.messages[0]["role"] != "assistant"]
    if len(whole) == 1:
        other = rejected if whole[0] is chosen else chosen
        raise BadRow(
            whole[0].column,
            f"begins with a {whole[0].messages[0]['role']} turn, but {other.column} with the answer; give both alone, "
            "without the prompt, or both as whole conversations",
        )
    if not whole:
        if given is None and chosen.listed and rejected.listed and chosen.messages[0] == rejected.messages[0]:
            return _of_whole(source, chosen, rejected, None)
        if given is None:
            raise BadRow("prompt", "is missing; a preference row has prompt, chosen, rejected")
        return _finished(source, [given], chosen, rejected)
    return _of_whole(source, chosen, rejected, given)


def of_transcripts(source: Source) -> Preference:
    """Two of HH-RLHF's transcripts; a `prompt` is their beginning, which the answers may leave out."""
    begins = source.take("prompt")
    chosen, rejected = (_transcript(source, column, begins) for column in ANSWERS)
    return _of_whole(source, chosen, rejected, None)


def _transcript(source: Source, column: str, begins: object) -> Part:
    if column not in source.columns:
        raise BadRow(column, "is missing; expected two transcripts, chosen and rejected")
    told = filled(source.take(column), column)
    if begins is not None and not is_transcript(told):
        told = filled(begins, "prompt") + told
    elif begins is not None and not told.startswith(filled(begins, "prompt").rstrip()):
        raise BadRow(column, "is a transcript that does not begin with prompt")
    return Part(column, transcript(told, column), listed=False)


def of_alpaca_pair(source: Source) -> Preference:
    """Alpaca's columns with `chosen` and `rejected` instead of `output`."""
    return _of_prompt(source, alpaca_prompt(source))


def of_sharegpt_pair(source: Source) -> Preference:
    """ShareGPT's `conversations` as the prompt, with `chosen` and `rejected`."""
    return _of_prompt(source, [messages(source.take("conversations"), "conversations", source)])


def of_openai(source: Source) -> Preference:
    """OpenAI's `input` {messages, tools, parallel_tool_calls}, `preferred_output`, `non_preferred_output`."""
    names = ("input", "preferred_output", "non_preferred_output")
    for column in names:
        if column not in source.columns:
            raise BadRow(column, f"is missing; expected {', '.join(names)}")
    asked = source.take("input")
    if not isinstance(asked, Mapping):
        raise BadRow("input", f"is {type(asked).__name__}; expected an object with messages")
    inner = Source({key: value for key, value in asked.items() if not absent(value)}, source.answered)
    if "messages" not in inner.columns:
        raise BadRow("input.messages", "is missing")
    prompt = messages(inner.take("messages"), "input.messages", source)
    with_tools = settings(inner, "input.")
    source.notes |= inner.notes
    source.unread |= {f"input.{key}" for key in inner.columns if key not in inner.read}
    chosen, rejected = (said(source, column, "assistant") for column in names[1:])
    return _finished(source, [prompt], chosen, rejected, with_tools)


def _of_prompt(source: Source, prompt: list[Part]) -> Preference:
    for column in ANSWERS:
        if column not in source.columns:
            raise BadRow(column, "is missing; expected chosen and rejected")
    chosen, rejected = said(source, "chosen", "assistant"), said(source, "rejected", "assistant")
    return _finished(source, prompt, chosen, rejected)


def _of_whole(source: Source, chosen: Part, rejected: Part, given: Part | None) -> Preference:
    good, bad = ([_unweighted(each) for each in part.messages] for part in (chosen, rejected))
    if good == bad:
        raise BadRow("rejected", "is the same as chosen; expected a different answer")
    same = 0
    while same < min(len(good), len(bad)) and good[same] == bad[same]:
        same += 1
    if same == 0:
        raise BadRow("rejected", "does not begin as chosen does; expected a common beginning, which is the prompt")
    for part, turns in ((chosen, good), (rejected, bad)):
        if same == len(turns):
            raise BadRow(part.column, "is only the beginning of the other conversation; expected another last answer")
        if turns[same]["role"] != "assistant":
            raise BadRow(part.column, f"differs from the other conversation first at turn {same + 1}, a "
                         f"{turns[same]['role']} turn; expected a different answer")  # fmt: skip
    prompt = good[:same]
    if given is not None and not _is_in(given, prompt):
        raise BadRow("prompt", "is not in the common beginning of chosen and rejected; give the prompt or whole "
                     "conversations")  # fmt: skip
    begins = chosen._replace(messages=prompt)
    return _finished(source, [begins], chosen.behind(same), rejected.behind(same))


def _is_in(given: Part, prompt: list[Message]) -> bool:
    wanted = [_unweighted(each) for each in given.messages]
    if given.listed:
        return any(prompt[start : start + len(wanted)] == wanted for start in range(len(prompt)))
    told = words_of(wanted[0]["content"]).strip()
    return any(words_of(each["content"]).strip() == told for each in prompt if each["role"] == wanted[0]["role"])


def _finished(
    source: Source, prompt: list[Part], chosen: Part, rejected: Part, beside: Settings | None = None
) -> Preference:
    prompt = [context(part) for part in with_system(source, prompt)]
    last = prompt[-1].messages[-1]["role"]
    for answer in (chosen, rejected):
        must_follow(prompt[-1], answer)
    if last not in ("user", "tool"):
        raise BadRow(prompt[-1].column, f"ends with a {last} turn; expected the user's")
    answers = []
    for answer in (chosen, rejected):
        if answer.messages[-1]["role"] != "assistant":
            raise BadRow(answer.column, f"ends with a {answer.messages[-1]['role']} turn; expected the assistant's")
        if any(images_of(each["content"]) for each in answer.messages):
            raise BadRow(answer.column, "has an image; the images of a preference stand in its prompt")
        if any(each.get("weight") == 0 for each in answer.messages):
            raise BadRow(answer.column, "has a message of weight 0; both answers are compared whole")
        check_calls([*prompt, answer])
        answers.append(answer.messages)
    if answers[0] == answers[1]:
        raise BadRow(rejected.column, "is the same as chosen; expected a different answer")
    beside = settings(source) if beside is None else beside
    return {"prompt": joined(prompt), "chosen": answers[0], "rejected": answers[1], **beside}


def _unweighted(each: Message) -> Message:
    if "weight" not in each:
        return each
    bare = each.copy()
    del bare["weight"]
    return bare
