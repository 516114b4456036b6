"""Circuit breakers (Zou et al. 2024, arXiv 2406.04313): reroute the representations of one data set, retain others'.

    L = c_reroute * mean relu(cos(h, h_base))  on the rows of `data`
      + c_retain  * mean ||h - h_base||_2      on those of `circuit_breaker.retain` and `.safe`

at chosen decoder blocks. The base is the same model with its adapter off. RepBend (arXiv 2504.01550) uses other losses
over the same passes; see `compute.methods.breaker.bend_losses`.
"""

from dataclasses import replace

from torch import Tensor
from transformers import TrainingArguments
from transformers.trainer_utils import EvalLoopOutput

from llama_stack_provider_moe.compute.data.breaker_rows import breaker_rows
from llama_stack_provider_moe.compute.data.mixture import PARTS, Collator, Mixture, MixtureSampler, Part
from llama_stack_provider_moe.compute.data.sampling import rows_an_epoch
from llama_stack_provider_moe.compute.methods.breaker_plan import decide
from llama_stack_provider_moe.compute.models.backend import backend_of
from llama_stack_provider_moe.compute.models.determinism import require_determinism, without_dropout
from llama_stack_provider_moe.compute.planning.throughput import StepFlops, count_flops
from llama_stack_provider_moe.compute.recipes.circuit_breaker.trainer import BreakerTrainer
from llama_stack_provider_moe.compute.runtime.context import Session
from llama_stack_provider_moe.compute.train.fit import arguments, fit
from llama_stack_provider_moe.compute.train.held_out import HeldOut
from llama_stack_provider_moe.compute.train.prepared import Batch, prepare
from llama_stack_provider_moe.compute.train.trainer import RecordingTrainer
from llama_stack_provider_moe.jobdir.folder import Manifest
from llama_stack_provider_moe.spec import BreakerSpec


class CircuitBreakerTrainer(RecordingTrainer, BreakerTrainer):
    """Our trainer, on rows of several data sets."""

    loss_name = "breaker_loss"
    spec: BreakerSpec

    def _get_train_sampler(self, train_dataset: Mixture | None = None) -> MixtureSampler:  # type: ignore[override]
        sets = (self.train_dataset if train_dataset is None else train_dataset).sets
        ratios: dict[Part, float] = {"retain": self.spec.circuit_breaker.retain.ratio}
        if self.spec.circuit_breaker.safe is not None:
            ratios["safe"] = self.spec.circuit_breaker.safe.ratio
        rows: dict[Part, int] = {part: len(each) for part, each in sets.items()}
        most = rows_an_epoch(self.spec.training, rows["break"], self.peers.size)
        return MixtureSampler(rows, ratios, most, self.spec.data.shuffle, self.spec.options.seed)

    def step_flops(self) -> StepFlops:
        """Two passes, up to the last block that the losses need."""
        layers = None if self.plan.whole else max(self.plan.targets) + 1
        return count_flops(self.model, self.layout, references=1, head=self.plan.logits, layers=layers)

    @property
    def shared_experts(self) -> bool:  # type: ignore[override]
        """Whether each process holds other experts."""
        return self.experts is not None

    def weigh(self, loss: Tensor, inputs: Batch, num_items_in_batch: Tensor | None) -> Tensor:
        """Undo the mean over processes: the loss is already this process's part of the step's."""
        return loss * self.peers.size

    part_names = PARTS
    logs_balance = False

    def parts(self, inputs: Batch) -> dict[str, Tensor]:
        """The tokens of each data set, whose routing is reported separately."""
        here = sorted(set(inputs["part"].tolist()))
        return {PARTS[i]: inputs["attention_mask"] * (inputs["part"] == i).unsqueeze(-1) for i in here}

    def evaluate(self, *arguments: object, **keywords: object) -> dict[str, float]:
        """Mean cosines and distances over the held-out tokens of each data set, and retained answers' perplexity."""
        metrics = super().evaluate(*arguments, **keywords)
        return {**metrics, **{f"eval_{name}": value for name, value in self.measured.items()}}

    def new_held_out(self) -> HeldOut:
        """Start an evaluation: forget the last one's figures."""
        self.measured: dict[str, float] = {}
        return HeldOut()

    def tally(self, held_out: HeldOut, inputs: Batch, loss: float) -> None:
        """Do nothing: `prediction_step` keeps its own sums."""

    def evaluation_loop(self, *arguments: object, **keywords: object) -> EvalLoopOutput:
        """Run transformers' loop over the held-out rows, then turn its sums into means."""
        outcome: EvalLoopOutput = super().evaluation_loop(*arguments, **keywords)
        self.measured = self._means(self.sums.take(self.peers))
        return outcome

    def _means(self, sums: dict[str, float]) -> dict[str, float]:
        tokens = {str(part): sums[f"tokens/{part}"] for part in PARTS if f"tokens/{part}" in sums}
        found = {
            name: value / tokens[name.split("/")[1]]
            for name, value in sums.items()
            if name.startswith(("cosine/", "positive_cosine/", "distance/", "relative_distance/"))
        }
        kept = [part for part in tokens if part != "break"]
        distance = sum(sums[f"distance/{part}"] for part in kept) / sum(tokens[part] for part in kept)
        self._as_held_out(found, distance, sums)
        return found

    def _as_held_out(self, found: dict[str, float], distance: float, sums: dict[str, float]) -> None:
        """Set the figure that checkpoints are compared by: both losses, weighted as at the schedule's end."""
        weights, block = self.plan.final(self.state.max_steps), self.spec.circuit_breaker
        if block.variant == "rr":
            loss = weights.reroute * found["positive_cosine/break"] + weights.retain * distance
        else:
            loss = distance / 2 - block.repbend.push * found["distance/break"]
        self.held_out.loss, self.held_out.weight = loss, 1.0
        self.held_out.nll, self.held_out.tokens = sums["nll"], sums["answer_tokens"]


def run(session: Session[BreakerSpec]) -> Manifest:
    """Load the model, plan the blocks, tokenise the rows, add the adapter, train, and save."""
    backend = backend_of(session.spec)
    base = backend.load(session, models_loss=False)
    without_dropout(base.model)
    plan = decide(session.spec, base.model, base.layout, base.resolved)
    spec = session.spec.model_copy(update={"adapter": plan.adapter})
    session = replace(session, spec=spec)
    backend.check_hidden_states(session, base, {*plan.targets, *plan.retained_at})
    rows = breaker_rows(session, base.tokenizer, base.vocabulary)
    prepared = prepare(session, base, rows)
    held = require_determinism(session, prepared.model)
    trainer = CircuitBreakerTrainer(
        prepared,
        TrainingArguments(**arguments(prepared), remove_unused_columns=False),
        plan=plan,
        data_collator=Collator(base.tokenizer.pad_token_id, spec.circuit_breaker.mask == "response"),
    )
    sets = {part: len(each) for part, each in rows.train.sets.items()}
    decisions = {**plan.as_json(), "set_rows": sets, "held_in_evaluation_mode": held}
    return fit(prepared, trainer, decisions, plan.text())
