"""The rows of a KTO job: each an answer with a thumb up or down, and its micro-batches."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Dataset, Features, List, Value
from transformers import PreTrainedTokenizerBase
from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference

from llama_stack_provider_moe.compute.data.answers import KtoEncoder
from llama_stack_provider_moe.compute.data.datasets import Maker, Rows, cache_folder, ends_of, show_plan, show_row
from llama_stack_provider_moe.compute.data.encoding import Limit
from llama_stack_provider_moe.compute.data.rendering import Rendering, Tokens
from llama_stack_provider_moe.compute.runtime.context import Session
from llama_stack_provider_moe.errors import DataError
from llama_stack_provider_moe.spec import KTOSpec

FEATURES = Features({
    "prompt_ids": List(Value("int32")), "completion_ids": List(Value("int32")),
    "completion_said": List(Value("int8")), "label": List(Value("int8")),
})  # fmt: skip


def kto_rows(session: Session[KTOSpec], tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> Rows:
    """Rows with the columns of `KtoEncoder`; a prompt with its answer has at most `options.max_length` tokens.

    Args:
        session: the job's session.
        tokenizer: with a chat template.
        vocabulary: rows of the model's embedding; a greater token id would read past its end.

    Raises:
        DataError: rows can't be rendered, too many are too long, or a class is missing.
    """
    spec = session.spec
    options = spec.options
    encoder = KtoEncoder(tokenizer, Rendering.of(options), Limit(options.max_length, options.truncate))
    maker = Maker(session, cache_folder(session), encoder, FEATURES, vocabulary, classes=labels_of)
    train, validation, _ = maker.all_rows(spec.data)
    show_plan(session, encoder, maker.counts)
    row = train[0]
    which = "up" if row["label"] == [1] else "down"
    said = [False] * len(row["prompt_ids"]) + [bool(each) for each in row["completion_said"]]
    show_row(
        session, encoder, f"the first answer, thumb {which}", Tokens(row["prompt_ids"] + row["completion_ids"], said)
    )
    for name, rows in (("to train on", train), ("that are evaluated", validation)):
        if rows is not None and 0 in (ups := thumbs(rows)):
            raise DataError(f"dataset {spec.data.dataset_id!r}: of the rows {name}, {ups[0]} have a thumb up and "
                            f"{ups[1]} a thumb down; expected some of both")  # fmt: skip
    return Rows(train, validation, maker.counts, ends_of(encoder, maker.counts))


def labels_of(path: Path) -> list[int]:
    """The label of each canonical row of a file: 1 for a thumb up, 0 for down."""
    with path.open(encoding="utf-8") as file:
        return [int(json.loads(line)["label"]) for line in file]


def thumbs(rows: Dataset) -> tuple[int, int]:
    """Number of rows with a thumb up, and with a thumb down."""
    labels = [label for (label,) in rows["label"]]
    return sum(labels), len(labels) - sum(labels)


@dataclass
class ThumbCollator(DataCollatorForUnpairedPreference):  # type: ignore[misc]
    """TRL's, with the mismatched answers of each micro-batch, and without the tool results inside an answer.

    TRL pairs each prompt with the answer of a neighbour in the data's order, before training. Here epochs are shuffled,
    so it is the row before in the same micro-batch: the same answers, in the same micro-batch, as the paper has it.
    """

    def torch_call(self, examples: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        """The batch of TRL's collator; its masks are 0 on the tokens that do not count, `label` is (batch,)."""
        before = [examples[index - 1] for index in range(len(examples))]
        paired = [
            {**each, "label": bool(each["label"][0]), "KL_completion_ids": other["completion_ids"]}
            for each, other in zip(examples, before, strict=True)
        ]
        batch: dict[str, torch.Tensor] = super().torch_call(paired)
        for name, answers in (("completion_mask", examples), ("KL_completion_mask", before)):
            for mask_T, each, answer in zip(batch[name], examples, answers, strict=True):
                begin = len(each["prompt_ids"])
                said = answer["completion_said"][: max(0, len(mask_T) - begin)]
                mask_T[begin : begin + len(said)] *= torch.tensor(said)
        return batch
