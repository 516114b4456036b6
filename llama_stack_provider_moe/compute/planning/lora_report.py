"""A report on what LoRA reaches in a model, what trains, and the memory of a job, before any weight is loaded.

The model is built from its config on the meta device and adapted by `compute.moe.adapters.add_lora`, which also runs
when a job starts; with `--load` the weights are loaded and adapted in the same way. Run

    python -m llama_stack_provider_moe.compute.planning.lora_report MODEL [--adapter JSON] [--bits 16] ...

which prints one JSON object, `Report`, or `{"error": ...}`; `moe-train report lora` shows it to a person.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

import torch
from peft.tuners.lora import LoraLayer, ParamWrapper
from pydantic import ValidationError

from llama_stack_provider_moe.compute.models.loader import load_weights
from llama_stack_provider_moe.compute.moe.adapters import ADAPTER_NAME, below_layer, expert_ranks, injected
from llama_stack_provider_moe.compute.moe.layout import ExpertLayout, decoder_layers, text_config
from llama_stack_provider_moe.compute.moe.vision_parts import trained_text
from llama_stack_provider_moe.compute.planning.dry_run import Device, NotMeasurable
from llama_stack_provider_moe.compute.planning.expected_images import USUAL_IMAGES, ExpectedImages, image_size
from llama_stack_provider_moe.compute.planning.memory import SINGLE, Batch, MemoryEstimate, estimate, hidden_state_bytes
from llama_stack_provider_moe.compute.planning.meta_model import Bits, MetaModel, adapt, blank, read_config
from llama_stack_provider_moe.errors import InvalidInput, MoeError, shorten
from llama_stack_provider_moe.jobdir import local_names
from llama_stack_provider_moe.spec import Adapter, Moe, numbers
from llama_stack_provider_moe.spec.error_words import reason
from llama_stack_provider_moe.spec.expected_images import IMAGE_SIZE

Part = Literal["routed experts", "shared experts", "trunk"]
CARDS_GB = (16, 24, 40, 48, 80, 96, 141, 192)  # memories of common GPUs, 1e9 bytes
USABLE = 0.9  # share of a card; the CUDA context and fragments of the allocator take the rest
# The fastest first: a base in 16 bits, without recomputing.
SETUPS: tuple[tuple[Bits, bool], ...] = ((16, False), (16, True), (4, False), (4, True))


@dataclass(frozen=True)
class Target:
    """Adapted weights with the same name below a layer and the same shape.

    Attributes:
        kind: a linear layer, or a parameter without a module, as fused experts are.
        count: modules or parameters, over all layers.
        experts: in each of them; 0: not experts.
        adapters: pairs of A and B: each expert has its own rows and columns of the fused ones.
        sharing: whether each pair has memory of its own, by identity of storage and offset.
        parameters: that train.
        bytes: that are stored, in fp32.
    """

    name: str
    part: Part
    kind: Literal["module", "parameter"]
    count: int
    experts: int
    weight_shape: tuple[int, ...]
    lora_a_shape: tuple[int, ...]
    lora_b_shape: tuple[int, ...]
    adapters: int
    sharing: Literal["distinct", "shared"]
    parameters: int
    bytes: int


@dataclass(frozen=True)
class PartSum:
    """The sums for routed experts, shared experts, or everything else."""

    part: Part
    matches: int
    adapters: int
    parameters: int


@dataclass(frozen=True)
class HiddenStates:
    """Bytes of the outputs of decoder blocks in bf16, for one batch: of all blocks, and of those at `targets`."""

    all_layers_bytes: int
    targets: tuple[int, ...]
    targets_bytes: int


@dataclass(frozen=True)
class Card:
    """A GPU, and for each recipe the fastest setup that fits in `USABLE` of its memory; None: no setup fits."""

    memory_gb: int
    setups: dict[str, str | None]


@dataclass(frozen=True)
class Report:
    """All figures; `source` says whether weights were loaded."""

    model: str
    source: Literal["config", "weights"]
    model_type: str
    layers: int
    hidden_size: int
    vocabulary: int
    experts: str
    base_parameters: int
    adapter: dict[str, object]
    method: str
    targets: tuple[Target, ...]
    parts: tuple[PartSum, ...]
    by_group: dict[str, int]
    trainable_parameters: int
    adapter_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    batch: int
    length: int
    device: Device
    hidden_states: HiddenStates
    memory: tuple[MemoryEstimate, ...]
    cards: tuple[Card, ...]
    recommended: tuple[str, ...]
    notes: tuple[str, ...]


def report(
    name: str,
    adapter: Adapter,
    moe: Moe,
    batch: Batch,
    bits: Sequence[Bits],
    targets: tuple[int, ...] | None,
    device: Device,
    load: bool,
    images: ExpectedImages = USUAL_IMAGES,
) -> Report:
    """Report on a model.

    Args:
        name: folder, config.json, or hub id in the cache.
        adapter: the `adapter` block of a job.
        moe: the `moe` block of a job.
        batch: the micro-batch to estimate for.
        bits: of the base, to estimate for.
        targets: decoder blocks that circuit breakers compare; None: those at a third and two thirds of the depth.
        device: to estimate for.
        load: count on the loaded weights instead of only the config.
        images: of the rows of recipes that take some.

    Raises:
        MoeError: the start of a job would fail too, or the model does not have a target.
    """
    config, notes = read_config(name)
    blanks = {each: blank(config, adapter, moe, each) for each in bits}
    targets = _targets(targets, len(decoder_layers(blanks[bits[0]].model)[1]))
    counted = blanks[bits[0]]
    if load:
        counted = adapt(load_weights(name, config, torch.bfloat16, torch.device("cpu")), adapter, moe)
    # Before the estimate, which replaces the weights by fake ones.
    rows, beside = tuple(targets_of(counted)), trained_text(counted.model)
    memory, vision = list[MemoryEstimate](), None
    try:
        for each, adapted in blanks.items():
            seen = images.of(config, name) if each == 16 else None  # a quantised base takes text alone
            found, told = estimate(adapted, each, batch, targets, device, seen)
            memory, vision = [*memory, *found], vision or told
    except NotMeasurable as error:  # everything else is counted all the same
        notes = (*notes, str(error))
    stored = sum(row.bytes for row in rows) // SINGLE  # including the padding of experts with smaller ranks
    if beside is not None:
        notes = (*notes, f"vision: {beside}")
    if vision is not None:
        notes = (*notes, f"vision tower of sft with 16 bits: {vision.text()}")
    layers, hidden = len(decoder_layers(counted.model)[1]), text_config(counted.model).hidden_size
    parts = tuple(_sums(rows))
    return Report(
        model=name,
        source="weights" if load else "config",
        model_type=text_config(counted.model).model_type,
        layers=layers,
        hidden_size=hidden,
        vocabulary=text_config(counted.model).vocab_size,
        experts="none: the model is dense" if counted.layout is None else counted.layout.text(),
        base_parameters=counted.report.total_parameters - stored,
        adapter=adapter.model_dump(mode="json"),
        method=counted.report.method,
        targets=rows,
        parts=parts,
        by_group=counted.report.by_group,
        trainable_parameters=counted.report.trainable_parameters,
        adapter_bytes=stored * SINGLE,
        gradient_bytes=stored * SINGLE,
        optimizer_bytes=stored * 2 * SINGLE,
        batch=batch.sequences,
        length=batch.length,
        device=device,
        hidden_states=HiddenStates(
            hidden_state_bytes(layers, hidden, batch), targets, hidden_state_bytes(len(targets), hidden, batch)
        ),
        memory=tuple(memory),
        cards=tuple(_cards(memory)),
        recommended=tuple(_recommended(parts, memory, counted.layout)),
        notes=(*notes, *counted.report.notes),
    )


def _targets(asked: tuple[int, ...] | None, layers: int) -> tuple[int, ...]:
    if asked is None:
        return tuple(sorted({layers // 3, 2 * layers // 3}))
    if beyond := [layer for layer in asked if layer >= layers]:
        raise InvalidInput("--targets", beyond[0], f"layers from 0 to {layers - 1}, which this model has")
    return asked


@dataclass
class _Found:
    """LoRA layers of one name and shape."""

    layers: list[LoraLayer]
    ranks: list[list[int]]  # of unequal experts
    places: list[tuple[int, int]]  # storage and offset of each pair's A


def targets_of(adapted: MetaModel) -> Iterator[Target]:
    """One target for each name below a layer and shape, in the order of the modules."""
    found: dict[tuple[str, tuple[int, ...]], _Found] = {}
    unequal = expert_ranks(adapted.model)
    names = {module: name for name, module in adapted.model.named_modules()}
    for name, layer in injected(adapted.model).items():
        key = below_layer(name), tuple(_weight(layer).shape)
        group = found.setdefault(key, _Found([], [], []))
        ranks = unequal.get(f"{names[layer]}.lora_A.weight", [])
        group.layers.append(layer)
        group.ranks.append(ranks)
        group.places += _places(layer, ranks)
    for (name, shape), group in found.items():
        yield _row(adapted, name, shape, group)


def _row(adapted: MetaModel, name: str, shape: tuple[int, ...], group: _Found) -> Target:
    first = group.layers[0]
    experts = first.num_experts if isinstance(first, ParamWrapper) and first.num_experts > 1 else 0
    # An expert with a smaller rank than the largest stores zeros in its other rows, and never trains them.
    trained = stored = 0
    for layer, ranks in zip(group.layers, group.ranks, strict=True):
        numel = sum(weight.numel() for weight in _stored(layer))
        stored += numel
        trained += round(numel * sum(ranks) / (max(ranks) * len(ranks))) if ranks else numel
    return Target(
        name=name,
        part=_part(name, adapted.layout),
        kind="parameter" if isinstance(first, ParamWrapper) else "module",
        count=len(group.layers),
        experts=experts,
        weight_shape=shape,
        lora_a_shape=tuple(first.lora_A[ADAPTER_NAME].weight.shape),
        lora_b_shape=tuple(first.lora_B[ADAPTER_NAME].weight.shape),
        adapters=len(group.places),
        sharing="distinct" if len(set(group.places)) == len(group.places) else "shared",
        parameters=trained,
        bytes=stored * SINGLE,
    )


def _places(layer: LoraLayer, ranks: list[int]) -> Iterator[tuple[int, int]]:
    """Where the A of each pair begins: each expert's at its own rows."""
    weight = layer.lora_A[ADAPTER_NAME].weight
    experts = layer.num_experts if isinstance(layer, ParamWrapper) else 1
    by_expert = weight.view(experts, -1, weight.shape[1])
    for expert in range(experts):
        if not ranks or ranks[expert]:
            yield weight.untyped_storage()._cdata, by_expert[expert].storage_offset()


