"""The strategy that a job can train with on given devices, and the changes that make it fit if there is none.

Everything comes from the job's spec and its model's config: `memory` estimates a step, and `per_process` counts what
each process holds of it under each strategy. A job fits if the estimate is within `USABLE` of a GPU. It is refused if
what it needs whatever its batch (weights, gradients, optimiser: counted, not estimated) is more than the device has;
in between it is tight, and the job tries.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import islice
from typing import Any, Literal, cast, get_args

from pydantic import ValidationError
from transformers import PreTrainedConfig

from llama_stack_provider_moe.compute.methods.breaker_plan import decide
from llama_stack_provider_moe.compute.methods.reference_ahead import reference_ahead
from llama_stack_provider_moe.compute.models.loader import DTYPES
from llama_stack_provider_moe.compute.models.rope import extend, extension
from llama_stack_provider_moe.compute.moe.derive import find_layout
from llama_stack_provider_moe.compute.moe.layout import text_config
from llama_stack_provider_moe.compute.moe.resolve_settings import resolve_moe
from llama_stack_provider_moe.compute.moe.sharding import undividable
from llama_stack_provider_moe.compute.planning.dry_run import Device, Rehearsal
from llama_stack_provider_moe.compute.planning.engine_memory import engine_bytes
from llama_stack_provider_moe.compute.planning.generation import generation_memory
from llama_stack_provider_moe.compute.planning.loading import LoadingMemory, loading_memory
from llama_stack_provider_moe.compute.planning.memory import Batch, MemoryEstimate, StepMoments, rehearse, step_of
from llama_stack_provider_moe.compute.planning.merging import merging_bytes
from llama_stack_provider_moe.compute.planning.meta_model import Bits, MetaModel, adapt, bare
from llama_stack_provider_moe.compute.planning.per_process import (
    Way,
    Weight,
    offloaded_bytes,
    process_memory,
    share_of_run,
    transient_memory,
    weights_of,
    with_offloaded,
)
from llama_stack_provider_moe.compute.planning.smaller_settings import Fields, of_all_kinds, of_one_kind
from llama_stack_provider_moe.compute.planning.teacher import compares, distils, teacher_memory
from llama_stack_provider_moe.compute.planning.tower_inputs import RowImages
from llama_stack_provider_moe.compute.planning.vision_plan import VisionPlan, vision_plan
from llama_stack_provider_moe.errors import InvalidInput, MoeError
from llama_stack_provider_moe.ground.counting import number_of
from llama_stack_provider_moe.spec import JOB_SPEC, BreakerSpec, DPOSpec, TrainingSpec
from llama_stack_provider_moe.spec.blocks import Strategy
from llama_stack_provider_moe.spec.error_words import reason
from llama_stack_provider_moe.spec.image_limits import require_trainable_images
from llama_stack_provider_moe.spec.reward_jobs import RewardSpec
from llama_stack_provider_moe.spec.row_sources import PAIRED

Verdict = Literal["fits", "tight", "too large", "refused"]
# Share of the memory that a step may take. On a GPU the CUDA context and fragments of the allocator take the rest.
USABLE: dict[Device, float] = {"cuda": 0.9, "cpu": 1.0}
# In the order in which `auto` tries them: the one that moves the fewest bytes in a step first.
WAYS: tuple[Way, ...] = ("ddp", "fsdp", "ep")


@dataclass(frozen=True)
class Machine:
    """The device of each process of a job.

    Attributes:
        memory_bytes: of its GPU; on a CPU its share of the machine's memory.
    """

    device: Device
    memory_bytes: int

    @property
    def usable_bytes(self) -> int:
        """The largest estimate that fits."""
        return int(USABLE[self.device] * self.memory_bytes)


@dataclass(frozen=True)
class Option:
    """A strategy, and whether the job fits with it.

    Attributes:
        refused: the reason why this job can't use it.
        certain_bytes: that each device needs, whatever the batch.
    """

    strategy: Way
    verdict: Verdict
    refused: str | None = None
    certain_bytes: int = 0
    estimate: MemoryEstimate | None = None

    @property
    def peak_bytes(self) -> int:
        """The peak of one device; 0 if the strategy is refused."""
        return 0 if self.estimate is None else self.estimate.peak_bytes


@dataclass(frozen=True)
class Change:
    """Settings with which the job fits."""

    fields: Fields
    strategy: Way
    peak_bytes: int

    def text(self) -> str:
        """The change for a person."""
        settings = " with ".join(f"{name} {_shown(value)}" for name, value in self.fields.items())
        return f"{settings} ({self.strategy}, {self.peak_bytes / 1e9:.1f} GB)"


@dataclass(frozen=True)
class MemoryPlan:
    """The result for one job.

    Attributes:
        asked: `resources.strategy` of the job.
        chosen: None: no strategy is possible on this device.
        loading: what is needed while a quantised base is read; None: the base is not quantised.
        vision: what the images of a micro-batch take; None: no row has an image.
        merging_bytes: of the GPU or of main memory at the job's end; None: the job merges no quantised base.
    """

    asked: str
    machine: Machine
    processes: int
    options: tuple[Option, ...]
    chosen: Option | None
    loading: LoadingMemory | None = None
    vision: VisionPlan | None = None
    merging_bytes: int | None = None

    @property
    def verdict(self) -> Verdict:
        """The verdict on the chosen strategy."""
        return "too large" if self.chosen is None else self.chosen.verdict

    def as_json(self) -> dict[str, object]:
        """The plan for JSON, in bytes."""
        return {
            "strategy": None if self.chosen is None else self.chosen.strategy,
            "asked": self.asked,
            "verdict": self.verdict,
            "processes": self.processes,
            "device": self.machine.device,
            "device_bytes": self.machine.memory_bytes,
            "usable_bytes": self.machine.usable_bytes,
            "loading": None if self.loading is None else asdict(self.loading),
            "merging_bytes": self.merging_bytes,
            "vision": None if self.vision is None else self.vision.as_json(),
            "options": [{**asdict(option), "peak_bytes": option.peak_bytes} for option in self.options],
        }


@dataclass(frozen=True)
class _Rehearsed:
    adapted: MetaModel
    weights: tuple[Weight, ...]
    step: StepMoments
    bits: Bits
    loading: tuple[LoadingMemory, LoadingMemory] | None  # with the experts on the device, and offloaded
    vision: VisionPlan | None


class Planner:
    """Plans jobs on one model and machine; dry runs of steps are kept and reused.

    Args:
        config: of the model.
        machine: that trains.
        images: of the rows; None: they have none.
    """

    def __init__(self, config: PreTrainedConfig, machine: Machine, images: RowImages | None = None) -> None:
        self.machine = machine
        self._config = config
        self._images = images
        self._seen: dict[str, _Rehearsed] = {}

    def plan(self, spec: TrainingSpec) -> MemoryPlan:
        """Every strategy for a job, and the one that it gets.

        Raises:
            MoeError: the start of the job would fail too, because of its model or adapter.
        """
        resources = spec.resources
        auto = resources.strategy == "auto"
        options = tuple(self._option(spec, way) for way in _ways(resources.ranks))
        # On a CPU all processes share one memory, and gathering layers over gloo costs more than it saves.
        first = WAYS if not auto else ("ddp",) if self.machine.device == "cpu" else WAYS
        open_to = [option for option in options
                   if (option.strategy in first if auto else option.strategy == resources.strategy)]  # fmt: skip
        fitting = [option for option in open_to if option.verdict == "fits"]
        tight = sorted((option for option in open_to if option.verdict == "tight"), key=lambda each: each.peak_bytes)
        chosen = next(iter([*fitting, *tight]), None)
        made = self._rehearsed(spec)
        loading = None if made.loading is None else made.loading[spec.efficiency.offload_experts]
        vision = None if made.vision is None else made.vision.of(spec.efficiency.enable_activation_checkpointing)
        merging = merging_bytes(made.adapted) if made.bits < 16 and spec.options.save_merged else None
        return MemoryPlan(resources.strategy, self.machine, resources.ranks, options, chosen, loading, vision, merging)

    def estimate(self, spec: TrainingSpec, way: Way) -> tuple[MemoryEstimate, int]:
        """The peak of one device under a strategy, and the part of it that does not depend on the batch."""
        made, processes = self._rehearsed(spec), spec.resources.ranks
        whole = spec.adapter is None
        ahead = isinstance(spec, DPOSpec) and reference_ahead(cast(DPOSpec, changed(spec, {"resources.strategy": way})))
        teacher = teacher_memory(spec, self._config)
        copies = teacher.copies if teacher is not None else whole and compares(spec) and not ahead
        # As `compute.models.loader` does if all weights train and are divided.
        wide = way == "fsdp" and whole and spec.training.dtype == "bf16"
        has = process_memory(made.weights, way, processes, spec.optimizer, int(copies), wide)
        if teacher is not None:
            has = replace(has, weights=has.weights + teacher.weights)
        has = replace(has, weights=has.weights + engine_bytes(spec, self.machine.memory_bytes))
        if spec.resources.cpu_offload:  # the device holds only the gathered layers
            buffers = sum(weight.bytes for weight in made.weights if weight.kind == "buffer")
            has = replace(has, weights=buffers, gradients=0, optimizer=0, step=(0, 0))
        if spec.efficiency.offload_experts:
            has = with_offloaded(has, made.weights, self.machine.device == "cuda")
        tokens = spec.training.batch_size * spec.options.max_length * (2 if spec.recipe in PAIRED else 1)
        step = replace(
            made.step,
            run=share_of_run(made.step.run, made.weights, way, processes, wide),
            transient=transient_memory(made.adapted, made.weights, way, processes, tokens, wide),
            accumulates=spec.training.gradient_accumulation_steps > 1,
            reference=not ahead,
            teacher=teacher,
            generation=generation_memory(spec, self._config),
        )
        return step.peak(has, made.bits, spec.efficiency.enable_activation_checkpointing), has.certain

    def adapted(self, spec: TrainingSpec) -> MetaModel:
        """The model as the job trains it, without numbers."""
        return self._rehearsed(spec).adapted

    def weights(self, spec: TrainingSpec) -> tuple[Weight, ...]:
        """Its weights, as one process holds them."""
        return self._rehearsed(spec).weights

    def vision(self, spec: TrainingSpec) -> VisionPlan | None:
        """The images of a micro-batch, without checkpointing; None: no row has one."""
        return self._rehearsed(spec).vision

    def changes(self, spec: TrainingSpec) -> tuple[Change, ...]:
        """The changes that make the job fit: single settings if any are enough, else several at once; () if none are.

        Each change has been planned like the job itself.
        """
        on_gpus = self.machine.device == "cuda"
        found = tuple(self._fitting(spec, of_one_kind(spec, on_gpus)))
        return found or tuple(islice(self._fitting(spec, of_all_kinds(spec, on_gpus)), 1))

    def _fitting(self, spec: TrainingSpec, tried: Iterator[list[Fields]]) -> Iterator[Change]:
        for ladder in tried:  # from the smallest change to the largest; the first that fits counts
            if self._with(spec, ladder[-1]) is None:
                continue
            for fields in ladder:
                if (change := self._with(spec, fields)) is not None:
                    yield change
                    break

    def _with(self, spec: TrainingSpec, fields: Fields) -> Change | None:
        try:
            other = changed(spec, fields)
            if self._images is not None:
                require_trainable_images(other)
            plan = self.plan(other)
        except (MoeError, ValueError):  # not valid together, or not with this model
            return None
        if plan.chosen is None or plan.verdict != "fits":
            return None
        return Change(fields, plan.chosen.strategy, plan.chosen.peak_bytes)

    def _option(self, spec: TrainingSpec, way: Way) -> Option:
        if (refused := self._refused(spec, way)) is not None:
            return Option(way, "refused", refused)
        estimate, certain = self.estimate(spec, way)
        verdict: Verdict = "fits" if estimate.peak_bytes <= self.machine.usable_bytes else "tight"
        if certain > self.machine.memory_bytes:
            verdict = "too large"
        return Option(way, verdict, None, certain, estimate)

    def _refused(self, spec: TrainingSpec, way: Way) -> str | None:
        """The reason why the job can't use a strategy, in the same words as when it is submitted."""
        try:
            other = changed(spec, {"resources.strategy": way})
            if self._images is not None:
                require_trainable_images(other)
        except ValidationError as error:
            return "; ".join(reason(each) for each in error.errors())
        except InvalidInput as error:
            return str(error)
        adapted, processes = self._rehearsed(spec).adapted, spec.resources.ranks
        layout = adapted.layout
        if layout is None and spec.efficiency.offload_experts:
            return "the model is dense: it has no experts to offload"
        if way != "ep":
            return None
        if layout is None:
            return "the model is dense: it has no experts to divide"
        if layout.num_experts % processes:
            return f"{layout.num_experts} experts can't be divided equally among {processes} processes"
        return undividable(adapted.model, layout)

    def _rehearsed(self, spec: TrainingSpec) -> _Rehearsed:
        """A step of a single process; arithmetic adds strategy, checkpointing and optimiser."""
        batch = Batch(spec.training.batch_size, spec.options.max_length)
        adapter = None if spec.adapter is None else spec.adapter.model_dump()
        breaker = spec.circuit_breaker.model_dump() if isinstance(spec, BreakerSpec) else None
        rope = spec.options.rope_scaling
        key = repr(
            (spec.recipe, distils(spec), rope, adapter, spec.moe.model_dump(), breaker, spec.training.dtype, batch)
        )
        if key not in self._seen:
            self._seen[key] = self._rehearse(spec, batch)
        return self._seen[key]

    def _rehearse(self, spec: TrainingSpec, batch: Batch) -> _Rehearsed:
        # fp16 is as large as bf16, and torch's autocast supports bf16 everywhere.
        dtype = DTYPES["bf16" if spec.training.dtype == "fp16" else spec.training.dtype]
        model = bare(self._config, dtype, classifier=isinstance(spec, RewardSpec))
        if spec.options.rope_scaling is not None:
            extend(model, extension(text_config(model), spec.options.rope_scaling))
        adapter, targets = spec.adapter, cast(tuple[int, ...], (0,))
        if isinstance(spec, BreakerSpec):
            layout = find_layout(model)
            breaks = decide(spec, model, layout, resolve_moe(spec.moe, layout, full=False, models_loss=False))
            adapter, targets = breaks.adapter, breaks.targets
        bits: Bits = 16 if adapter is None or not adapter.quantize_base else adapter.quantize_bits
        adapted = adapt(model, adapter, spec.moe, bits)
        weights, device = weights_of(adapted), self.machine.device
        loading = None
        if bits < 16:
            loading = (loading_memory(adapted, device), loading_memory(adapted, device, offloaded_bytes(weights)))
        rehearsal = Rehearsal(adapted.model, device, plain_head=distils(spec))
        run = rehearse(rehearsal, adapted, spec.recipe, batch, device)
        step = step_of(adapted, spec.recipe, run, targets, batch, bits, device)
        vision = None
        if self._images is not None:
            vision = vision_plan(rehearsal, self._images, spec.recipe, batch.sequences, batch.length)
            step = replace(step, towers=vision.towers)
        return _Rehearsed(adapted, weights, step, bits, loading, vision)


