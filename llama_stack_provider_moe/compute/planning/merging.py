"""What a job with `options.save_merged` takes at its end, when it decodes a quantised base and merges its adapter.

All weights in 16 bits, the adapter, and scratch of the merge (`compute.moe.quantize.merge_memory`): of the GPU where
that much is free then, else of main memory.
"""

from llama_stack_provider_moe.compute.moe.quantize import merge_memory
from llama_stack_provider_moe.compute.planning.meta_model import MetaModel


def merging_bytes(adapted: MetaModel) -> int:
    """Bytes of one memory at most, for a model whose base is quantised."""
    needed = merge_memory(adapted.model)
    adapter: int = sum(weight.nbytes for weight in adapted.model.parameters() if weight.requires_grad)
    return adapted.weight_bytes - needed.codes + needed.total + adapter
