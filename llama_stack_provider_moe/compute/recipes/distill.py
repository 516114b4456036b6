"""On-policy distillation (Agarwal et al. 2023, arXiv 2306.13649): the model's answers, a teacher's probabilities.

For each prompt the model writes an answer, and learns the teacher's probabilities at each of its tokens. The loss of a
step is the mean divergence over the tokens of its answers (`methods.distillation`), plus the routers' balance terms.

TRL's trainer writes the answers and divides them into micro-batches. It knows no balance loss, and its head multiplies
hidden states by `lm_head.weight`, which is not what each family computes and ignores an adapter on the head. Here both
models give their own logits, of the answers' tokens alone, which are compared `TILE` tokens at a time.

Shapes: B rows, C tokens of answers, T tokens of prompts and answers, N tokens of answers that count, n of a tile, V
vocabulary.
"""

import inspect
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from trl import DistillationConfig, DistillationTrainer

from llama_stack_provider_moe.compute.data.batch_sharing import Ballast
from llama_stack_provider_moe.compute.data.groups import Generations
from llama_stack_provider_moe.compute.data.prompt_rows import prompt_rows
from llama_stack_provider_moe.compute.methods.distillation import divergence_from_teacher, entropy_of
from llama_stack_provider_moe.compute.models.backend import backend_of
from llama_stack_provider_moe.compute.models.determinism import require_determinism, without_dropout
from llama_stack_provider_moe.compute.moe.derive import find_layout
from llama_stack_provider_moe.compute.planning.teacher import TILE
from llama_stack_provider_moe.compute.planning.throughput import count_flops
from llama_stack_provider_moe.compute.recipes.on_policy.held_out import HeldOutAnswers
from llama_stack_provider_moe.compute.recipes.on_policy.trainer import WritingTrainer
from llama_stack_provider_moe.compute.runtime.context import Session
from llama_stack_provider_moe.compute.train.distill import load_teacher
from llama_stack_provider_moe.compute.train.fit import arguments, fit
from llama_stack_provider_moe.compute.train.held_out import HeldOut
from llama_stack_provider_moe.compute.train.prepared import Batch, Prepared, prepare
from llama_stack_provider_moe.errors import DataError
from llama_stack_provider_moe.jobdir.folder import Manifest
from llama_stack_provider_moe.jobdir.samples import GeneratedSample
from llama_stack_provider_moe.spec import DistillSpec

_DIVERGENCES = {0.0: "KL(teacher || model)", 1.0: "KL(model || teacher)", 0.5: "Jensen-Shannon divergence"}