def _stored(layer: LoraLayer) -> Iterator[torch.Tensor]:
    for part in (layer.lora_A, layer.lora_B, layer.lora_magnitude_vector):
        yield from part.parameters()


def _weight(layer: LoraLayer) -> torch.Tensor:
    weight: torch.Tensor = layer.get_param() if isinstance(layer, ParamWrapper) else layer.get_base_layer().weight
    return weight


def _part(name: str, layout: ExpertLayout | None) -> Part:
    if layout is not None and name.startswith(f"{layout.experts_path}."):
        return "routed experts"
    if layout is not None and layout.shared_path is not None and name.startswith(f"{layout.shared_path}."):
        return "shared experts"
    return "trunk"


def _sums(rows: Sequence[Target]) -> Iterator[PartSum]:
    for part in dict.fromkeys(row.part for row in rows):
        mine = [row for row in rows if row.part == part]
        yield PartSum(
            part, sum(row.count for row in mine), sum(row.adapters for row in mine), sum(row.parameters for row in mine)
        )


def _setup(bits: Bits, checkpointing: bool) -> str:
    return f"{bits} bits" + (", checkpointing" if checkpointing else "")


def _cards(memory: Sequence[MemoryEstimate]) -> Iterator[Card]:
    for size in CARDS_GB:
        setups: dict[str, str | None] = {}
        for recipe in dict.fromkeys(each.recipe for each in memory):
            peaks = {(each.bits, each.checkpointing): each.peak_bytes for each in memory if each.recipe == recipe}
            fits = [setup for setup in SETUPS if peaks.get(setup, float("inf")) <= USABLE * size * 1e9]
            setups[recipe] = _setup(*fits[0]) if fits else None
        yield Card(size, setups)


