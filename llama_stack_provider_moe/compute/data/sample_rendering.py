"""Renders a sample of rows as a job will, and names those that the chat template can't render. It needs no torch."""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from llama_stack_provider_moe.compute.data.answers import rendered_answer
from llama_stack_provider_moe.compute.data.encoding import before_last
from llama_stack_provider_moe.compute.data.rendering import Renderer, Rendering, Unrenderable
from llama_stack_provider_moe.compute.models.chat_templates import set_template
from llama_stack_provider_moe.errors import ModelError
from llama_stack_provider_moe.spec.rows import CanonicalRow, Conversation, Preference, ThumbRow

TOKENIZERS = 3  # most tokenizers that are kept

type _Attempt = tuple[str, Callable[[], object]]  # a field of a row, and what renders it


@dataclass
class _Loaded:
    """A tokenizer, and its renderers by their settings."""

    tokenizer: PreTrainedTokenizerBase
    renderers: dict[Rendering, Renderer] = field(default_factory=dict)

    def renderer(self, settings: Rendering) -> Renderer:
        if settings not in self.renderers:
            self.renderers[settings] = Renderer(self.tokenizer, settings)
        return self.renderers[settings]


class SampleRendering:
    """Answers the requests that `template_check` describes; keeps the tokenizers of the last models."""

    def __init__(self) -> None:
        self._kept: OrderedDict[object, _Loaded] = OrderedDict()

    def answer(self, request: Mapping[str, Any]) -> dict[str, object]:
        """Return the problems of a sample, or why it could not be checked."""
        name = request["name"]
        try:
            loaded = self._load(Path(request["model"]), name, request["chat_template"])
        except ModelError as error:
            return {"refused": str(error).removeprefix(f"model: {name!r} ")}
        except Exception as error:  # noqa: BLE001  # of a library; training reports it with its text
            return {"unavailable": f"its tokenizer can't be loaded ({type(error).__name__})"}
        try:
            settings = Rendering(**request["rendering"])
            return {"problems": list(_problems(loaded, settings, request["parts"]))}
        except Exception as error:  # noqa: BLE001  # a template that raises anything must not end the process
            return {"unavailable": f"its chat template failed ({type(error).__name__})"}

    def _load(self, folder: Path, name: str, template: Any) -> _Loaded:
        key = (folder, template, _version(folder))
        if key not in self._kept:
            tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
            if tokenizer.pad_token is None:  # as in training; a template may name it
                tokenizer.pad_token = tokenizer.eos_token
            set_template(tokenizer, template, name)
            self._kept[key] = _Loaded(tokenizer)
        self._kept.move_to_end(key)
        while len(self._kept) > TOKENIZERS:
            self._kept.popitem(last=False)
        return self._kept[key]


def _version(folder: Path) -> tuple[tuple[str, int, int], ...]:
    """Changes with the folder's small files, among them those of its tokenizer."""
    files = [*folder.glob("*.json"), *folder.glob("*.jinja"), *folder.glob("*.model"), *folder.glob("*/*.jinja")]
    return tuple((str(file), stat.st_mtime_ns, stat.st_size) for file in sorted(files) for stat in [file.stat()])


def _problems(
    loaded: _Loaded, settings: Rendering, parts: Mapping[str, Mapping[str, Any]]
) -> Iterator[tuple[str, int, str, str]]:
    for part, sample in parts.items():
        render = _KINDS[sample["kind"]]
        for number, row in sample["rows"]:
            for column, attempt in render(loaded, settings, row):
                try:
                    attempt()
                except Unrenderable as problem:
                    yield part, number, column, str(problem)
                    break  # one problem for each row, as in training


def _learnt(loaded: _Loaded, settings: Rendering, row: CanonicalRow) -> Iterator[_Attempt]:
    yield "messages", lambda: loaded.renderer(settings).row(cast(Conversation, row))


def _pair(loaded: _Loaded, settings: Rendering, row: CanonicalRow) -> Iterator[_Attempt]:
    pair, renderer = cast(Preference, row), loaded.renderer(settings)
    yield "chosen", lambda: rendered_answer(renderer, pair, "chosen")
    yield "rejected", lambda: rendered_answer(renderer, pair, "rejected")


def _answer(loaded: _Loaded, settings: Rendering, row: CanonicalRow) -> Iterator[_Attempt]:
    yield "completion", lambda: rendered_answer(loaded.renderer(settings), cast(ThumbRow, row), "completion")


def _break(loaded: _Loaded, settings: Rendering, row: CanonicalRow) -> Iterator[_Attempt]:
    whole = cast(Conversation, row)
    yield "messages", lambda: loaded.renderer(settings).answer(before_last(whole), whole["messages"][-1:])


def _prompt(loaded: _Loaded, _: Rendering, row: CanonicalRow) -> Iterator[_Attempt]:
    yield "messages", lambda: loaded.renderer(Rendering()).prompt(cast(Conversation, row))


def _whole(loaded: _Loaded, settings: Rendering, row: CanonicalRow) -> Iterator[_Attempt]:
    answered = cast(Conversation, row)["messages"][-1]["role"] == "assistant"
    return (_learnt if answered else _prompt)(loaded, Rendering(), row)


# learnt: rows of SFT, and rows to retain; whole: of an analysis, and retained ones of an evaluation; prompt: the other
# rows of an evaluation. Evaluation and analysis use the default settings.
_KINDS: Mapping[str, Callable[[_Loaded, Rendering, CanonicalRow], Iterator[_Attempt]]] = {
    "learnt": _learnt,
    "pair": _pair,
    "answer": _answer,
    "break": _break,
    "prompt": _prompt,
    "whole": _whole,
}
