"""Hidden states of prompts after chosen decoder blocks, from passes that end at the last of them.

The tokens, the batches and the mean over tokens are those of directional ablation's measuring.
"""

from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor

from llama_stack_provider_moe.compute.ablation.states import batches, state_of
from llama_stack_provider_moe.compute.analysis.routing_report import Prompt
from llama_stack_provider_moe.compute.models.hidden_states import EMBEDDINGS
from llama_stack_provider_moe.compute.probing.trunk import Trunk
from llama_stack_provider_moe.errors import ModelError
from llama_stack_provider_moe.spec.ablation import Measure


def read_states(
    trunk: Trunk,
    prompts: Sequence[Prompt],
    measure: Measure,
    wanted: Collection[int],
    batch_size: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[int, Tensor]:
    """Block -> the state of each prompt, (N, H) in fp32: of the measured tokens, or for `EMBEDDINGS` of all tokens.

    Args:
        trunk: the model.
        prompts: N of them.
        measure: which of each prompt's tokens are read.
        wanted: decoder blocks, or `EMBEDDINGS`.
        batch_size: prompts in one pass; prompts of similar length go together.
        progress: called with the number of prompts that are done and their total.

    Raises:
        ModelError: the model has several residual streams, or its states are not finite.
    """
    width = trunk.base.width
    found = {block: torch.empty(len(prompts), width) for block in wanted}
    done = 0
    for batch in batches(prompts, measure, batch_size, trunk.device):
        with torch.no_grad():
            states = trunk.blocks.states(wanted, batch.ids_BT, batch.mask_BT)
        for block, states_BTH in states.items():
            if states_BTH.shape[2] != width:
                raise ModelError(f"model: decoder block {block} returns states of width {states_BTH.shape[2]}, not one "
                                 f"residual stream of width {width}; probes read models with one stream")  # fmt: skip
            if block == EMBEDDINGS:
                mask_BT1 = batch.mask_BT[:, :, None].double()
                state_BH = (states_BTH.double() * mask_BT1).sum(dim=1) / mask_BT1.sum(dim=1)
            else:
                state_BH = state_of(states_BTH, batch.at_BS)
            if not bool(torch.isfinite(state_BH).all()):
                raise ModelError(f"model: the states after decoder block {block} are not finite; try training.dtype "
                                 "fp32")  # fmt: skip
            found[block][batch.rows] = state_BH.float().cpu()
        done += len(batch.rows)
        progress(done, len(prompts))
    return found
