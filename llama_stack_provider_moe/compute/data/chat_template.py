"""One chat template of a tokenizer: what it renders, and what it leaves out."""

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, cast

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template
from trl.chat_template_utils import get_training_chat_template, has_generation_markers

from llama_stack_provider_moe.compute.data.template_probe import Dialect, Said, probe, said
from llama_stack_provider_moe.compute.models.row_images import parts_of
from llama_stack_provider_moe.spec.rows import Message

Span = tuple[int, int]
SHAPES = 4096  # shapes of conversations that are remembered
TOOLS = "`tools` (describe them in a system message, and leave `tools` out)"

# A template is a program from elsewhere; these are what such a program raises for messages that it does not expect.
RAISED = (TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError)


class Refused(Exception):
    """The template raised an error for a conversation; the text is its own."""


@dataclass
class Template:
    """One chat template of a tokenizer.

    Args:
        source: the Jinja template.
        variables: the tokenizer's special tokens, as templates know them.
        closing: tokens that may end an answer.
        eos: the end-of-sequence token.
    """

    source: str
    variables: dict[str, Any]
    closing: tuple[str, ...]
    eos: str | None

    def __post_init__(self) -> None:
        self._shapes: dict[str, list[str] | None] = {}

    def render(
        self,
        messages: Sequence[Said],
        tools: Sequence[Mapping[str, object]] | None = None,
        given: Mapping[str, object] | None = None,
        answer_next: bool = False,
        marks: bool = False,
    ) -> tuple[str, list[Span]]:
        """The rendered text, and the characters between its generation marks.

        Args:
            messages: as `said` makes them.
            tools: functions that the model may call.
            given: further variables of the template.
            answer_next: end with the generation prompt.
            marks: find the generation marks.

        Raises:
            Refused: the template raised an error.
        """
        try:
            [text], places = render_jinja_template(
                conversations=[list(messages)],
                tools=list(tools) if tools else None,
                chat_template=self.source,
                return_assistant_tokens_mask=marks,
                add_generation_prompt=answer_next,
                **{**self.variables, **(given or {})},
            )
        except RAISED as error:
            raise Refused(str(error) or type(error).__name__) from None
        return text, places[0] if marks else []

    @cached_property
    def dialect(self) -> Dialect:
        """How the template wants its messages."""
        return probe(self._rendered, self.closing, self.eos)

    def _rendered(self, messages: Sequence[Said], tools: Sequence[Mapping[str, object]] | None) -> str:
        try:
            return self.render(messages, tools)[0]
        except Refused:
            return ""

    def said(self, messages: Sequence[Message]) -> list[Said]:
        """The messages as this template takes them."""
        return [said(message, self.dialect) for message in messages]

    def dropped(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None,
        given: Mapping[str, object] | None,
        answer_next: bool = False,
    ) -> list[str] | None:
        """What the template leaves out of such a conversation, in words; the reasoning apart.

        Conversations of one shape (roles, kinds of content, tools) are rendered once, with words in their place that
        nothing else can have written. None: the template refuses such words, so nothing is known.
        """
        shape = json.dumps(
            [
                [(m["role"], _kinds(m), m["content"] is None, len(m.get("tool_calls", ())), "name" in m,
                  "tool_call_id" in m, bool(m.get("reasoning"))) for m in messages],
                len(tools or ()), given, answer_next,
            ],
            default=str,
        )  # fmt: skip
        if shape not in self._shapes:
            if len(self._shapes) >= SHAPES:
                self._shapes.clear()
            self._shapes[shape] = self._dropped(messages, tools, given, answer_next)
        return self._shapes[shape]

    def _dropped(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None,
        given: Mapping[str, object] | None,
        answer_next: bool,
    ) -> list[str] | None:
        names: dict[str, str] = {}
        expected: list[tuple[str, str]] = []
        functions = []
        for number, tool in enumerate(tools or ()):
            function = tool.get("function", tool)
            if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
                return None  # not a function as chat templates describe them
            names[function["name"]] = f"qtool{number}q"
            renamed = {**function, "name": names[function["name"]]}
            functions.append({**tool, "function": renamed} if "function" in tool else renamed)
            expected.append((renamed["name"], TOOLS))
        made: list[Message] = []
        for number, message in enumerate(messages):
            where = f"message {number + 1} ({message['role']})"
            word: Message = {**message}
            if (parts := parts_of(message)) is not None:
                words: list[dict[str, Any]] = [
                    {**part, "text": f"qword{number}p{at}q"} for at, part in enumerate(parts)
                ]
                word["content"] = cast(Any, words)
                expected += [(str(word["text"]), f"a text of {where}") for word in words if word["type"] == "text"]
            elif message["content"]:
                word["content"] = f"qword{number}q"
                expected.append((f"qword{number}q", f"the content of {where}"))
            if message.get("reasoning"):
                word["reasoning"] = f"qthought{number}q"
            if "name" in message:
                word["name"] = names.get(message["name"], message["name"])
            if "tool_calls" in message:
                word["tool_calls"] = []
                for call_number, call in enumerate(message["tool_calls"]):
                    name = names.get(call["function"]["name"], f"qcall{number}i{call_number}q")
                    value = f"qvalue{number}i{call_number}q"
                    word["tool_calls"].append({**call, "function": {"name": name, "arguments": {"qkey": value}}})
                    expected += [(name, f"the tool calls of {where}"), (value, f"the tool calls of {where}")]
            made.append(word)
        try:
            text, _ = self.render(self.said(made), functions or None, given, answer_next)
        except Refused:
            return None
        return list(dict.fromkeys(what for word_, what in expected if word_ not in text))


def _kinds(message: Message) -> object:
    """The kinds of a content's parts; of a text, whether there is one."""
    parts = parts_of(message)
    return bool(message["content"]) if parts is None else [part["type"] for part in parts]


class Pair(NamedTuple):
    """The model's template, and the one whose generation marks are used, if there is one.

    `marks` is `own` itself if that has marks, or else TRL's training template of it.
    """

    own: Template
    marks: Template | None

    def all(self) -> list[Template]:
        """Both, the model's own first."""
        return [self.own] if self.marks is None or self.marks is self.own else [self.own, self.marks]


def pair_of(tokenizer: PreTrainedTokenizerBase, source: str) -> Pair:
    """The templates to use for a tokenizer's chat template `source`."""
    nothing = {tokenizer.bos_token, tokenizer.unk_token, tokenizer.pad_token} - {tokenizer.eos_token}
    added = {token.content for token in tokenizer.added_tokens_decoder.values()}
    closing = tuple(
        token for token in sorted({*added, *tokenizer.all_special_tokens} - nothing) if token and token.strip()
    )

    def template(text: str) -> Template:
        return Template(text, dict(tokenizer.special_tokens_map), closing, cast(str | None, tokenizer.eos_token))

    own = template(source)
    if has_generation_markers(source):
        return Pair(own, own)
    single = copy.copy(tokenizer)
    single.chat_template = source
    try:
        training = get_training_chat_template(single)
    except RAISED:  # ValueError for a template that TRL doesn't know; its probes raise what the template raises
        training = None
    return Pair(own, None if training is None else template(training))
