"""How much memory a training step takes at its peak, by recipe, bits of the base, and checkpointing.

The step is taken apart into terms, each of which stands in the answer:

    weights       the base as it is held: 2 bytes a number in bf16; in NF4 half a byte and 4 bytes a block of 64
    adapter       4 P, for P trainable parameters in fp32
    optimizer     8 P: AdamW's two moments, in fp32 as the parameters are; there from the second step on
    gradients     4 P at the end of backward; on the way there, those of the layers that backward has passed. Where all
                  weights train, P are they, and their gradients and moments are of their own dtype
    activations   what autograd keeps of the decoder layers: the sum of `Footprint.kept`, or with checkpointing the
                  input of each (tokens x hidden x 2 bytes)
    hidden_states of circuit breakers: those of both passes at the target blocks, and the loss's copies in fp32
    routers       4 bytes an expert and token for the logits, and as many for their softmax in the aux loss
    working       the rest of what is alive at the peak: the layer at work (its forward again, with checkpointing),
                  masks and positions, or the output head with the tiles of logits that it makes
    decoded       4 bits, on a GPU: one fused weight of the experts, decoded as a list of matrices and joined
    buckets       several processes: what averages gradients beside them
    gathered      several processes: weights, gradients or tokens of others, while a layer or the head runs

    peak = weights + adapter + optimizer + max over moments of the step (the other terms at that moment)

The moments are the forward and backward of each layer, of the ends (embeddings and head), DPO's reference pass, and
the optimiser's step. With gradient accumulation all gradients are there at each of them. What no tensor holds is not in
it: the CUDA context (some 0.5 GiB), and what the allocator can't use for its fragments. `held` says what several
processes take in place of one.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from llama_stack_provider_moe.analysis.blank import Adapted, Bits
from llama_stack_provider_moe.analysis.dry_run import Device, DryRun, Footprint, Rehearsal
from llama_stack_provider_moe.analysis.held import NOTHING, Beside, Held, held, weights_of
from llama_stack_provider_moe.experts.layout import text_config, without_adapters

Recipe = Literal["sft", "dpo", "circuit_breaker"]
RECIPES: tuple[Recipe, ...] = ("sft", "dpo", "circuit_breaker")
HALF, SINGLE = 2, 4  # bytes of a number
# TRL 1.16 makes logits in tiles of so many tokens and so much of the vocabulary, whatever its size.
_TILE_TOKENS, _TILE_WIDTH = 4096, 32768


@dataclass(frozen=True)
class Terms:
    """Bytes, at one moment of a step."""

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

    @property
    def total(self) -> int:
        """Their sum."""
        return sum(vars(self).values())


@dataclass(frozen=True)
class Estimate:
    """The peak of one recipe's step.

    Attributes:
        moment: where in the step it is.
        terms: what it is made of.
    """

    recipe: Recipe
    bits: Bits
    checkpointing: bool
    peak_bytes: int
    moment: str
    terms: Terms

    @property
    def static_bytes(self) -> int:
        """What is there all the time."""
        return self.terms.weights + self.terms.adapter + self.terms.optimizer


@dataclass(frozen=True)
class Batch:
    """A micro-batch: of `sequences` (DPO: pairs; circuit breakers: of each of two sets), padded to `length` tokens."""

    sequences: int
    length: int


def estimate(adapted: Adapted, bits: Bits, batch: Batch, targets: tuple[int, ...], device: Device) -> list[Estimate]:
    """Each recipe, without and with checkpointing.

    Args:
        adapted: on the meta device, at `bits`; its weights become fake.
        targets: decoder blocks, counted from 0, whose outputs circuit breakers compare.
        device: that trains: which way its kernels go.
    """
    static = held(weights_of(adapted), "ddp", 1, moments=2)
    rehearsal = Rehearsal(adapted.model, device)
    found = []
    for recipe in RECIPES:
        run = rehearse(rehearsal, adapted, recipe, batch, device)
        step = step_of(adapted, recipe, run, targets, batch, bits, device)
        found += [step.peak(static, bits, checkpointing) for checkpointing in (False, True)]
    return found


def rehearse(rehearsal: Rehearsal, adapted: Adapted, recipe: Recipe, batch: Batch, device: Device) -> DryRun:
    """A micro-batch of a recipe without numbers, its output head as on `device`."""
    factor = 2 if recipe == "dpo" else 1
    # On a GPU the tiled head runs Triton's kernels, whose memory is a formula; else it is run with the rest.
    tiled = device == "cuda" and not rehearsal.plain_head and recipe != "circuit_breaker"
    with_head = not tiled and recipe != "circuit_breaker"
    run = rehearsal.run(factor * batch.sequences, batch.length, with_head=with_head)
    if not tiled:
        return run
    head = without_adapters(adapted.model).get_output_embeddings().weight
    tokens, hidden = factor * batch.sequences * (batch.length - 1), text_config(adapted.model).hidden_size
    trained = head.numel() if head.requires_grad else 0
    return replace(run, ends=_with_tiles(run.ends, tokens, hidden, rehearsal.dtype.itemsize, trained))


def step_of(
    adapted: Adapted,
    recipe: Recipe,
    run: DryRun,
    targets: tuple[int, ...],
    batch: Batch,
    bits: Bits,
    device: Device,
) -> "Step":
    """A step of one process alone."""
    decoded = 2 * adapted.largest_expert_weight if bits < 16 and device == "cuda" else 0
    return Step(recipe, run, targets, _router_bytes(adapted, batch, recipe), decoded, in_place=device == "cuda")


def hidden_state_bytes(layers: int, hidden: int, batch: Batch) -> int:
    """Of the outputs of so many decoder blocks, in bf16."""
    return layers * batch.sequences * batch.length * hidden * HALF


def _with_tiles(trunk: Footprint, tokens: int, hidden: int, size: int, trained: int) -> Footprint:
    """The model's ends with TRL's head: a copy of its input, a tile of logits, and in backward gradients in fp32.

    Args:
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


