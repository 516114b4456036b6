"""Circuit breakers (Zou et al. 2024, arXiv 2406.04313): representations of one set are rerouted, of others retained.

    L = c_reroute * mean relu(cos(h, h_base))  on the rows of `data`
      + c_retain  * mean ||h - h_base||_2      on those of `circuit_breaker.retain` and `.safe`

at chosen decoder blocks. The base is the same model with its adapter off. RepBend (arXiv 2504.01550) has other losses
over the same passes; see `losses.breaker.bend_losses`.
"""

from dataclasses import replace
from typing import Any

from torch import Tensor
from transformers import TrainingArguments
from trl.trainer.utils import disable_dropout_in_model

from llama_stack_provider_moe.jobs.folder import Manifest
from llama_stack_provider_moe.spec import BreakerSpec
from llama_stack_provider_moe.training.breaker_plan import decide
from llama_stack_provider_moe.training.breaker_rows import breaker_rows
from llama_stack_provider_moe.training.breaker_trainer import BreakerTrainer
from llama_stack_provider_moe.training.mixture import PARTS, Collator, MixtureSampler, Part
from llama_stack_provider_moe.training.plan import announce
from llama_stack_provider_moe.training.sampling import rows_an_epoch
from llama_stack_provider_moe.training.session import Session
from llama_stack_provider_moe.training.sharing import Share
from llama_stack_provider_moe.training.stages import adapt, arguments, fit, load_base
from llama_stack_provider_moe.training.throughput import Work, work_of
from llama_stack_provider_moe.training.trainer import HeldOut, RecordingTrainer


class CircuitBreaker(RecordingTrainer, BreakerTrainer):
    """Our trainer, on rows of several sets."""

    spec: BreakerSpec

    def _get_train_sampler(self, train_dataset: Any = None) -> MixtureSampler:  # type: ignore[override]
        sets = (self.train_dataset if train_dataset is None else train_dataset).sets
        ratios: dict[Part, float] = {"retain": self.spec.circuit_breaker.retain.ratio}
        if self.spec.circuit_breaker.safe is not None:
            ratios["safe"] = self.spec.circuit_breaker.safe.ratio
        rows: dict[Part, int] = {part: len(each) for part, each in sets.items()}
        most = rows_an_epoch(self.spec.training, rows["break"], self.peers.size)
        return MixtureSampler(rows, ratios, most, self.spec.data.shuffle, self.spec.options.seed)

    def work_of_a_step(self) -> Work:
        """Two passes, no further than they run."""
        layers = None if self.plan.whole else max(self.plan.targets) + 1
        return work_of(self.model, self.layout, references=1, head=self.plan.logits, layers=layers)

    @property
    def shared_experts(self) -> bool:  # type: ignore[override]
        """Whether processes hold experts of their own."""
        return self.experts is not None

    def weigh(self, loss: Tensor, share: Share) -> Tensor:
        """The loss is this process's part of the step's already."""
        return loss * self.peers.size

    part_names = PARTS

    def parts(self, inputs: dict[str, Any]) -> dict[str, Tensor]:
        """Tokens of each set: routing is told of each."""
        here = inputs["part"].unique().tolist()
        return {PARTS[i]: inputs["attention_mask"] * (inputs["part"] == i).unsqueeze(-1) for i in here}

    def evaluate(self, *arguments: Any, **keywords: Any) -> dict[str, float]:
        """Cosines and distances of held-out rows, means over each set's tokens, and retained answers' perplexity."""
        metrics = super().evaluate(*arguments, **keywords)
        return {**metrics, **{f"eval_{name}": value for name, value in self.measured.items()}}

    def new_held_out(self) -> HeldOut:
        """Sums at zero."""
        self.measured: dict[str, float] = {}
        return HeldOut()

    def tally(self, held_out: HeldOut, inputs: dict[str, Any], loss: float) -> None:
        """Nothing: sums are kept by name, and read at the end."""

    def evaluation_loop(self, *arguments: Any, **keywords: Any) -> Any:
        """Transformers' loop over the held-out rows, then the means of what it summed."""
        outcome = super().evaluation_loop(*arguments, **keywords)
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
        """What checkpoints are compared by: both losses, weighed as at the schedule's end."""
        weights, block = self.plan.final(self.state.max_steps), self.spec.circuit_breaker
        if block.variant == "rr":
            loss = weights.reroute * found["positive_cosine/break"] + weights.retain * distance
        else:
            loss = distance / 2 - block.repbend.push * found["distance/break"]
        self.held_out.loss, self.held_out.weight = loss, 1.0
        self.held_out.nll, self.held_out.tokens = sums["nll"], sums["answer_tokens"]


def run(session: Session[BreakerSpec]) -> Manifest:
    """Load, adapt, batch, train, save."""
    base = load_base(session, models_loss=False)
    disable_dropout_in_model(base.model)
    plan = decide(session.spec, base.model, base.layout, base.resolved)
    spec = session.spec.model_copy(update={"adapter": plan.adapter})
    session = replace(session, spec=spec)
    if spec.loader == "unsloth":
        from llama_stack_provider_moe.training import unsloth_base  # in its own environment alone

        unsloth_base.states_are_the_models(base.model, {*plan.targets, *plan.retained_at}, spec.training.dtype)
        session.show("unsloth   hidden states by hooks agree with the model's own at every block that counts")
    rows = breaker_rows(session, base.tokenizer, base.vocabulary)
    model, report, rates = adapt(session, base)
    trainer = CircuitBreaker(
        spec=spec,
        peers=session.peers,
        experts=base.experts,
        layout=base.layout,
        resolved=base.resolved,
        shipped=base.shipped,
        steering=base.steering,
        rates=rates,
        plan=plan,
        model=model,
        args=TrainingArguments(**arguments(session, base), remove_unused_columns=False),
        data_collator=Collator(base.tokenizer.pad_token_id, spec.circuit_breaker.mask == "response"),
        train_dataset=rows.train,
        eval_dataset=rows.validation,
        processing_class=base.tokenizer,
    )
    sets = {part: len(each) for part, each in rows.train.sets.items()}
    steps = announce(session, base, report, rows, len(rows.train), {**plan.as_json(), "set_rows": sets})
    session.show(plan.text())
    return fit(session, base, trainer, steps)
