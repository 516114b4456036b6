"""Reward models (Ouyang et al. 2022, arXiv 2203.02155, section 3.5): a sequence classifier trained on pairs of answers.

The model's decoder layers stay, and a new head of one number replaces its output head. The reward is read at the last
token of a conversation as its chat template ends it, where grader `reward_model` reads it too. TRL's trainer has no
balance loss, and no classifier of transformers computes one; this package adds it where the job asks for one.
"""

from dataclasses import dataclass

from datasets import Dataset
from torch import Tensor, nn
from trl import RewardConfig, RewardTrainer
from trl.trainer.reward_trainer import DataCollatorForPreference

from llama_stack_provider_moe.compute.data.answers import RewardEncoder
from llama_stack_provider_moe.compute.data.batch_sharing import ungathered
from llama_stack_provider_moe.compute.data.datasets import dpo_rows
from llama_stack_provider_moe.compute.methods.reward import bradley_terry
from llama_stack_provider_moe.compute.models.determinism import without_dropout
from llama_stack_provider_moe.compute.models.prepare import load_base
from llama_stack_provider_moe.compute.moe.adapters import HEAD
from llama_stack_provider_moe.compute.planning.throughput import StepFlops, count_flops
from llama_stack_provider_moe.compute.runtime.context import Session
from llama_stack_provider_moe.compute.train.fit import arguments, fit
from llama_stack_provider_moe.compute.train.held_out import HeldOut
from llama_stack_provider_moe.compute.train.prepared import Batch, Loss, Prepared, prepare
from llama_stack_provider_moe.compute.train.row_means import RowMeans
from llama_stack_provider_moe.compute.train.step_figures import TOKENS, StepFigures
from llama_stack_provider_moe.jobdir.folder import Manifest
from llama_stack_provider_moe.spec import RewardSpec


@dataclass
class PairCollator(DataCollatorForPreference):
    """TRL's, on prompts and answers: the chosen conversations, then the rejected ones."""

    def torch_call(self, examples: list[dict[str, list[int]]]) -> Batch:
        """`input_ids` and `attention_mask`, (2 x pairs, tokens)."""
        answers = ("chosen_ids", "rejected_ids")
        whole = [{name: each["prompt_ids"] + each[name] for name in answers} for each in examples]
        batch: Batch = super().torch_call(whole)
        return batch


class NamedFigures(RewardTrainer):
    """TRL's trainer, with DPO's names of the figures, and none that is not a mean over pairs."""

    pair_nll: float = 0.0  # of the last micro-batch: its mean over pairs, in nats

    def compute_loss(
        self, model: nn.Module, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Tensor | None = None
    ) -> Loss:
        """TRL's loss, a mean over pairs."""
        with ungathered(self.accelerator):
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        chosen_B, rejected_B = outputs.logits.detach().squeeze(-1).float().chunk(2)
        self.pair_nll = bradley_terry(chosen_B, rejected_B).mean().item()
        figures = self._metrics["train" if self.model.training else "eval"]
        kept = {TOKENS: figures[TOKENS]}
        figures.clear()
        figures |= kept
        for name, each_B in (("chosen", chosen_B), ("rejected", rejected_B), ("margins", chosen_B - rejected_B),
                             ("accuracies", (chosen_B > rejected_B).float())):  # fmt: skip
            figures[f"rewards/{name}"] = [each_B.mean().item()]
        return (loss, outputs) if return_outputs else loss


class RewardModel(RowMeans, StepFigures, NamedFigures):
    """The recipe's trainer, on pairs that are already tokenised. The loss of a step is the mean over all its pairs."""

    loss_name = "preference_loss"
    router_aux_loss_coef = 0.0  # TRL's trainer adds no balance loss
    spec: RewardSpec

    def __init__(self, prepared: Prepared[RewardSpec], args: RewardConfig) -> None:
        collator = PairCollator(pad_token_id=prepared.base.tokenizer.pad_token_id)
        super().__init__(prepared, args, data_collator=collator)

    def _prepare_dataset(self, dataset: Dataset, *_: object) -> Dataset:
        """Return the rows as they are: TRL 1.16 would leave out those that it finds too long."""
        return dataset

    def step_flops(self) -> StepFlops:
        """The passes of the decoder layers; the head is one number for each token."""
        return count_flops(self.model, self.layout, head=False)

    def rows_of(self, inputs: Batch) -> int:
        """The number of pairs."""
        return int(inputs["input_ids"].shape[0]) // 2

    def figure_weights(self, inputs: Batch) -> dict[str, float]:
        """The number of pairs."""
        names = ("chosen", "rejected", "margins", "accuracies")
        return dict.fromkeys((f"rewards/{name}" for name in names), float(self.rows_of(inputs)))

    def tally(self, held_out: HeldOut, inputs: Batch, loss: float) -> None:
        """Add a micro-batch; `perplexity` is that of the order of a pair, 2 for a guess."""
        pairs = self.rows_of(inputs)
        held_out.loss += loss * pairs
        held_out.weight += pairs
        held_out.nll += self.pair_nll * pairs
        held_out.tokens += pairs


def run(session: Session[RewardSpec]) -> Manifest:
    """Load the model with a new head, tokenise the pairs, add the adapter, train, and save."""
    spec = session.spec
    base = load_base(session, classifier=True)
    without_dropout(base.model)
    rows = dpo_rows(session, base.tokenizer, base.vocabulary, kind=RewardEncoder)
    prepared = prepare(session, base, rows)
    trainer = RewardModel(
        prepared,
        RewardConfig(
            **arguments(prepared),
            center_rewards_coefficient=spec.center_rewards or None,
            disable_dropout=False,  # done above, because this would disable the adapter's dropout too
            max_length=None,  # rows were cut to length when they were tokenised
            remove_unused_columns=False,  # TRL does not know the columns that PairCollator reads
        ),
    )
    head = base.model.get_submodule(HEAD)
    trains = sum(weight.numel() for weight in head.parameters() if weight.requires_grad)
    assert trains, "the new head trains"
    decisions = {"head": HEAD, "center_rewards": spec.center_rewards}
    centred = f", and {spec.center_rewards:g} x (sum of both rewards)^2" if spec.center_rewards else ""
    shown = (
        f"reward    {type(base.model).__name__}: Bradley and Terry's loss{centred}; {HEAD} trains ({trains:,} numbers)"
    )
    return fit(prepared, trainer, decisions, shown)