def refusal(plan: MemoryPlan, changes: tuple[Change, ...]) -> str:
    """The error text for a job that fits no device."""
    device = f"{plan.machine.memory_bytes / 1e9:.1f} GB"
    reasons = [
        f"{option.strategy} needs {option.certain_bytes / 1e9:.1f} GB on each device for weights, gradients and "
        "optimiser alone, whatever the batch"
        if option.refused is None
        else f"{option.strategy} is not valid here: {option.refused}"
        for option in plan.options
        if option.verdict in ("too large", "refused") and plan.asked in ("auto", option.strategy)
    ]
    alone = "each of these alone would make it fit" if len(changes) != 1 else "this would make it fit"
    ways = (
        f"{alone}: {'; '.join(change.text() for change in changes)}"
        if changes
        else "no change that was tried would make it fit"
    )
    return f"the job can't fit on {number_of(plan.processes, 'device')} of {device} each: {'; '.join(reasons)}. {ways}"


def changed(spec: TrainingSpec, fields: Fields) -> TrainingSpec:
    """The job with other values of some settings.

    Raises:
        ValidationError: they are not valid together.
    """
    body: dict[str, Any] = spec.model_dump(mode="json")
    for name, value in fields.items():
        *blocks, last = name.split(".")
        block = body
        for each in blocks:
            block = block[each]
        block[last] = value
    return cast(TrainingSpec, JOB_SPEC.validate_python(body))


def _ways(processes: int) -> tuple[Way, ...]:
    offered = get_args(Strategy)
    return tuple(way for way in WAYS if way in offered) if processes > 1 else ("ddp",)


def _shown(value: object) -> str:
    if isinstance(value, dict):
        return "LoRA on a 4-bit base" if value.get("quantize_base") else "LoRA (default settings)"
    return str(value).lower() if isinstance(value, bool) else str(value)