class OnPolicyDistillation(WritingTrainer, DistillationTrainer):
    """TRL's trainer, on prompts that are already tokenised.

    Args:
        prepared: model and prompts.
        args: TRL's.
        generations: of an epoch.
        teacher: frozen, in evaluation mode. TRL gets none: it would run it under a wrapper of its own.
    """

    loss_name = "divergence"
    aux_loss_enabled = False  # of a dense model
    spec: DistillSpec

    def __init__(
        self,
        prepared: Prepared[DistillSpec],
        args: DistillationConfig,
        generations: Generations,
        teacher: PreTrainedModel,
    ) -> None:
        super().__init__(prepared, args, generations)
        self.router_aux_loss_coef = prepared.base.resolved.models_aux_coef
        self.teacher = teacher
        self.teachers_work = count_flops(teacher, find_layout(teacher))
        self._answers: list[GeneratedSample] = []  # of the newest generation
        self._entropy, self._tokens = 0.0, 0.0  # sums over this process's micro-batches of a step
        # Classes that can leave out the logits of prompts; others compute them for nothing.
        self._keeps = [takes_logits_to_keep(each) for each in (prepared.base.model, teacher)]

    def operations(self, lengths: Sequence[int]) -> float:
        """Operations of learning from rows of these lengths, with the teacher's pass."""
        return super().operations(lengths) + self.teachers_work.of(lengths)

    def _generate_and_score_completions(self, inputs: Sequence[Mapping[str, object] | Ballast]) -> Batch:
        rows = self.begin_generation(inputs)
        batch: Batch = super()._generate_and_score_completions(rows)
        self.end_generation(batch)
        self._answers = self._written(batch, [str(row["prompt"]) for row in rows])
        if self.model.training:
            self.keep(self._answers)
        return batch

    def _generate_single_turn(self, prompt_ids: list[list[int]], *arguments: object, **keywords: object) -> object:
        with self.writing():
            return super()._generate_single_turn(prompt_ids, *arguments, **keywords)

    def _written(self, batch: Batch, prompts: Sequence[str]) -> list[GeneratedSample]:
        """The answers, before TRL shuffles them."""
        ends = {*self.eos_token_ids, self.processing_class.pad_token_id}
        answers = [
            ids[mask.bool()].tolist()
            for ids, mask in zip(batch["completion_ids"], batch["completion_mask"], strict=True)
        ]
        texts = self.processing_class.batch_decode(answers, skip_special_tokens=True)
        return [
            GeneratedSample(
                step=self.state.global_step + 1, group=at, prompt=prompt, completion=text, tokens=len(ids),
                truncated=ids[-1] not in ends, rewards={}, reward=None, advantage=None,
            )
            for at, (prompt, text, ids) in enumerate(
                zip(prompts, texts, answers, strict=True), start=self.peers.rank * len(prompts))
        ]  # fmt: skip

    def _compute_loss(
        self, model: nn.Module, inputs: Batch, num_items_in_batch: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Sum the divergence over a micro-batch's tokens, and divide it by those of the step, or by its own.

        Returns:
            The loss, the sum of the model's entropies, and the number of tokens.
        """
        ids_BT = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        mask_BT = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        counts_BC = inputs["completion_mask"].bool()
        keep = counts_BC.shape[1] + 1  # the logits of the token before each
        kept = [{"logits_to_keep": keep} if keeps else {} for keeps in self._keeps]
        passed: dict[str, object] = {"input_ids": ids_BT, "attention_mask": mask_BT, "use_cache": False}
        with torch.no_grad():
            theirs_NV = self.teacher(**passed, **kept[1]).logits[:, -keep:-1][counts_BC]
        balances = self.model.training and self.aux_loss_enabled and self.peers.size == 1
        mine = model(**passed, **kept[0], **({"output_router_logits": True} if balances else {}))
        mine_NV = mine.logits[:, -keep:-1][counts_BC]
        beta, temperature = self.spec.beta, self.spec.generation.temperature
        divergences, entropies = [], []
        for mine_nV, theirs_nV in zip(mine_NV.split(TILE), theirs_NV.split(TILE), strict=True):
            compared = (mine_nV, theirs_nV, beta, temperature)
            divergences.append(
                checkpoint(divergence_from_teacher, *compared, use_reentrant=False, preserve_rng_state=False)
            )
            with torch.no_grad():
                entropies.append(entropy_of(mine_nV, temperature))
        tokens = counts_BC.sum()
        loss = torch.cat(divergences).sum() / (tokens if num_items_in_batch is None else num_items_in_batch)
        if balances:
            part = 1 / self.current_gradient_accumulation_steps
            loss = loss + self.router_aux_loss_coef * part * mine.aux_loss.to(loss.device)
            self._metrics["train"]["aux_loss"].append(mine.aux_loss.item())
        entropy = torch.cat(entropies).sum()
        self._entropy += entropy.item()
        self._tokens += tokens.item()
        return loss, entropy, tokens

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Call TRL's, with the mean entropy of a step's tokens in place of the mean over its micro-batches."""
        if self.model.training and "loss" in logs:
            entropy, tokens = self.peers.sums([self._entropy, self._tokens])
            self._metrics["train"]["entropy"] = [entropy / tokens]
        self._entropy, self._tokens = 0.0, 0.0
        super().log(logs, start_time)

    def new_held_out(self) -> HeldOutAnswers:
        """The sums of a new evaluation."""
        return HeldOutAnswers()

    def tally(self, held_out: HeldOut, inputs: Batch, loss: float) -> None:
        """Add held-out answers: the loss is the mean over their tokens; their perplexity is by the model's entropy."""
        assert isinstance(held_out, HeldOutAnswers)
        for answer in self._answers:
            held_out.add_answer(answer.tokens, answer.truncated)
        held_out.loss += loss * self._counted
        held_out.weight += self._counted
        held_out.add_tokens(self._counted, {"entropy": self._metrics["eval"]["entropy"][-1]})


def takes_logits_to_keep(model: PreTrainedModel) -> bool:
    """Whether a model can leave out the logits of a sequence's first tokens."""
    return "logits_to_keep" in inspect.signature(type(model).forward).parameters


def run(session: Session[DistillSpec]) -> Manifest:
    """Load the model and its teacher, tokenise the prompts, add the adapter, train, and save."""
    spec, asked = session.spec, session.spec.generation
    base = backend_of(spec).load(session)
    without_dropout(base.model)
    teacher = load_teacher(spec.teacher, "teacher", spec.training.dtype, base)
    rows = prompt_rows(session, base.tokenizer, base.vocabulary)
    prepared = prepare(session, base, rows, answer=asked.max_completion_length)
    held = require_determinism(session, prepared.model)
    made = Generations.of_a_step(spec.training, len(rows.train), session.peers.size)
    if not made.count:
        raise DataError(f"dataset {spec.data.dataset_id!r}: has {len(rows.train)} prompts to train on; expected at "
                        f"least {made.prompts}, those of one step")  # fmt: skip
    trainer = OnPolicyDistillation(
        prepared,
        DistillationConfig(
            **arguments(prepared),
            beta=spec.beta,
            temperature=asked.temperature,
            top_p=asked.top_p,
            max_completion_length=asked.max_completion_length,
            disable_dropout=False,  # done above, because this would disable the adapter's dropout too
            remove_unused_columns=False,
            log_completions=False,  # answers are the user's data: `samples` keeps them
            use_vllm=False,
        ),
        made,
        teacher,
    )
    decisions = {"teacher": spec.teacher, "beta": spec.beta, "generation": asked.model_dump(),
                 "generations_per_epoch": made.count, "held_in_evaluation_mode": held}  # fmt: skip
    nbytes = sum(weight.nbytes for weight in teacher.parameters())
    left_out = f"; up to {made.prompts - 1} prompts of an epoch are left out" if made.prompts > 1 else ""
    shown = "\n".join([
        f"teacher   {spec.teacher}, {type(teacher).__name__}, {nbytes / 1e6:,.1f} MB more",
        f"generates {made.count:,} times an epoch, an answer of at most {asked.max_completion_length} tokens to each "
        f"of {made.prompts} prompts, temperature {asked.temperature:g}, top-p {asked.top_p:g}{left_out}",
        f"learns    {_DIVERGENCES.get(spec.beta, f'generalized Jensen-Shannon divergence, beta {spec.beta:g}')}",
    ])  # fmt: skip
    return fit(prepared, trainer, decisions, shown)
