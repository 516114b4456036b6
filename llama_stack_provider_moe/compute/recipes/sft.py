"""Supervised fine-tuning: cross entropy over the answers' tokens (or all tokens), plus the routers' balance terms.

With a `distill` block the loss of a token also has the KL divergence from a teacher (`train.distill`).
"""

from collections.abc import Sequence
from dataclasses import asdict

from torch import Tensor, nn
from trl import SFTConfig, SFTTrainer

from llama_stack_provider_moe.compute.data.datasets import sft_rows
from llama_stack_provider_moe.compute.models.backend import backend_of
from llama_stack_provider_moe.compute.moe.derive import find_layout
from llama_stack_provider_moe.compute.planning.throughput import StepFlops, count_flops
from llama_stack_provider_moe.compute.runtime.context import Session
from llama_stack_provider_moe.compute.train.distill import Distillation, distillation_of
from llama_stack_provider_moe.compute.train.fit import arguments, fit
from llama_stack_provider_moe.compute.train.held_out import HeldOut
from llama_stack_provider_moe.compute.train.packing_probe import require_independent_rows
from llama_stack_provider_moe.compute.train.prepared import Batch, Loss, Prepared, prepare
from llama_stack_provider_moe.compute.train.step_figures import StepFigures
from llama_stack_provider_moe.compute.train.trainer import RecordingTrainer
from llama_stack_provider_moe.jobdir.folder import Manifest
from llama_stack_provider_moe.spec import SFTSpec


class SFT(RecordingTrainer, StepFigures, SFTTrainer):
    """TRL's trainer, on rows that are already tokenised and labelled."""

    loss_name = "ce"
    logs_domain_losses = True
    spec: SFTSpec
    distillation: Distillation | None = None

    def __init__(self, prepared: Prepared[SFTSpec], args: SFTConfig, distillation: Distillation | None) -> None:
        self.distillation = distillation
        super().__init__(prepared, args)
        self.teachers_work: StepFlops | None = None
        if distillation is not None and distillation.asked.model is not None and distillation.teacher is not None:
            self.teachers_work = count_flops(distillation.teacher, find_layout(distillation.teacher))
        if distillation is not None:
            self.loss_name = "distilled_loss"
            distillation.set_head(self.model, self._note_distillation)

    def step_flops(self) -> StepFlops:
        """The model's pass, and the teacher's where that is the same model."""
        asked = self.spec.distill
        return count_flops(self.model, self.layout, references=int(asked is not None and asked.model is None))

    def operations(self, lengths: Sequence[int]) -> float:
        """Operations of learning from rows of these lengths, with the pass of a teacher that is another model."""
        return super().operations(lengths) + (0.0 if self.teachers_work is None else self.teachers_work.of(lengths))

    def compute_loss(
        self, model: nn.Module, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Tensor | None = None
    ) -> Loss:
        """Ask the teacher first, if there is one; then see `RecordingTrainer.compute_loss`."""
        if self.distillation is not None:
            self.distillation.ask(self.model, inputs, self.accelerator.autocast())
        loss: Loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        return loss

    def _note_distillation(self) -> None:
        assert self.distillation is not None, "only its head calls this"
        figures = self._metrics["train" if self.model.training else "eval"]
        figures["ce"].append(self.distillation.ce)
        figures["distill_kl"].append(self.distillation.kl)

    def figure_weights(self, inputs: Batch) -> dict[str, float]:
        """The number of labelled tokens; the model's aux loss counts once for each micro-batch."""
        tokens = float(labelled(inputs))
        more = {} if self.distillation is None else {"ce": tokens, "distill_kl": tokens}
        return {"entropy": tokens, "mean_token_accuracy": tokens, "aux_loss": 1.0, **more}

    def tally(self, held_out: HeldOut, inputs: Batch, loss: float) -> None:
        """Add a micro-batch. TRL's loss is the mean over its labelled tokens; perplexity has no teacher's term."""
        tokens = labelled(inputs)
        ce = loss if self.distillation is None else self.distillation.ce
        held_out.loss += loss * tokens
        held_out.weight += tokens
        held_out.nll += ce * tokens
        held_out.tokens += tokens


def labelled(inputs: Batch) -> int:
    """The number of tokens of a batch that are predicted and have a label."""
    return int((inputs["labels"][:, 1:] != -100).sum())


def run(session: Session[SFTSpec]) -> Manifest:
    """Load the model, tokenise the rows, add the adapter, train, and save."""
    spec = session.spec
    base = backend_of(spec).load(session)
    distillation = distillation_of(session, base)
    prepared = prepare(session, base, sft_rows(session, base.tokenizer, base.vocabulary, base.images))
    gap = require_independent_rows(session, prepared.model) if spec.data.packed else None
    trainer = SFT(
        prepared,
        SFTConfig(
            **arguments(prepared),
            router_aux_loss_coef=base.resolved.models_aux_coef,
            packing=spec.data.packed,
            eval_packing=False,
            # Rows were cut to length when they were tokenised; for packing, TRL needs the length again.
            max_length=spec.options.max_length if spec.data.packed else None,
        ),
        distillation,
    )
    teacher = None if distillation is None else {"teacher": distillation.kind, **distillation.asked.model_dump()}
    decisions = {"packed_rows_differ_by": None if gap is None else asdict(gap), "distill": teacher}
    return fit(prepared, trainer, decisions)
