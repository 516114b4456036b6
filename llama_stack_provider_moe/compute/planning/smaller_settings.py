"""Settings that make a job take less memory, for a planner to try."""

from collections.abc import Iterator, Mapping

from llama_stack_provider_moe.spec import Adapter, TrainingSpec
from llama_stack_provider_moe.spec.blocks import OF_BITSANDBYTES

# Settings of a job: dotted name -> value.
Fields = Mapping[str, object]


def of_one_kind(spec: TrainingSpec, on_gpus: bool) -> Iterator[list[Fields]]:
    """Yield changes of one kind each, from the smallest to the largest."""
    training, resources = spec.training, spec.resources
    if resources.ranks > 1 and resources.strategy != "auto":
        yield [{"resources.strategy": "auto"}]
    if not spec.efficiency.enable_activation_checkpointing:
        yield [{"efficiency.enable_activation_checkpointing": True}]
    halves = [1 << power for power in range(1, 13) if training.batch_size % (1 << power) == 0]
    smaller: list[Fields] = [{"training.batch_size": training.batch_size // half,
                "training.gradient_accumulation_steps": training.gradient_accumulation_steps * half}
               for half in halves if training.gradient_accumulation_steps * half <= 4096]  # fmt: skip
    if smaller:
        yield smaller
    lengths = [spec.options.max_length // half for half in (2, 4, 8)]
    yield [{"options.max_length": length} for length in lengths if length >= 8] or [{"options.max_length": 8}]
    if spec.adapter is None:
        yield [{"adapter": Adapter().model_dump(mode="json")}]
        yield [{"adapter": {**Adapter().model_dump(mode="json"), "quantize_base": True}}]
    elif not spec.adapter.quantize_base:
        yield [{"adapter.quantize_base": True}, {"adapter.quantize_base": True, "adapter.quantize_scales": True}]
    elif spec.adapter.quantize_bits == 4 and not spec.adapter.quantize_scales:
        yield [{"adapter.quantize_scales": True}]
    narrow = spec.adapter is not None and spec.adapter.dtype != "bf16" and spec.training.dtype == "bf16"
    if spec.optimizer.optimizer_type in ("adam", "adamw"):
        coded: Fields = {"optimizer.optimizer_type": "adamw_8bit"}
        yield [coded, {**coded, "adapter.dtype": "bf16"}] if narrow else [coded]
    elif narrow and spec.optimizer.optimizer_type in OF_BITSANDBYTES:
        yield [{"adapter.dtype": "bf16"}]
    if on_gpus and spec.adapter is not None and not spec.efficiency.offload_experts:
        offloaded: Fields = {"efficiency.offload_experts": True}
        four_bits: Fields = {"adapter.quantize_base": True, **offloaded}
        yield [offloaded if spec.adapter.quantize_base else four_bits]
    if on_gpus:
        more = [gpus for gpus in (2, 4, 8) if gpus > (resources.gpus or 1)]
        if more:
            yield [{"resources.gpus": gpus, "resources.strategy": "auto"} for gpus in more]


def of_all_kinds(spec: TrainingSpec, on_gpus: bool) -> Iterator[list[Fields]]:
    """The largest change of each kind, each added to those before."""
    fields: Fields = {}
    for ladder in of_one_kind(spec, on_gpus):
        if "adapter" in ladder[0] and "adapter" in fields:
            continue
        fields = {**fields, **ladder[-1]}
        yield [fields]
