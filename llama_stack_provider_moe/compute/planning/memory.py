"""The peak memory of a training step, by recipe, bits of the base, and checkpointing.

The step is divided into terms, and the answer states each of them:

    weights       the base in its stored form: 2 bytes a number in bf16; in NF4 half a byte, plus 4 bytes a block of 64,
                  or with nested scales 1 byte a block and 4 for 256 blocks
    adapter       4 P, for P trainable parameters in fp32
    optimizer     8 P: AdamW's two moments, in fp32 as the parameters are; from the second step on. Other optimisers:
                  `optimizer_memory`
    gradients     4 P at the end of backward; before that, those of the layers that backward has passed. If all weights
                  train, P counts them, and their gradients and moments have their own dtype
    activations   what autograd keeps of the decoder layers: the sum of `Footprint.kept`, or with checkpointing the
                  input of each (tokens x hidden x 2 bytes)
    hidden_states for circuit breakers: those of both passes at the target blocks, and the loss's copies in fp32
    routers       4 bytes an expert and token for the logits, and as many for their softmax in the auxiliary loss
    working       everything else at the peak: the layer that runs (its forward again, with checkpointing), masks and
                  positions, or the output head with its tiles of logits
    decoded       4 bits, on a GPU: one fused weight of the experts, decoded; twice if its code has several parts, which
                  are decoded and joined
    buckets       several processes: the buffers that average gradients, in addition to the gradients
    gathered      several processes: weights, gradients or tokens of others, while a layer or the head runs
    cache         GRPO and distill: keys and values of the answers that the model writes, see `generation`
    vision        rows with images: pixels, and what a vision tower and its projector take, see `tower_memory`

    peak = weights + adapter + optimizer + max over moments of the step (the other terms at that moment)

The moments are the forward and backward of each layer, of the ends (embeddings and head), of a vision tower, DPO's
reference pass, the optimiser's step, and in GRPO and distill the pass over prompts and the last token of answers. With
gradient accumulation, all gradients exist at each moment of a step. Memory outside tensors is not included: the CUDA
context (some 0.5 GiB), and what the allocator can't use because of fragmentation. `per_process` counts what each of
several processes holds.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import get_args

from llama_stack_provider_moe.compute.moe.layout import outside_text, text_config, without_adapters
from llama_stack_provider_moe.compute.planning.dry_run import Device, DryRun, Footprint, Rehearsal
from llama_stack_provider_moe.compute.planning.generation import GenerationMemory
from llama_stack_provider_moe.compute.planning.meta_model import Bits, MetaModel
from llama_stack_provider_moe.compute.planning.per_process import (
    NOTHING,
    ProcessMemory,
    TransientMemory,
    process_memory,
    weights_of,
)
from llama_stack_provider_moe.compute.planning.teacher import TeacherMemory
from llama_stack_provider_moe.compute.planning.tower_inputs import RowImages
from llama_stack_provider_moe.compute.planning.tower_memory import TowerMemory
from llama_stack_provider_moe.compute.planning.vision_plan import VisionPlan, vision_plan
from llama_stack_provider_moe.spec import Optimizer, TrainingRecipe
from llama_stack_provider_moe.spec.recipes import no_images
from llama_stack_provider_moe.spec.row_sources import PAIRED

HALF, SINGLE = 2, 4  # bytes of a number
# TRL 1.16 computes logits in tiles of this many tokens and vocabulary entries, whatever the size of the vocabulary.
_TILE_TOKENS, _TILE_WIDTH = 4096, 32768
# The recipes that compute no logits of a vocabulary: of each token a classifier has one number.
_WITHOUT_LOGITS = ("circuit_breaker", "reward")


@dataclass(frozen=True)
class Terms:
    """Bytes at one moment of a step."""

    weights: int = 0
    adapter: int = 0
    optimizer: int = 0
    gradients: int = 0
    activations: int = 0
    hidden_states: int = 0
    routers: int = 0
    working: int = 0
    decoded: int = 0
    buckets: int = 0
    gathered: int = 0
    cache: int = 0
    vision: int = 0

    @property
    def total(self) -> int:
        """The sum of all terms."""
        return sum(vars(self).values())


@dataclass(frozen=True)
class MemoryEstimate:
    """The peak of one recipe's step.

    Attributes:
        moment: of the step, at which the peak is.
        terms: that the peak consists of.
        machine_bytes: of the optimiser's state that may lie in the machine's memory in place of the device's.
        offloaded_bytes: of experts that lie there.
    """

    recipe: TrainingRecipe
    bits: Bits
    checkpointing: bool
    peak_bytes: int
    moment: str
    terms: Terms
    machine_bytes: int = 0
    offloaded_bytes: int = 0

    @property
    def static_bytes(self) -> int:
        """The bytes that are needed all the time."""
        return self.terms.weights + self.terms.adapter + self.terms.optimizer


# Not `distill`, whose memory is its teacher's too: only a job names one, so `Planner` counts it.
REPORTED: tuple[TrainingRecipe, ...] = tuple(each for each in get_args(TrainingRecipe) if each != "distill")


@dataclass(frozen=True)
class Batch:
    """A micro-batch: `sequences` (DPO: pairs; circuit breakers: from each of two sets), padded to `length` tokens."""

    sequences: int
    length: int


def estimate(
    adapted: MetaModel,
    bits: Bits,
    batch: Batch,
    targets: tuple[int, ...],
    device: Device,
    images: RowImages | None = None,
) -> tuple[list[MemoryEstimate], VisionPlan | None]:
    """The peak of each recipe but `distill`, without and with checkpointing, and what images take in SFT.

    Args:
        adapted: a model on the meta device, at `bits`; its weights become fake.
        bits: of the base.
        batch: the micro-batch.
        targets: decoder blocks, counted from 0, whose outputs circuit breakers compare.
        device: that trains; it decides which kernels run.
        images: of the rows of recipes that take some; None: they have none.
    """
    static = process_memory(weights_of(adapted), "ddp", 1, Optimizer())
    rehearsal = Rehearsal(adapted.model, device)
    found, of_sft = [], None
    for recipe in REPORTED:
        run = rehearse(rehearsal, adapted, recipe, batch, device)
        step = step_of(adapted, recipe, run, targets, batch, bits, device)
        if images is not None and no_images(recipe) is None:
            vision = vision_plan(rehearsal, images, recipe, batch.sequences, batch.length)
            step, of_sft = replace(step, towers=vision.towers), of_sft or vision
        found += [step.peak(static, bits, checkpointing) for checkpointing in (False, True)]
    return found, of_sft


def rehearse(rehearsal: Rehearsal, adapted: MetaModel, recipe: TrainingRecipe, batch: Batch, device: Device) -> DryRun:
    """The dry run of a recipe's micro-batch, with the output head that `device` uses.

    Args:
        rehearsal: the model, ready to be measured.
        adapted: the same model.
        recipe: that trains.
        batch: the micro-batch.
        device: that trains.
    """
    factor = 2 if recipe in PAIRED else 1
    # On a GPU the tiled head runs Triton kernels, whose memory a formula gives; otherwise the dry run includes it.
    headless = recipe in _WITHOUT_LOGITS
    tiled = device == "cuda" and not rehearsal.plain_head and not headless
    with_head = not tiled and not headless
    run = rehearsal.run(factor * batch.sequences, batch.length, with_head=with_head)
    if not tiled:
        return run
    head = without_adapters(adapted.model).get_output_embeddings().weight
    tokens, hidden = factor * batch.sequences * (batch.length - 1), text_config(adapted.model).hidden_size
    trained = head.numel() if head.requires_grad else 0
    return replace(run, ends=_with_tiles(run.ends, tokens, hidden, rehearsal.dtype.itemsize, trained))


def step_of(
    adapted: MetaModel,
    recipe: TrainingRecipe,
    run: DryRun,
    targets: tuple[int, ...],
    batch: Batch,
    bits: Bits,
    device: Device,
) -> "StepMoments":
    """A step of a single process.

    Args:
        adapted: the model.
        recipe: that trains.
        run: dry run of its micro-batch.
        targets: decoder blocks whose outputs circuit breakers compare.
        batch: the micro-batch.
        bits: of the base.
        device: that trains.
    """
    decoded = adapted.decoded if bits < 16 and device == "cuda" else 0
    # This dry run leaves a vision tower out: its backward pass is the last, and leaves gradients with the others.
    beside = _vision_gradients(adapted)
    run = replace(run, ends=replace(run.ends, gradients=run.ends.gradients + beside))
    routers = _router_bytes(adapted, batch, recipe)
    return StepMoments(recipe, run, targets, routers, decoded, in_place=device == "cuda", of_vision=beside)


def hidden_state_bytes(layers: int, hidden: int, batch: Batch) -> int:
    """Bytes of the outputs of this many decoder blocks, in bf16."""
    return layers * batch.sequences * batch.length * hidden * HALF


def _with_tiles(trunk: Footprint, tokens: int, hidden: int, size: int, trained: int) -> Footprint:
    """The model's ends with TRL's head: a copy of its input, a tile of logits, and in backward gradients in fp32.

    Args:
        trunk: the ends without a head.
        tokens: that the head reads.
        hidden: width of the model.
        size: bytes of a number.
        trained: numbers of the head that train.
    """
    tile = min(tokens, _TILE_TOKENS) * _TILE_WIDTH * size
    copy, gradient = tokens * hidden * size, (tokens * hidden + trained) * (SINGLE + size)
    return Footprint(
        output=tokens * SINGLE,
        kept=trunk.kept + copy,
        forward=max(trunk.forward, trunk.kept + copy + tile),
        without_graph=max(trunk.without_graph, copy + tile),
        backward=max(trunk.backward, trunk.kept + copy + tile + gradient),
        gradients=trunk.gradients + trained * size,
    )


def _vision_gradients(adapted: MetaModel) -> int:
    """Bytes of the gradients of what trains beside the language model."""
    outside = outside_text(adapted.model)
    return sum(weight.numel() * weight.dtype.itemsize
               for name, weight in without_adapters(adapted.model).named_parameters()
               if name in outside and weight.requires_grad)  # fmt: skip


def _router_bytes(adapted: MetaModel, batch: Batch, recipe: TrainingRecipe) -> int:
    layout, resolved = adapted.layout, adapted.resolved
    if layout is None or recipe == "circuit_breaker":
        return 0
    tokens = batch.sequences * batch.length * (2 if recipe in PAIRED else 1)
    tensors = 2 if resolved.aux_coef and resolved.output_router_logits else 1
    return tensors * len(layout.moe_layers) * tokens * layout.num_experts * SINGLE


@dataclass(frozen=True)
class StepMoments:
    """The moments of a step.

    Attributes:
        recipe: that trains.
        run: dry run of a micro-batch.
        targets: decoder blocks whose outputs circuit breakers compare.
        routers: bytes of router logits.
        decoded: bytes of a 4-bit base that are decoded at once.
        in_place: the optimiser's step runs on a GPU.
        accumulates: gradients of earlier micro-batches exist.
        transient: bytes that the strategy needs.
        reference: one of the passes of DPO or KTO is that of the reference.
        teacher: what the teacher of a job that distils takes.
        generation: what it takes to write answers.
        towers: what the vision tower takes, without and with checkpointing; None: no row has an image.
        of_vision: bytes of the gradients of tower and projector, which are among those of the ends.
    """

    recipe: TrainingRecipe
    run: DryRun
    targets: tuple[int, ...]
    routers: int
    decoded: int
    in_place: bool
    accumulates: bool = False
    transient: TransientMemory = NOTHING
    reference: bool = True
    teacher: TeacherMemory | None = None
    generation: GenerationMemory | None = None
    towers: tuple[TowerMemory, TowerMemory] | None = None
    of_vision: int = 0

    def peak(self, held: ProcessMemory, bits: Bits, checkpointing: bool) -> MemoryEstimate:
        """The moment that takes the most, in addition to what is needed all the time."""
        on_gpu, on_cpu = held.step
        found = list(self.moments(checkpointing, on_gpu if self.in_place else on_cpu))
        if self.accumulates:
            found = [(where, replace(terms, gradients=held.gradients)) for where, terms in found]
        found += self._generating()
        moment, terms = max(found, key=lambda each: each[1].total)
        terms = replace(
            terms, weights=held.weights, adapter=held.adapter, optimizer=held.optimizer, buckets=held.buckets
        )
        return MemoryEstimate(self.recipe, bits, checkpointing, terms.total, moment, terms, held.lent, held.offloaded)

    def moments(self, checkpointing: bool, scratch: int) -> Iterator[tuple[str, Terms]]:
        """(name, terms) of all moments at which the peak may be."""
        breaker = self.recipe == "circuit_breaker"
        # Circuit breakers hold two passes with gradients at once, and run nothing above the last target.
        layers = self.run.layers[: max(self.targets) + 1] if breaker else self.run.layers
        passes = 2 if breaker else 1
        ends = self.run.ends
        kept = [layer.output if checkpointing else layer.kept for layer in layers]
        held = sum(kept)
        tower = None if self.towers is None else self.towers[checkpointing]
        held_of_tower, kept_of_tower = (tower.inputs + tower.held, tower.inputs + tower.kept) if tower else (0, 0)
        hidden_states = self._hidden_states(layers[0].output) if breaker else 0
        base = Terms(routers=self.routers, hidden_states=hidden_states, vision=held_of_tower)
        for number, layer in enumerate(layers):
            below = sum(kept[:number]) + (passes - 1) * held
            ready = Terms(gradients=sum(above.gradients for above in layers[number + 1 :]), decoded=self.decoded)
            backward = max(layer.backward, layer.forward + layer.output if checkpointing else 0)
            # `backward` includes what is kept of the layer itself, and with checkpointing also its input.
            yield f"backward of layer {number}", replace(
                base, activations=below, working=passes * self.run.shared + backward, gradients=ready.gradients,
                decoded=ready.decoded, gathered=self.transient.layer + self.transient.reducing, vision=kept_of_tower,
            )  # fmt: skip
            if not checkpointing:
                yield (
                    f"forward of layer {number}",
                    replace(
                        base, activations=below, working=passes * self.run.shared + layer.forward,
                        decoded=self.decoded, gathered=self.transient.layer,
                    ),
                )  # fmt: skip
        all_held = replace(base, activations=passes * held)
        if not breaker:
            compared = 0 if self.teacher is None else self.teacher.logits + self.teacher.compared
            yield "head, forward", replace(all_held, working=ends.forward + compared, gathered=self.transient.head)
            gathered = self.transient.head + self.transient.ahead
            working = ends.backward + compared
            yield "head, backward", replace(all_held, working=working, gathered=gathered, vision=kept_of_tower)
        if self.recipe in ("dpo", "kto") and self.reference:
            alone = self.run.shared + max(layer.without_graph for layer in layers)
            if tower is not None:
                all_held = replace(all_held, vision=kept_of_tower + tower.held_alone)
            for where, working, gathered in (
                ("reference's layers", alone, self.transient.layer + self.transient.head),
                ("reference's head", ends.without_graph, self.transient.head),
            ):
                yield (
                    where,
                    replace(all_held, working=ends.kept + working, decoded=self.decoded, gathered=gathered),
                )
        gradients = sum(layer.gradients for layer in self.run.layers) + ends.gradients
        if tower is not None:
            yield from self._of_tower(tower, all_held, gradients - self.of_vision)
        yield "optimiser's step", Terms(gradients=gradients, working=scratch)

    def _of_tower(self, tower: TowerMemory, all_held: Terms, gradients: int) -> Iterator[tuple[str, Terms]]:
        """The moments of a vision tower: before the language model's pass, and after it.

        Args:
            tower: what it takes.
            all_held: what exists when the reference's pass begins.
            gradients: bytes of the language model's.
        """
        yield "vision tower, forward", Terms(vision=tower.inputs + tower.forward)
        if tower.backward:
            yield "vision tower, backward", Terms(vision=tower.inputs + tower.backward, gradients=gradients)
        if self.recipe in ("dpo", "kto") and self.reference:
            taken = replace(all_held, working=self.run.ends.kept, vision=tower.inputs + tower.kept + tower.alone)
            yield "reference's vision tower", taken

    def _generating(self) -> Iterator[tuple[str, Terms]]:
        """The moments of writing answers, before a step has gradients."""
        made = self.generation
        if made is None:
            return
        layers = self.run.layers
        prompts = self.run.shared + layers[0].output + max(layer.without_graph for layer in layers)
        yield (
            "prompts of answers",
            Terms(cache=made.prompts, working=int(made.share * prompts) + made.logits, decoded=self.decoded),
        )
        yield "last token of answers", Terms(cache=made.answers, working=made.layer + made.logits, decoded=self.decoded)

    def _hidden_states(self, output: int) -> int:
        """For both sets, at each target: the base's, ours, and an fp32 copy of each that the loss's gradient needs."""
        return 2 * len(self.targets) * 2 * (output + 2 * output)
