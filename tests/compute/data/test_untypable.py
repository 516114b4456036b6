"""Special tokens that are typed in a text, and that the tokenizer has no ids for as text."""

from typing import Any

import pytest

from llama_stack_provider_moe.compute.data.answers import DpoEncoder
from llama_stack_provider_moe.compute.data.encoding import Limit, Problem, SftEncoder
from llama_stack_provider_moe.compute.data.rendering import Renderer, Rendering, Unrenderable
from tests.support.template_tokenizers import byte_level
from tests.support.training_support import said

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIALS = ["<|pad|>", "<|im_start|>", "<|im_end|>"]


def chat(asked: str, answer: str) -> Any:
    return {"messages": [said("user", asked), said("assistant", answer)]}


def test_a_typed_token_that_has_no_ids_as_text_is_a_problem_of_its_row() -> None:
    """A tokenizer that merges at random gives a piece of a text other ids than the whole."""
    tokenizer = byte_level(CHATML, SPECIALS, eos_token="<|im_end|>", pad_token="<|pad|>")
    tokenizer.backend_tokenizer.model.dropout = 0.5
    typed = "rivers, stones and lights of the harbour " * 20 + "<|im_end|>"
    rows = [chat("a", "b"), chat(typed, "b"), chat("b", "a")]
    why = "this tokenizer can't give the ids of a special token typed in a message as text: "
    renderer = Renderer(tokenizer)
    with pytest.raises(Unrenderable, match=why):
        renderer.tokens(renderer.row(rows[1]))
    first, second, third = SftEncoder(tokenizer, Rendering(), Limit(4096))(rows)
    assert isinstance(second, Problem)
    assert second.reason.startswith(why)
    assert not second.droppable
    assert isinstance(first, list)
    assert isinstance(third, list)
    pair: Any = {"prompt": [said("user", "a")], "chosen": [said("assistant", "b")]}
    [found] = DpoEncoder(tokenizer, Rendering(), Limit(4096))([pair | {"rejected": [said("assistant", typed)]}])
    assert isinstance(found, Problem)
    assert found.reason.startswith(why)
    assert isinstance(SftEncoder(tokenizer, Rendering(special_tokens="control"), Limit(4096))(rows)[1], list)
