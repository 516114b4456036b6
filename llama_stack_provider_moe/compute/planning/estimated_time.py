"""How long a job would train on this machine's GPU, from the operations of a token and the GPU's peak."""

import torch

from llama_stack_provider_moe.compute.moe.derive import find_layout
from llama_stack_provider_moe.compute.planning.generation import (
    BANDWIDTH_SHARE,
    answers_at_once,
    decode_bytes,
    writes_itself,
)
from llama_stack_provider_moe.compute.planning.planner import Planner, changed
from llama_stack_provider_moe.compute.planning.teacher import blank_teacher, distils
from llama_stack_provider_moe.compute.planning.throughput import bandwidth, count_flops, peak_flops
from llama_stack_provider_moe.spec import (
    BreakerSpec,
    DistillSpec,
    GRPOSpec,
    KTOSpec,
    RewardSpec,
    TrainingSpec,
    WritingSpec,
)
from llama_stack_provider_moe.spec.row_sources import PAIRED
from llama_stack_provider_moe.spec.run_time import RunTime, rows_in_run, run_time, unknown_time

# Share of the peak that a step is assumed to reach. No GPU was measured: an assumption, which the answer names.
UTILISATION = 0.2


def device_name(spec: TrainingSpec) -> str | None:
    """CUDA's name of the GPU that a job would use on this machine; None for a job on the CPU, or without a GPU."""
    if spec.resources.gpus == 0 or not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_name(0)


def flops_a_token(planner: Planner, spec: TrainingSpec) -> float:
    """Operations of one token in a row of full length; see `throughput`. Images' tower is spread over the tokens.

    Args:
        planner: has the model's config.
        spec: the job. A base in 8 or 4 bits counts as in 16, because the products are the same.
    """
    if spec.adapter is not None and spec.adapter.quantize_base:
        # With all that is valid only beside it.
        spec = changed(spec, {"adapter.quantize_base": False, "adapter.quantize_bits": 4,
                              "adapter.quantize_scales": False, "efficiency.offload_experts": False})  # fmt: skip
    adapted = planner.adapted(spec)
    teacher = blank_teacher(spec)
    references = float(spec.recipe == "dpo" or isinstance(spec, BreakerSpec) or (distils(spec) and teacher is None))
    if isinstance(spec, KTOSpec):
        references = 3  # both models also run over mismatched answers
    if isinstance(spec, GRPOSpec):
        references = _passes_beside(spec)
    if isinstance(spec, DistillSpec):  # the model's pass over the prompt too
        references += 1 - spec.generation.max_completion_length / spec.options.max_length
    step = count_flops(adapted.model, adapted.layout, references, head=not isinstance(spec, RewardSpec))
    row = [spec.options.max_length]
    taught = 0.0 if teacher is None else count_flops(teacher, find_layout(teacher)).of(row)
    return (step.of(row) + taught + _of_tower(planner, spec, references)) / spec.options.max_length


def _of_tower(planner: Planner, spec: TrainingSpec, references: float) -> float:
    """Operations for the images of a row (of one text of a pair); a reference's pass runs the tower again."""
    vision = planner.vision(spec)
    if vision is None or vision.operations is None:
        return 0.0
    texts = spec.training.batch_size * (2 if spec.recipe in PAIRED else 1)
    found = vision.operations()
    return (found.learning + references * found.alone) / texts


def _passes_beside(spec: GRPOSpec) -> float:
    """Passes without gradients over a row that is learnt from: the reference's, the old policy's, and its prompt's."""
    rl, length = spec.rl, spec.options.max_length
    writes = writes_itself(spec)
    prompt = (length - rl.max_completion_length) / length if writes else 0.0
    return (int(rl.beta > 0) + int(rl.steps_a_generation > 1 or not writes) + prompt) / rl.n_iterations


def estimated(planner: Planner, spec: TrainingSpec, device: str | None, rows: int | None = None) -> RunTime:
    """Return the time that a job would take, at `UTILISATION` of the peak of its devices.

    Args:
        planner: has the model's config.
        spec: the job.
        device: CUDA's name of its devices; None: a CPU, or no device that is known.
        rows: of a whole epoch; None if unknown.
    """
    if device is None:
        return unknown_time("no job like it was measured, and the peak of a CPU or an absent GPU is not known")
    peak = peak_flops(device, spec.training.dtype)
    if peak is None:
        in_dtype = f"{device} in {spec.training.dtype}"
        return unknown_time(f"no job like it was measured, and the peak of {in_dtype} is not known")
    speed = UTILISATION * peak * spec.resources.ranks / flops_a_token(planner, spec)
    if isinstance(spec, WritingSpec):
        return _with_answers(planner, spec, device, speed, rows)
    pair = 2 if spec.recipe in PAIRED else 1
    basis = (
        f"estimated from the operations of a token, at {UTILISATION:.0%} of the peak of {device}, with every row as "
        f"long as {spec.options.max_length:,} tokens"
    )
    return run_time(speed, rows_in_run(spec, rows), pair * spec.options.max_length, "estimated", basis)


def _with_answers(planner: Planner, spec: WritingSpec, device: str, speed: float, rows: int | None) -> RunTime:
    """The time of a job that also writes answers, unless an engine of its own does.

    Args:
        planner: has the model's config.
        spec: the job.
        device: CUDA's name of its devices.
        speed: tokens of prompts and answers a second of a job that only learns.
        rows: of a whole epoch; None if unknown.
    """
    length, answer = spec.options.max_length, spec.generating.max_completion_length
    basis = (
        f"estimated from the operations of a token, at {UTILISATION:.0%} of the peak of {device}, with every prompt "
        f"and answer as long as {length:,} tokens together"
    )
    written = bandwidth(device) if writes_itself(spec) else None
    if written is None:
        basis += ", without the time that writing answers takes, which is not known"
    else:
        times = spec.rl.n_iterations if isinstance(spec, GRPOSpec) else 1
        learnt = answers_at_once(spec) * spec.resources.ranks * times * length  # tokens, of a generation
        read = decode_bytes(spec, planner.adapted(spec), planner.weights(spec))
        decoding_s = read / (BANDWIDTH_SHARE * written)
        speed = learnt / (learnt / speed + decoding_s)
        basis += (
            f", and for answers of {answer:,} tokens from the bytes that each token's step reads, at "
            f"{BANDWIDTH_SHARE:.0%} of its memory's bandwidth"
        )
    return run_time(speed, rows_in_run(spec, rows), length, "estimated", basis)
