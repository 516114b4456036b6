"""The tokens at which a model's generation stops: those that ended what it learnt, and those that it came with.

A base model may come with a chat template whose turns end with another token than its own end of a text. What is saved
must stop at the token that was learnt, or a server runs on to its token limit.
"""

from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

FILE = "generation_config.json"


def ends_of(model: PreTrainedModel) -> list[int]:
    """Ids that end an answer by the model's generation config."""
    config = model.generation_config if model.can_generate() else None
    ends = None if config is None else config.eos_token_id
    return [] if ends is None else [ends] if isinstance(ends, int) else [int(end) for end in ends]


def stop_at(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, learnt: Sequence[int]) -> str | None:
    """Let the model's generation config end answers at the learnt tokens too; the learnt ones come first.

    Args:
        model: to be trained; its generation config is saved with it.
        tokenizer: of the model.
        learnt: ids of the tokens that end what is learnt.

    Returns:
        What generation stops at, for a person; None if nothing that is learnt has an end.
    """
    if not learnt or not model.can_generate() or model.generation_config is None:
        return None
    ends = list(dict.fromkeys([*learnt, *ends_of(model)]))
    model.generation_config.eos_token_id = ends if len(ends) > 1 else ends[0]
    names = [f"{tokenizer.convert_ids_to_tokens(end)}{' (learnt)' if end in learnt else ''}" for end in ends]
    return f"generation stops at: {', '.join(names)}"


def write_beside(model: PreTrainedModel, folder: Path) -> None:
    """Write a model's generation config into the folder of its adapter, which PEFT would save without it.

    It is not validated: many published ones have settings that contradict each other, and are only passed on.
    """
    if model.can_generate() and model.generation_config is not None:
        model.generation_config.to_json_file(folder / FILE)