def _router_bytes(adapted: Adapted, batch: Batch, recipe: Recipe) -> int:
    layout, resolved = adapted.layout, adapted.resolved
    if layout is None or recipe == "circuit_breaker":
        return 0
    tokens = batch.sequences * batch.length * (2 if recipe == "dpo" else 1)
    tensors = 2 if resolved.aux_coef and resolved.output_router_logits else 1
    return tensors * len(layout.moe_layers) * tokens * layout.num_experts * SINGLE


@dataclass(frozen=True)
class Step:
    """A step's moments.

    Attributes:
        targets: of circuit breakers.
        routers: bytes of logits.
        decoded: bytes of what of a 4-bit base is decoded at once.
        in_place: the optimiser's step makes nothing as large as a weight.
        accumulates: gradients of earlier micro-batches are there.
        beside: what a strategy takes.
        reference: of DPO's passes, one of them is the reference's.
    """

    recipe: Recipe
    run: DryRun
    targets: tuple[int, ...]
    routers: int
    decoded: int
    in_place: bool
    accumulates: bool = False
    beside: Beside = NOTHING
    reference: bool = True

    def peak(self, held: Held, bits: Bits, checkpointing: bool) -> Estimate:
        """The moment that takes most, above what is there all the time."""
        # AdamW's step on a CPU makes two tensors as large as the weight at hand; on a GPU it is one kernel.
        scratch = 0 if self.in_place else 2 * held.largest
        found = list(self.moments(checkpointing, scratch))
        if self.accumulates:
            found = [(where, replace(terms, gradients=held.gradients)) for where, terms in found]
        moment, terms = max(found, key=lambda each: each[1].total)
        terms = replace(
            terms, weights=held.weights, adapter=held.adapter, optimizer=held.optimizer, buckets=held.buckets
        )
        return Estimate(self.recipe, bits, checkpointing, terms.total, moment, terms)

    def moments(self, checkpointing: bool, scratch: int) -> Iterator[tuple[str, Terms]]:
        """(where, terms) of all moments at which the peak may be."""
        breaker = self.recipe == "circuit_breaker"
        # Of circuit breakers two passes with gradient are held at once, and nothing above the last target is run.
        layers = self.run.layers[: max(self.targets) + 1] if breaker else self.run.layers
        passes = 2 if breaker else 1
        ends = self.run.ends
        kept = [layer.output if checkpointing else layer.kept for layer in layers]
        held = sum(kept)
        base = Terms(routers=self.routers, hidden_states=self._hidden_states(layers[0].output) if breaker else 0)
        for number, layer in enumerate(layers):
            below = sum(kept[:number]) + (passes - 1) * held
            ready = Terms(gradients=sum(above.gradients for above in layers[number + 1 :]), decoded=self.decoded)
            backward = max(layer.backward, layer.forward + layer.output if checkpointing else 0)
            # `backward` holds what is kept of the layer itself; with checkpointing its input is among that.
            yield f"backward of layer {number}", replace(
                base, activations=below, working=passes * self.run.shared + backward, gradients=ready.gradients,
                decoded=ready.decoded, gathered=self.beside.layer + self.beside.reducing,
            )  # fmt: skip
            if not checkpointing:
                yield (
                    f"forward of layer {number}",
                    replace(
                        base, activations=below, working=passes * self.run.shared + layer.forward,
                        decoded=self.decoded, gathered=self.beside.layer,
                    ),
                )  # fmt: skip
        all_held = replace(base, activations=passes * held)
        if not breaker:
            yield "head, forward", replace(all_held, working=ends.forward, gathered=self.beside.head)
            gathered = self.beside.head + self.beside.ahead
            yield "head, backward", replace(all_held, working=ends.backward, gathered=gathered)
        if self.recipe == "dpo" and self.reference:
            alone = self.run.shared + max(layer.without_graph for layer in layers)
            for where, working, gathered in (
                ("reference's layers", alone, self.beside.layer + self.beside.head),
                ("reference's head", ends.without_graph, self.beside.head),
            ):
                yield (
                    where,
                    replace(all_held, working=ends.kept + working, decoded=self.decoded, gathered=gathered),
                )
        gradients = sum(layer.gradients for layer in self.run.layers) + ends.gradients
        yield "optimiser's step", Terms(gradients=gradients, working=scratch)

    def _hidden_states(self, output: int) -> int:
        """Of both sets, at each target: the base's, ours, and an fp32 copy of each that the loss's gradient needs."""
        return 2 * len(self.targets) * 2 * (output + 2 * output)
