"""JSON that `compute.planning` prints for `moe-train report lora` and `moe-train plan`, as far as tables show it."""

from typing import TypedDict

from llama_stack_provider_moe.spec.run_time import RunTime

type Terms = dict[str, int]  # bytes of each term of an estimate


class Target(TypedDict):
    """Matrices of one name and shape that LoRA adapts."""

    name: str
    part: str
    kind: str
    count: int
    weight_shape: list[int]
    lora_a_shape: list[int]
    lora_b_shape: list[int]
    adapters: int
    sharing: str
    parameters: int


class Part(TypedDict):
    """Sums over the targets in one part of the model."""

    part: str
    matches: int
    adapters: int
    parameters: int


class Estimate(TypedDict):
    """Estimated peak memory of a training step, and the moment of the peak."""

    recipe: str
    bits: int
    checkpointing: bool
    peak_bytes: int
    terms: Terms
    moment: str
    machine_bytes: int
    offloaded_bytes: int


class Card(TypedDict):
    """For a GPU of this size: recipe -> the setup that fits, or null."""

    memory_gb: int
    setups: dict[str, str | None]


class HiddenStates(TypedDict):
    """Size of the hidden states that circuit breakers compare."""

    targets: list[int]
    all_layers_bytes: int
    targets_bytes: int


class Report(TypedDict):
    """Answer to `moe-train report lora`."""

    model: str
    model_type: str
    source: str
    layers: int
    hidden_size: int
    vocabulary: int
    experts: str
    method: str
    base_parameters: int
    trainable_parameters: int
    adapter_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    batch: int
    length: int
    hidden_states: HiddenStates
    targets: list[Target]
    parts: list[Part]
    memory: list[Estimate]
    cards: list[Card]
    recommended: list[str]
    notes: list[str]


class Option(TypedDict):
    """A strategy; `refused` says why the job can't use it."""

    strategy: str
    verdict: str
    refused: str | None
    peak_bytes: int
    certain_bytes: int
    estimate: Estimate | None


class Loading(TypedDict):
    """What is needed at most while a quantised base is read."""

    host_bytes: int
    device_bytes: int


class Plan(TypedDict):
    """What fits on the machine."""

    device: str
    processes: int
    device_bytes: int
    usable_bytes: int
    asked: str
    strategy: str
    verdict: str
    loading: Loading | None
    merging_bytes: int | None
    options: list[Option]


class PlannedJob(TypedDict):
    """Settings of the job that its memory depends on."""

    recipe: str
    model: str
    trains: str
    optimizer: str
    batch_size: int
    max_length: int
    dtype: str
    checkpointing: bool


class Change(TypedDict):
    """A change of the job that makes it fit."""

    text: str


class PlanDocument(TypedDict):
    """Answer to `moe-train plan`."""

    job: PlannedJob
    plan: Plan
    changes: list[Change]
    time: RunTime
    vision: str | None  # what the images take, or why none are counted; None: a text model
