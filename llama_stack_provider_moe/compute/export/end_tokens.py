"""The tokens at which a model's folder says that an answer ends, for the formats that it is exported to.

A GGUF file names one end token, and llama.cpp's converter takes the tokenizer's. That is not the learnt one where a
base model has a chat template whose turns end with another token; the folder's generation config names it too.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from jinja2 import TemplateError
from transformers import AutoTokenizer

from llama_stack_provider_moe.ground.small_files import check_ids, read_object
from llama_stack_provider_moe.llama_cpp.process import scratch

_TOKENIZER = "tokenizer_config.json"
_MARK = "Qx0xQ"
_ASKED = [{"role": "user", "content": "a"}, {"role": "assistant", "content": _MARK}]


def end_ids(model: Path) -> list[int]:
    """Ids of the generation config that end an answer, the learnt one first.

    Raises:
        InvalidFile: the file has something else there.
    """
    path = model / "generation_config.json"
    try:
        return check_ids(path, read_object(path), "eos_token_id")
    except FileNotFoundError:
        return []


@contextmanager
def ending_as_learnt(model: Path) -> Iterator[Path]:
    """The folder, or one like it whose tokenizer's end token is the one that ends a learnt answer.

    That is the end of the generation config that the chat template puts behind an answer. The other folder has links to
    the files of `model`, under the same name, and is removed at the end of the block.
    """
    learnt = _learnt(model)
    if learnt is None:
        yield model
        return
    settings = read_object(model / _TOKENIZER)
    with scratch() as folder:
        view = Path(folder) / model.absolute().name
        view.mkdir()
        for path in model.absolute().iterdir():
            if path.name != _TOKENIZER:
                (view / path.name).symlink_to(path)
        (view / _TOKENIZER).write_text(json.dumps({**settings, "eos_token": learnt}), encoding="utf-8")
        yield view


def _learnt(model: Path) -> str | None:
    """The token that ends an answer, where it is not the tokenizer's own end token."""
    ends = end_ids(model)
    if not ends or not (model / _TOKENIZER).is_file():
        return None
    try:
        tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True)
        text = tokenizer.apply_chat_template(_ASKED, tokenize=False)
    except (OSError, ValueError, TemplateError):  # no chat template, or one that refuses this
        return None
    assert isinstance(text, str)
    behind = text.rpartition(_MARK)[2].lstrip()
    added = {end: str(tokenizer.convert_ids_to_tokens(end)) for end in ends if end in tokenizer.added_tokens_decoder}
    end = next((end for end, token in added.items() if behind.startswith(token)), None)
    return None if end is None or end == tokenizer.eos_token_id else added[end]