def _recommended(
    parts: Sequence[PartSum], memory: Sequence[MemoryEstimate], layout: ExpertLayout | None
) -> Iterator[str]:
    """The setups that the figures recommend."""
    peaks = {(each.recipe, _setup(each.bits, each.checkpointing)): each.peak_bytes for each in memory}
    for recipe in dict.fromkeys(each.recipe for each in memory):
        card = next((card for card in _cards(memory) if card.setups[recipe] is not None), None)
        if card is None:
            least = min(peak for (its, _), peak in peaks.items() if its == recipe)
            yield (f"{recipe}: no single GPU of up to {CARDS_GB[-1]} GB is enough, it needs at least "
                   f"{least / 1e9:.1f} GB; choose a smaller batch, length or rank, or fewer targets")  # fmt: skip
        else:
            setup = card.setups[recipe] or ""
            yield f"{recipe}: one GPU of {card.memory_gb} GB, with {setup} ({peaks[recipe, setup] / 1e9:.1f} GB)"
    total = sum(part.parameters for part in parts)
    routed = sum(part.parameters for part in parts if part.part == "routed experts")
    if 2 * routed > total and routed < total:
        yield (f"routed experts are {routed / total:.0%} of the trainable parameters; plan trunk trains only "
               f"{total - routed:,}")  # fmt: skip
    if layout is not None and layout.peft_renames_mlp and any(each.bits == 4 for each in memory):
        yield (f"with 4 bits, the shared experts and dense layers of {layout.family} stay in 16 bits, because PEFT "
               "adapts them as parameters, not as modules")  # fmt: skip


