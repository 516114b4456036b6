"""A transformers Trainer with the loss of circuit breakers, over batches of break and retained rows.

The loss of a step is over all its tokens, whatever micro-batches they are in: 4 micro-batches of 2 rows give the same
loss as one of 8. The coefficients change with the optimiser steps.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import Trainer

from llama_stack_provider_moe.compute.data.batch_sharing import pop_share
from llama_stack_provider_moe.compute.data.mixture import PARTS
from llama_stack_provider_moe.compute.distributed.full_state import has_sharded_parameters
from llama_stack_provider_moe.compute.methods import breaker
from llama_stack_provider_moe.compute.methods.breaker_plan import BreakerPlan
from llama_stack_provider_moe.compute.models.hidden_states import Blocks
from llama_stack_provider_moe.compute.runtime.peers import ALONE, Peers
from llama_stack_provider_moe.compute.train.prepared import Batch, Loss, Outcome

States = dict[int, Tensor]


@dataclass
class PassResult:
    """The result of one pass.

    Attributes:
        states: hidden states (B, T, D) by block.
        logits: (R, T, V) of the retained rows; None where no loss needs them.
    """

    states: States
    logits: Tensor | None = None

    def at(self, blocks: tuple[int, ...], rows: slice) -> list[Tensor]:
        """The hidden states of some rows, block by block."""
        return [self.states[block][rows] for block in blocks]


@dataclass
class Sums:
    """Named sums of a step or an evaluation. They stay on the device until they are read."""

    values: dict[str, Tensor] = field(default_factory=dict)

    def add(self, name: str, value: Tensor) -> None:
        """Add to the sum `name`."""
        value = value.detach().float()
        self.values[name] = self.values[name] + value if name in self.values else value

    def take(self, peers: Peers) -> dict[str, float]:
        """Return all sums over all processes, and reset them to zero."""
        values, self.values = self.values, {}
        found = {name: value.item() for name, value in values.items()}
        names = peers.union(found)
        return dict(zip(names, peers.sums([found.get(name, 0.0) for name in names]), strict=True))


class BreakerTrainer(Trainer):
    """Computes the loss in training, and the figures of held-out rows.

    Args:
        plan: blocks, coefficients and adapter.
        model: with its adapter on; with it off, it is the reference.
        arguments: transformers' own.
    """

    router_aux_loss_coef = 0.0  # the model's own balance loss is never computed here
    peers: Peers = ALONE
    shared_experts: bool = False  # whether each process holds other experts

    def __init__(self, *, plan: BreakerPlan, model: PeftModel, **arguments: object) -> None:
        super().__init__(model=model, **arguments)
        assert isinstance(model, PeftModel), "the reference is the model with its adapter off"
        self.plan = plan
        self.blocks = Blocks(model)
        self.is_sharded = has_sharded_parameters(model)  # by FSDP2
        self.sums = Sums()
        self.tokens_seen = self.step_tokens = 0.0

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], Tensor | None]:
        """The micro-batches of a step, and counts over all processes: (P + 1,).

        The counts are the tokens of each data set, then the pairs of break rows in one micro-batch (`row_pairs`).
        """
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        counts = [
            torch.cat([counted(batch["counted"], batch["part"]), row_pairs(batch).reshape(1)]).to(device)
            for batch in batches
        ]
        return batches, self.peers.sum(torch.stack(counts).sum(dim=0)) if counts else None

    def compute_loss(
        self, model: nn.Module, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Tensor | None = None
    ) -> Loss:
        """The two losses of a micro-batch, times their coefficients; each is divided by its tokens in the whole step.

        Args:
            model: the trained model, or what wraps it (DDP).
            inputs: the micro-batch.
            return_outputs: unused.
            num_items_in_batch: (P + 1,), see `get_batch_samples`.
        """
        assert num_items_in_batch is not None, "the counts of the step"
        plan, tokens_P, pairs = self.plan, num_items_in_batch[:-1], num_items_in_batch[-1]
        coefficients = plan.coefficients(self.state.global_step + 1, self.state.max_steps)
        # The reference first: an adapter must not be switched off and on between a pass and its backward.
        with torch.no_grad(), self.model.disable_adapter():
            base = self._passed(inputs)
        mine = self._passed_through(model, inputs)
        rows = int((inputs["part"] == 0).sum())
        reroute, retain = self._losses(mine, base, inputs, rows, tokens_P, pairs)
        self._add_cosines(mine, base, inputs, tokens_P)
        self.sums.add("reroute_loss", reroute)
        self.sums.add("retain_loss", retain)
        if self.peers.size == 1 or inputs["counted"].any():  # not ballast
            self.step_tokens += float(inputs["attention_mask"].sum())
        return coefficients.reroute * reroute + coefficients.retain * retain + self._held(mine)

    def _held(self, mine: PassResult) -> Tensor | float:
        """Zero, but it puts a sharded model's last block into the graph where only its router has a part in the loss.

        FSDP2 gathers a block's weights for backward when the gradient of the block's output arrives; without this term
        there is none.
        """
        if not (self.is_sharded and self.plan.whole):
            return 0.0
        return 0.0 * mine.states[len(self.blocks.layers) - 1].flatten()[0]

    def _passed_through(self, model: nn.Module, inputs: Batch) -> PassResult:
        """`_passed` inside the forward of a wrapper (DDP), which else would not average the gradients."""
        if model is self.model:
            return self._passed(inputs)
        of_instance = vars(self.model).get("forward")  # accelerate sets one for autocast

        def forward(batch: Batch) -> tuple[States, Tensor | None]:
            put_back()
            passed = self._passed(batch)
            return passed.states, passed.logits

        def put_back() -> None:
            self.model.__dict__.pop("forward", None)
            if of_instance is not None:
                self.model.forward = of_instance

        self.model.forward = forward
        try:
            return PassResult(*model(inputs))
        finally:
            put_back()

    def _passed(self, inputs: Batch) -> PassResult:
        """One pass over a micro-batch, up to the last block that its losses need."""
        wanted = {*self.plan.targets, *self.plan.retained_at}
        if self.is_sharded and self.plan.whole:
            wanted.add(len(self.blocks.layers) - 1)  # see `_held`
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        with self.accelerator.autocast():
            if not self.plan.logits:
                return PassResult(self.blocks.states(wanted, ids, mask, self.plan.whole))
            with self.blocks.kept(wanted) as states:
                logits = self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        return PassResult(states, logits[int((inputs["part"] == 0).sum()) :])

    def _losses(
        self, mine: PassResult, base: PassResult, inputs: Batch, rows: int, tokens_P: Tensor, pairs: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The loss of the break rows, which are the first `rows`, and of the others."""
        plan, mask = self.plan, inputs["counted"]
        first, rest = slice(0, rows), slice(rows, None)
        of_break, of_rest = tokens_P[0], tokens_P[1:].sum()
        here, there = mine.at(plan.targets, first), base.at(plan.targets, first)
        kept = breaker.retain_loss(
            mine.at(plan.retained_at, rest), base.at(plan.retained_at, rest), mask[rest], of_rest
        )
        if plan.block.variant == "rr":
            return breaker.reroute_loss(here, there, mask[first], of_break), kept
        weights = plan.block.repbend
        pushed = breaker.retain_loss(here, there, mask[first], of_break)
        alike = breaker.gathered(here, inputs["answer_at"][first]) * row_pairs(inputs) / pairs.clamp(min=1)
        kl = kept.new_zeros(())
        if mine.logits is not None and base.logits is not None:
            kl = breaker.kl_from_base(mine.logits, base.logits, mask[rest], of_rest)
        for name, value in (("push_distance", pushed), ("alike", alike), ("kl", kl), ("retain_distance", kept)):
            self.sums.add(name, value)
        return breaker.bend_losses(kept, pushed, alike, kl, weights.push, weights.gather, weights.kl)

    def _add_cosines(self, mine: PassResult, base: PassResult, inputs: Batch, tokens_P: Tensor) -> None:
        """Add each data set's mean cosine with the base at each target."""
        everything = slice(None)
        with torch.no_grad():
            found = breaker.cosines(mine.at(self.plan.targets, everything), base.at(self.plan.targets, everything))
            for index, part in enumerate(PARTS):
                mask = inputs["counted"] * (inputs["part"] == index).unsqueeze(-1)
                if not tokens_P[index]:
                    continue
                for block, cosine_BT in zip(self.plan.targets, found, strict=True):
                    self.sums.add(f"cosine/{part}/{block}", breaker.token_mean(cosine_BT, mask, tokens_P[index]))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the step's figures to the log."""
        if "loss" in logs:
            weights = self.plan.coefficients(self.state.global_step, self.state.max_steps)
            logs |= self.sums.take(self.peers)
            logs |= {"reroute_coefficient": weights.reroute, "retain_coefficient": weights.retain}
            self.tokens_seen += self.peers.sums([self.step_tokens])[0]
            self.step_tokens = 0.0
            logs["num_tokens"] = self.tokens_seen
        super().log(logs, start_time)

    def prediction_step(self, model: nn.Module, inputs: Batch, *_: object, **__: object) -> Outcome:
        """Add up figures of held-out rows. Retained rows go one by one, because a batch's logits would not fit."""
        inputs = self._prepare_inputs(inputs)
        pop_share(inputs)
        rows = int((inputs["part"] == 0).sum())
        breaks, retained = self._passes(rows, inputs["part"].shape[0] - rows)
        with torch.no_grad():
            if breaks:
                batch = {name: value[:rows] for name, value in inputs.items()} if rows else _idle(inputs, part=0)
                wanted = self.plan.targets
                self._measure(batch, self._states(batch, wanted), self._base_states(batch, wanted))
            for row in range(rows, rows + retained):
                self._measure_retained(_row(inputs, row) if row < inputs["part"].shape[0] else _idle(inputs, part=1))
        return torch.zeros(1, device=self.args.device), None, None

    def _passes(self, breaks: int, retained: int) -> tuple[bool, int]:
        """Whether to pass over break rows, and the number of passes over retained ones.

        Of a shared model no process can pass alone: experts in other processes run there, in as many passes.
        """
        if not (self.is_sharded or self.shared_experts):
            return breaks > 0, retained
        return self.peers.any(breaks > 0), int(self.peers.maximum(retained))

    def _states(self, batch: dict[str, Tensor], wanted: tuple[int, ...]) -> PassResult:
        with self.accelerator.autocast():
            return PassResult(self.blocks.states(wanted, batch["input_ids"], batch["attention_mask"]))

    def _base_states(self, batch: dict[str, Tensor], wanted: tuple[int, ...]) -> PassResult:
        with self.model.disable_adapter():
            return self._states(batch, wanted)

    def _measure_retained(self, row: dict[str, Tensor]) -> None:
        wanted = tuple(sorted({*self.plan.targets, *self.plan.retained_at}))
        ids, mask = row["input_ids"], row["attention_mask"]
        with self.accelerator.autocast(), self.blocks.kept(wanted) as states:
            logits_TV = self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits[0, :-1].float()
        labels_T = row["labels"][0, 1:]
        self.sums.add("nll", cross_entropy(logits_TV, labels_T, ignore_index=-100, reduction="sum"))
        self.sums.add("answer_tokens", (labels_T != -100).sum())
        self._measure(row, PassResult(states), self._base_states(row, wanted))

    def _measure(self, batch: dict[str, Tensor], mine: PassResult, base: PassResult) -> None:
        """Add up figures over tokens, by data set and block."""
        part, mask, plan = PARTS[int(batch["part"][0])], batch["counted"], self.plan
        one, everything = torch.ones((), device=mask.device), slice(None)
        self.sums.add(f"tokens/{part}", mask.sum())
        here, there = mine.at(plan.targets, everything), base.at(plan.targets, everything)
        for block, cosine_BT in zip(plan.targets, breaker.cosines(here, there), strict=True):
            self.sums.add(f"cosine/{part}/{block}", breaker.token_mean(cosine_BT, mask, one))
        self.sums.add(f"positive_cosine/{part}", breaker.reroute_loss(here, there, mask, one))
        kept = plan.targets if part == "break" else plan.retained_at
        still, was = mine.at(kept, everything), base.at(kept, everything)
        moved = breaker.distances(still, was)
        self.sums.add(f"distance/{part}", breaker.layer_means(moved, mask, one).mean())
        # A mean over each token's share: in some models the first token's norm dwarfs all others.
        shares = [far_BT / state.float().norm(dim=-1).clamp(min=1e-8) for far_BT, state in zip(moved, was, strict=True)]
        self.sums.add(f"relative_distance/{part}", breaker.layer_means(shares, mask, one).mean())


def _row(inputs: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    """One row without its padding."""
    length = int(inputs["attention_mask"][row].sum())
    return {
        name: value[row : row + 1, :length] if value.dim() > 1 else value[row : row + 1]
        for name, value in inputs.items()
    }


def _idle(inputs: dict[str, Tensor], part: int) -> dict[str, Tensor]:
    """A row of data set `part` that counts for nothing."""
    row = _row(inputs, 0)
    empty = {"labels": -100, "counted": 0, "part": part}
    return row | {name: torch.full_like(row[name], value) for name, value in empty.items()}


def counted(counted_BT: Tensor, part_B: Tensor) -> Tensor:
    """The number of tokens of each data set that count in the losses: (P,)."""
    parts_P = torch.arange(len(PARTS), device=part_B.device)
    return ((part_B[:, None] == parts_P) * counted_BT.sum(dim=1, keepdim=True)).sum(dim=0)


def row_pairs(batch: dict[str, Tensor]) -> Tensor:
    """The number of ordered pairs of break rows in a micro-batch, among rows that count."""
    rows = ((batch["part"] == 0) & batch["counted"].any(dim=1)).sum()
    return rows * (rows - 1)
