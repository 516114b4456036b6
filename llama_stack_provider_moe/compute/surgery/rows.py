"""Load a model and the rows that a surgery measures it on."""

from collections.abc import Mapping
from pathlib import Path

import torch

from llama_stack_provider_moe.compute.analysis.routing_run import read_prompts
from llama_stack_provider_moe.compute.data.positions import judge, positions_of
from llama_stack_provider_moe.compute.export.shard_files import Say
from llama_stack_provider_moe.compute.models.loader import load_for_inference, pick_device
from llama_stack_provider_moe.compute.surgery.prepared import Rows
from llama_stack_provider_moe.spec.surgery import SurgeryOptions, SurgeryTraining


def load_rows(
    model: str, files: Mapping[str, Path], training: SurgeryTraining, options: SurgeryOptions, say: Say
) -> Rows:
    """Load the model, and the canonical rows as tokens.

    Args:
        model: folder of the model.
        files: name of a data set or file, for messages -> its rows; the first are those to measure, others general.
        training: data type, and rows in a pass.
        options: longest row, and chat template.
        say: called with lines for a person.

    Raises:
        ModelError: the model can't be loaded.
        DataError: rows can't be rendered.
    """
    loaded, tokenizer = load_for_inference(model, training.dtype, pick_device(training.dtype), options.chat_template)
    vocabulary = int(loaded.get_input_embeddings().weight.shape[0])
    prompts, *general = (
        read_prompts(path, source, "all", options.max_length, tokenizer, vocabulary, say)
        for source, path in files.items()
    )
    more = [prompt for each in general for prompt in each]
    judge(positions_of(loaded), torch.tensor([len(prompt.ids) for prompt in (*prompts, *more)]), say)
    return Rows(loaded, prompts, training.batch_size, more)
