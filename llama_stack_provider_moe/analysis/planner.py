"""Which strategy a job can train with on given devices, and what would make it fit where none does.

From the job's spec and its model's config alone: `memory` estimates a step, `held` what of it falls to one process
under each strategy. A job fits where the estimate is within `USABLE` of a GPU. It is refused where what it needs
whatever its batch (weights, gradients, optimiser: no estimate, but a count) is more than the device has; in between it
is tight, and is tried.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import islice
from typing import Any, Literal, cast, get_args

from pydantic import ValidationError
from transformers import PreTrainedConfig

from llama_stack_provider_moe.analysis.blank import Adapted, Bits, adapt, bare
from llama_stack_provider_moe.analysis.dry_run import Device, Rehearsal
from llama_stack_provider_moe.analysis.held import Way, Weight, beside, held, shared, weights_of
from llama_stack_provider_moe.analysis.memory import Batch, Estimate, Step, rehearse, step_of
from llama_stack_provider_moe.errors import MoeError
from llama_stack_provider_moe.experts.layout import find_layout
from llama_stack_provider_moe.experts.settings import resolve_moe
from llama_stack_provider_moe.spec import JOB_SPEC, Adapter, BreakerSpec, DPOSpec, TrainingSpec
from llama_stack_provider_moe.spec.blocks import Strategy
from llama_stack_provider_moe.training.breaker_plan import decide
from llama_stack_provider_moe.training.loader import DTYPES
from llama_stack_provider_moe.training.recipes.dpo import reference_ahead

Verdict = Literal["fits", "tight", "too large", "refused"]
# Of what a GPU has; the rest is the CUDA context and what the allocator can't use. On a CPU nothing is set apart.
USABLE: dict[Device, float] = {"cuda": 0.9, "cpu": 1.0}
# As `auto` tries them: the fewer bytes move in a step, the earlier.
WAYS: tuple[Way, ...] = ("ddp", "fsdp", "ep")
MOMENTS = {"adam": 2, "adamw": 2, "sgd": 0}  # tensors that torch's optimiser keeps for each weight


@dataclass(frozen=True)
class Machine:
    """What each process of a job has.

    Attributes:
        memory_bytes: of its GPU; on a CPU its share of the machine's.
    """

    device: Device
    memory_bytes: int

    @property
    def usable_bytes(self) -> int:
        """What an estimate may come to."""
        return int(USABLE[self.device] * self.memory_bytes)


@dataclass(frozen=True)
class Option:
    """A strategy.

    Attributes:
        refused: why this job can't have it.
        certain_bytes: of one device, whatever the batch.
    """

    strategy: Way
    verdict: Verdict
    refused: str | None = None
    certain_bytes: int = 0
    estimate: Estimate | None = None

    @property
    def peak_bytes(self) -> int:
        """Of one device; 0 where it is refused."""
        return 0 if self.estimate is None else self.estimate.peak_bytes


@dataclass(frozen=True)
class Change:
    """Settings with which the job fits; `fields`: dotted name -> value."""

    fields: dict[str, Any]
    strategy: Way
    peak_bytes: int

    def text(self) -> str:
        """For a person."""
        told = " with ".join(f"{name} {_shown(value)}" for name, value in self.fields.items())
        return f"{told} ({self.strategy}, {self.peak_bytes / 1e9:.1f} GB)"


@dataclass(frozen=True)
class Plan:
    """What was found for one job.

    Attributes:
        asked: `resources.strategy` of the job.
        chosen: None: none can be had on this device.
    """

    asked: str
    machine: Machine
    processes: int
    options: tuple[Option, ...]
    chosen: Option | None

    @property
    def verdict(self) -> Verdict:
        """Of the chosen strategy."""
        return "too large" if self.chosen is None else self.chosen.verdict

    def as_json(self) -> dict[str, Any]:
        """In bytes."""
        return {
            "strategy": None if self.chosen is None else self.chosen.strategy,
            "asked": self.asked,
            "verdict": self.verdict,
            "processes": self.processes,
            "device": self.machine.device,
            "device_bytes": self.machine.memory_bytes,
            "usable_bytes": self.machine.usable_bytes,
            "options": [{**asdict(option), "peak_bytes": option.peak_bytes} for option in self.options],
        }


@dataclass(frozen=True)
class _Rehearsed:
    adapted: Adapted
    weights: tuple[Weight, ...]
    step: Step
    bits: Bits


class Planner:
    """Plans for jobs on one model and machine; steps are rehearsed once and kept."""

    def __init__(self, config: PreTrainedConfig, machine: Machine) -> None:
        self.machine = machine
        self._config = config
        self._seen: dict[str, _Rehearsed] = {}

    def plan(self, spec: TrainingSpec) -> Plan:
        """Every strategy for a job as it is, and the one it gets.

        Raises:
            MoeError: as the job's start would, by what its model and adapter are.
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
        return Plan(resources.strategy, self.machine, resources.ranks, options, chosen)

    def estimate(self, spec: TrainingSpec, way: Way) -> tuple[Estimate, int]:
        """One device's peak under a strategy, and what of it is there whatever the batch."""
        made, processes = self._rehearsed(spec), spec.resources.ranks
        whole = spec.adapter is None
        ahead = False
        if isinstance(spec, DPOSpec):
            ahead = reference_ahead(cast(DPOSpec, changed(spec, {"resources.strategy": way})))
        copies = spec.recipe == "dpo" and whole and not ahead
        # What `training.loader` does where all weights train and are shared out.
        wide = way == "fsdp" and whole and spec.training.dtype == "bf16"
        has = held(made.weights, way, processes, MOMENTS[spec.optimizer.optimizer_type], int(copies), wide)
        if spec.resources.cpu_offload:  # of all that is shared out the device has what is gathered
            buffers = sum(weight.bytes for weight in made.weights if weight.kind == "buffer")
            has = replace(has, weights=buffers, gradients=0, optimizer=0, largest=0)
        tokens = spec.training.batch_size * spec.options.max_length * (2 if spec.recipe == "dpo" else 1)
        step = replace(
            made.step,
            run=shared(made.step.run, made.weights, way, processes, wide),
            beside=beside(made.adapted, made.weights, way, processes, tokens, wide),
            accumulates=spec.training.gradient_accumulation_steps > 1,
            reference=not ahead,
        )
        return step.peak(has, made.bits, spec.efficiency.enable_activation_checkpointing), has.certain

    def changes(self, spec: TrainingSpec) -> tuple[Change, ...]:
        """What would make the job fit: single settings where there are such, else several at once; () where none do.

        Every one has been planned as the job itself is.
        """
        on_gpus = self.machine.device == "cuda"
        found = tuple(self._fitting(spec, _single(spec, on_gpus)))
        return found or tuple(islice(self._fitting(spec, _together(spec, on_gpus)), 1))

    def _fitting(self, spec: TrainingSpec, tried: Iterator[list[dict[str, Any]]]) -> Iterator[Change]:
        for ladder in tried:  # from the mildest step to the last; the first that fits counts
            if self._with(spec, ladder[-1]) is None:
                continue
            for fields in ladder:
                if (change := self._with(spec, fields)) is not None:
                    yield change
                    break

    def _with(self, spec: TrainingSpec, fields: dict[str, Any]) -> Change | None:
        try:
            plan = self.plan(changed(spec, fields))
        except (MoeError, ValueError):  # settings that don't go together, or not with this model
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
        """Why the job may not have a strategy, as the door would say it."""
        try:
            changed(spec, {"resources.strategy": way})
        except ValidationError as error:
            return "; ".join(each["msg"].removeprefix("Value error, ") for each in error.errors())
        layout, processes = self._rehearsed(spec).adapted.layout, spec.resources.ranks
        if way == "ep" and layout is None:
            return "the model is dense: it has no experts to divide"
        if way == "ep" and layout is not None and layout.num_experts % processes:
            return f"{layout.num_experts} experts can't be divided equally among {processes} processes"
        return None

    def _rehearsed(self, spec: TrainingSpec) -> _Rehearsed:
        """A step of one process alone; what a strategy, checkpointing and the optimiser do to it is arithmetic."""
        batch = Batch(spec.training.batch_size, spec.options.max_length)
        adapter = None if spec.adapter is None else spec.adapter.model_dump()
        breaker = spec.circuit_breaker.model_dump() if isinstance(spec, BreakerSpec) else None
        key = repr((spec.recipe, adapter, spec.moe.model_dump(), breaker, spec.training.dtype, batch))
        if key not in self._seen:
            self._seen[key] = self._rehearse(spec, batch)
        return self._seen[key]

    def _rehearse(self, spec: TrainingSpec, batch: Batch) -> _Rehearsed:
        # fp16 is as large as bf16, and torch's autocast knows the latter everywhere.
        model = bare(self._config, DTYPES["bf16" if spec.training.dtype == "fp16" else spec.training.dtype])
        adapter, targets = spec.adapter, cast(tuple[int, ...], (0,))
        if isinstance(spec, BreakerSpec):
            layout = find_layout(model)
            breaks = decide(spec, model, layout, resolve_moe(spec.moe, layout, full=False, models_loss=False))
            adapter, targets = breaks.adapter, breaks.targets
        bits: Bits = 16 if adapter is None or not adapter.quantize_base else adapter.quantize_bits
        adapted = adapt(model, adapter, spec.moe, bits)
        weights, device = weights_of(adapted), self.machine.device
        run = rehearse(Rehearsal(adapted.model, device), adapted, spec.recipe, batch, device)
        step = step_of(adapted, spec.recipe, run, targets, batch, bits, device)
        return _Rehearsed(adapted, weights, step, bits)


