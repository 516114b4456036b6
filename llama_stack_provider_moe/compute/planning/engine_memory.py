"""Memory of the GPU that goes to what generates answers beside the training, in the same process."""

from llama_stack_provider_moe.spec import GRPOSpec, TrainingSpec
from llama_stack_provider_moe.spec.rl_engines import VllmColocateEngine


def engine_bytes(spec: TrainingSpec, memory_bytes: int) -> int:
    """Bytes that vLLM reserves; 0 where it runs elsewhere, or not at all.

    Args:
        spec: the job.
        memory_bytes: of the device.
    """
    engine = spec.rl.engine if isinstance(spec, GRPOSpec) else None
    return int(engine.gpu_memory_utilization * memory_bytes) if isinstance(engine, VllmColocateEngine) else 0