def _adapter(options: argparse.Namespace) -> Adapter:
    body = json.loads(options.adapter)
    if not isinstance(body, dict):
        raise InvalidInput("--adapter", body, "a JSON object, the `adapter` block of a job")
    given = {"plan": options.plan, "rank": options.rank}
    return Adapter.model_validate({**body, **{key: value for key, value in given.items() if value is not None}})


def report_of(argv: Sequence[str] | None) -> Report:
    """The report that a command line asks for."""
    parser = argparse.ArgumentParser(
        prog="lora_report", description="Report what LoRA reaches in a model, and the memory of a job."
    )
    parser.add_argument("model", help="folder, config.json, name of a job, or hub id")
    parser.add_argument("--adapter", default="{}", help="the `adapter` block of a job, as JSON")
    parser.add_argument("--plan")
    parser.add_argument("--rank", type=int)
    parser.add_argument("--train-router", action="store_true")
    parser.add_argument("--bits", type=int, choices=(16, 4), help="bits of the base; left out: both")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--targets", help="decoder blocks that circuit breakers compare, e.g. 10,20")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--load", action="store_true")
    parser.add_argument("--images", type=int, help="images in each row; left out: one if the model sees images")
    parser.add_argument("--image-size", default=IMAGE_SIZE, help="pixels of each, as 1024x768")
    options = parser.parse_args(argv)
    return report(
        local_names.on_base(options.model)[0],
        _adapter(options),
        Moe(train_router=True if options.train_router else None),
        Batch(options.batch, options.length),
        (16, 4) if options.bits is None else (options.bits,),
        None if options.targets is None else tuple(sorted(set(numbers(options.targets)))),
        options.device,
        options.load,
        ExpectedImages(options.images, image_size(options.image_size)),
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Print the report as JSON, and return 0; or print the error, and return 2."""
    try:
        print(json.dumps(asdict(report_of(argv))))
    except ValidationError as error:
        problems = [f"adapter.{'.'.join(map(str, each['loc']))}: {shorten(each['input'])}: {reason(each)}"
                    for each in error.errors()]  # fmt: skip
        print(json.dumps({"error": "; ".join(problems)}))
        return 2
    except (MoeError, json.JSONDecodeError) as error:
        print(json.dumps({"error": str(error) if isinstance(error, MoeError) else f"--adapter: is not JSON: {error}"}))
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
