"""Hidden states of prompts after chosen decoder blocks, from passes that end at the last of them.

The tokens, the batches and the mean over tokens are those of directional ablation's measuring.
"""

from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor

from llama_stack_provider_moe.compute.ablation.states import Batch, batches, state_of
from llama_stack_provider_moe.compute.analysis.routing_report import Prompt
from llama_stack_provider_moe.compute.models.hidden_states import EMBEDDINGS
from llama_stack_provider_moe.compute.probing.texts import Reading
from llama_stack_provider_moe.compute.probing.trunk import Trunk
from llama_stack_provider_moe.errors import ModelError


def read_states(
    trunk: Trunk,
    prompts: Sequence[Prompt],
    reading: Reading,
    wanted: Collection[int],
    batch_size: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[int, Tensor]:
    """Block -> the state of each prompt, (N, H) in fp32: the mean of the tokens that are read.

    For `EMBEDDINGS` it is the mean of the tokens of the messages' own text, a bag of words.

    Args:
        trunk: the model.
        prompts: N of them.
        reading: which of each prompt's tokens are read.
        wanted: decoder blocks, or `EMBEDDINGS`.
        batch_size: prompts in one pass; prompts of similar length go together.
        progress: called with the number of prompts that are done and their total.

    Raises:
        ModelError: the model has several residual streams, or its states are not finite.
    """
    width = trunk.base.width
    found = {block: torch.empty(len(prompts), width) for block in wanted}
    done = 0
    for batch in batches(prompts, reading.measure, batch_size, trunk.device):
        own_BT = _own(prompts, batch).to(trunk.device)
        with torch.no_grad():
            states = trunk.blocks.states(wanted, batch.ids_BT, batch.mask_BT)
        for block, states_BTH in states.items():
            if states_BTH.shape[2] != width:
                raise ModelError(f"model: decoder block {block} returns states of width {states_BTH.shape[2]}, not one "
                                 f"residual stream of width {width}; probes read models with one stream")  # fmt: skip
            if block == EMBEDDINGS or reading.tokens == "content":
                state_BH = torch.einsum("bth,bt->bh", states_BTH.double(), own_BT)
            else:
                state_BH = state_of(states_BTH, batch.at_BS)
            if not bool(torch.isfinite(state_BH).all()):
                raise ModelError(f"model: the states after decoder block {block} are not finite; try training.dtype "
                                 "fp32")  # fmt: skip
            found[block][batch.rows] = state_BH.float().cpu()
        done += len(batch.rows)
        progress(done, len(prompts))
    return found


def _own(prompts: Sequence[Prompt], batch: Batch) -> Tensor:
    """The weight of each token in the mean of its row's own text, (B, T) in fp64; a row without any has zeros."""
    own_BT = torch.zeros(batch.ids_BT.shape, dtype=torch.float64)
    for place, row in enumerate(batch.rows.tolist()):
        said = prompts[row].counts
        own_BT[place, : len(said)] = torch.tensor(said, dtype=torch.float64)
    return own_BT / own_BT.sum(dim=1, keepdim=True).clamp_min(1)