def refusal(plan: Plan, changes: tuple[Change, ...]) -> str:
    """What a job is told that fits no device."""
    device = f"{plan.machine.memory_bytes / 1e9:.1f} GB"
    told = [
        f"{option.strategy} needs {option.certain_bytes / 1e9:.1f} GB of each device for weights, gradients and "
        "optimiser alone, whatever the batch"
        if option.refused is None
        else f"{option.strategy} is not valid here: {option.refused}"
        for option in plan.options
        if option.verdict in ("too large", "refused") and plan.asked in ("auto", option.strategy)
    ]
    alone = "each of these alone would make it fit" if len(changes) != 1 else "this would make it fit"
    ways = f"{alone}: {'; '.join(change.text() for change in changes)}" if changes else "nothing that was tried does"
    return f"the job can't fit on {plan.processes} device(s) of {device} each: {'; '.join(told)}. {ways}"


def changed(spec: TrainingSpec, fields: dict[str, Any]) -> TrainingSpec:
    """The job with other values of some settings.

    Args:
        fields: dotted name -> value.

    Raises:
        ValidationError: they don't go together.
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


def _single(spec: TrainingSpec, on_gpus: bool) -> Iterator[list[dict[str, Any]]]:
    """Changes of one kind, each from the mildest to the last."""
    training, resources = spec.training, spec.resources
    if resources.ranks > 1 and resources.strategy != "auto":
        yield [{"resources.strategy": "auto"}]
    if not spec.efficiency.enable_activation_checkpointing:
        yield [{"efficiency.enable_activation_checkpointing": True}]
    halves = [1 << power for power in range(1, 13) if training.batch_size % (1 << power) == 0]
    smaller = [{"training.batch_size": training.batch_size // half,
                "training.gradient_accumulation_steps": training.gradient_accumulation_steps * half}
               for half in halves if training.gradient_accumulation_steps * half <= 4096]  # fmt: skip
    if smaller:
        yield smaller
    shorter = [{"options.max_length": spec.options.max_length // half} for half in (2, 4, 8)]
    yield [fields for fields in shorter if fields["options.max_length"] >= 8] or [{"options.max_length": 8}]
    if spec.adapter is None:
        yield [{"adapter": Adapter().model_dump(mode="json")}]
        yield [{"adapter": {**Adapter().model_dump(mode="json"), "quantize_base": True}}]
    elif not spec.adapter.quantize_base:
        yield [{"adapter.quantize_base": True}]
    if on_gpus:
        more = [gpus for gpus in (2, 4, 8) if gpus > (resources.gpus or 1)]
        if more:
            yield [{"resources.gpus": gpus, "resources.strategy": "auto"} for gpus in more]


def _together(spec: TrainingSpec, on_gpus: bool) -> Iterator[list[dict[str, Any]]]:
    """The last step of each kind, one after another on top of those before."""
    fields: dict[str, Any] = {}
    for ladder in _single(spec, on_gpus):
        if "adapter" in ladder[0] and "adapter" in fields:
            continue
        fields = {**fields, **ladder[-1]}
        yield [fields]


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return "LoRA on a 4-bit base" if value.get("quantize_base") else "LoRA (its defaults)"
    return str(value).lower() if isinstance(value, bool) else str(value)
