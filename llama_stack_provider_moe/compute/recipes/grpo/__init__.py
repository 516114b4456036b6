"""Group relative policy optimisation (GRPO, arXiv 2402.03300) and the losses derived from it.

For each prompt the model writes a group of answers, and graders reward each. An answer's advantage is its reward less
the group's mean, divided by the group's standard deviation (or not, `rl.scale_rewards`). The loss of a token is
-min(r A, clip(r, 1 - epsilon, 1 + epsilon_high) A), where r is the probability of the token now divided by that when
it was written, plus `rl.beta` times the KL divergence from the model before training.

The reference is the model with its adapter off; if all weights train, a frozen copy.

Of several processes each writes and grades its part of a generation's answers, with random numbers of its own. What
follows from the rewards is over all of them: advantages, the steps that nothing is learnt from, and failed graders.
"""

import json
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from trl import GRPOConfig, GRPOTrainer
from trl.trainer.utils import add_fused_lm_head

from llama_stack_provider_moe.compute.data.batch_sharing import Ballast
from llama_stack_provider_moe.compute.data.groups import Generations
from llama_stack_provider_moe.compute.data.prompt_rows import prompt_rows
from llama_stack_provider_moe.compute.grading.opening import open_rewards
from llama_stack_provider_moe.compute.models.backend import backend_of
from llama_stack_provider_moe.compute.models.determinism import require_determinism, without_dropout
from llama_stack_provider_moe.compute.models.heads import needs_plain_head, set_plain_head
from llama_stack_provider_moe.compute.recipes.grpo.answering import AnsweringTrainer, opened, require_engine
from llama_stack_provider_moe.compute.recipes.grpo.held_out import HeldOutRewards
from llama_stack_provider_moe.compute.recipes.grpo.replaying import SHOWN, require_routing_replay
from llama_stack_provider_moe.compute.recipes.grpo.routes import Routes
from llama_stack_provider_moe.compute.recipes.grpo.safety import tell_unmeasured
from llama_stack_provider_moe.compute.recipes.grpo.shuffled import FIGURE, WARNING, shuffled
from llama_stack_provider_moe.compute.recipes.grpo.spread import Spread
from llama_stack_provider_moe.compute.recipes.on_policy import rollouts
from llama_stack_provider_moe.compute.recipes.on_policy.trainer import Row
from llama_stack_provider_moe.compute.runtime.context import Session
from llama_stack_provider_moe.compute.train.fit import arguments, fit
from llama_stack_provider_moe.compute.train.held_out import HeldOut
from llama_stack_provider_moe.compute.train.prepared import Batch, Prepared, prepare
from llama_stack_provider_moe.compute.train.reference import load_reference
from llama_stack_provider_moe.errors import DataError
from llama_stack_provider_moe.graders.panel import Graded, Panel
from llama_stack_provider_moe.graders.samples import Sample
from llama_stack_provider_moe.ground import liveness
from llama_stack_provider_moe.jobdir.folder import Manifest
from llama_stack_provider_moe.jobdir.samples import GeneratedSample
from llama_stack_provider_moe.spec import GRPOSpec
from llama_stack_provider_moe.spec.rl_engines import TransformersEngine


class GRPO(AnsweringTrainer, GRPOTrainer):
    """TRL's trainer, on prompts that are already tokenised, with the job's graders.

    Args:
        prepared: model and prompts.
        args: TRL's, with `beta` 0: TRL would load its own reference.
        panel: the job's graders.
        reference: a frozen copy of the model; None: the model with its adapter off, or no reference at all.
    """

    loss_name = "policy_loss"
    spec: GRPOSpec

    def __init__(
        self, prepared: Prepared[GRPOSpec], args: GRPOConfig, panel: Panel, reference: PreTrainedModel | None
    ) -> None:
        session = prepared.session
        rl = session.spec.rl
        self.panel = panel
        self.spread = Spread(session, rl.no_spread_generations)
        self._answers: list[Sample] = []  # of the generation that is being made
        self._graded: list[Graded] = []  # their rewards
        made = Generations.of(rl, session.spec.training, len(prepared.rows.train), session.peers.size)
        super().__init__(prepared, args, made, reward_funcs=[_named(name) for name in panel.names])
        self.beta = rl.beta
        self.ref_model = reference
        if self.layout is not None and rl.routing_replay != "off":
            assert self.recorder is not None
            self.routes = Routes(self.model, self.layout, rl.routing_replay, self.peers)
            self.recorder.own_choice = self.routes.own_choice
        if reference is not None:
            add_fused_lm_head(reference, temperature=rl.temperature)
            if needs_plain_head(reference, rl.temperature):
                set_plain_head(reference, rl.temperature)

    @property
    def sequences(self) -> int:
        """Answers that are learnt from in a full epoch, each as often as it is."""
        return super().sequences * self.spec.rl.n_iterations

    def _generate_and_score_completions(self, inputs: Sequence[Mapping[str, object] | Ballast]) -> Batch:
        rows = self.begin_generation(inputs)
        batch = super()._generate_and_score_completions(rows)
        self.end_generation(batch)
        if self.model.training:
            self._note_generation([str(row["prompt"]) for row in rows])
        return batch

    def _generate_single_turn(self, prompt_ids: list[list[int]], *arguments: object, **keywords: object) -> object:
        with self.writing():
            return super()._generate_single_turn(prompt_ids, *arguments, **keywords)

    def _calculate_rewards(
        self, inputs: Sequence[Row], prompts: Sequence[str], completions: Sequence[str], ids: Sequence[Sequence[int]]
    ) -> Tensor:
        """The value of each grader for each answer, (answers, graders); NaN where nothing is to be learnt from it."""
        ends = {*self.eos_token_ids, self.processing_class.pad_token_id}
        samples = [
            Sample(json.loads(str(row["item"])), text, len(each), each[-1] not in ends)
            for row, text, each in zip(inputs, completions, ids, strict=True)
        ]
        self._answers = [] if self._is_ballast else samples
        with liveness.stage("grading", len(self._answers), "answers"):
            self._graded = self.panel.grade(self._answers, limits_failures=False)
        # Each grader's failures in the order of one process's answers, so that all processes fail at the same one.
        told = self.peers.gathered(self.panel.failures(self._graded))
        self.panel.limit_failures([[*chain(*each)] for each in zip(*told, strict=True)])
        values = [
            [float("nan") if graded.total is None or value is None else value for value in graded.values.values()]
            for graded in self._graded
        ] or [[float("nan")] * len(self.panel.names) for _ in samples]
        found: Tensor = self.accelerator.gather(torch.tensor(values, dtype=torch.float32, device=self.args.device))
        rl = self.spec.rl
        if rl.shuffle_rewards and self.model.training:
            found, moved = shuffled(found, rl.n_generations, self.spec.options.seed, self.state.global_step + 1)
            self._metrics["train"][FIGURE].append(moved)
        return found

    def _note_generation(self, texts: Sequence[str]) -> None:
        step, size = self.state.global_step + 1, self.spec.rl.n_generations
        first = self.peers.rank * len(texts)
        advantages = list(self._logs["advantages"])[-len(texts) * self.peers.size :][first : first + len(texts)]
        kept = [
            GeneratedSample(
                step=step, group=at // size, prompt=text, completion=sample.output_text, tokens=sample.tokens or 0,
                truncated=sample.truncated, rewards=dict(graded.values), reward=graded.total, advantage=advantage,
                failures={name: f"{failure.code}: {failure.message}" for name, failure in graded.failures.items()},
            )
            for at, (text, sample, graded, advantage) in enumerate(
                zip(texts, self._answers, self._graded, advantages, strict=True), start=first)
        ]  # fmt: skip
        self.keep(kept)
        nothing = self._metrics["train"]["frac_reward_zero_std"][-1] == 1 or not self.peers.any(self._counted > 0)
        if self.spread.is_over(nothing, step):
            self.ended_by = "no_reward_spread"

    def new_held_out(self) -> HeldOutRewards:
        """The sums of a new evaluation."""
        return HeldOutRewards()

    def tally(self, held_out: HeldOut, inputs: Batch, loss: float) -> None:
        """Add held-out answers: their loss is their reward, negated; their perplexity is by their own entropy."""
        assert isinstance(held_out, HeldOutRewards)
        held_out.add_answers(self._answers, self._graded)
        figures = self._metrics["eval"]
        held_out.add_tokens(self._counted, {name: figures[name][-1] for name in ("entropy", "kl") if name in figures})

    def restore(self, model: nn.Module, folder: Path) -> None:
        """Read a checkpoint's weights, and the answers that the next steps learn from."""
        super().restore(model, folder)
        self.require_routes(rollouts.file_of(folder, self.peers.rank), self._buffered_inputs)


def _named(name: str) -> object:
    """What TRL takes for a reward function: it reads its name, and `GRPO._calculate_rewards` gives the values."""

    def reward(**_: object) -> list[float]:
        raise AssertionError("the graders give the rewards")

    reward.__name__ = name
    return reward


def run(session: Session[GRPOSpec]) -> Manifest:
    """Load the model and the graders, tokenise the prompts, add the adapter, train, and save."""
    spec = session.spec
    rl = spec.rl
    require_engine(spec)
    base = backend_of(spec).load(session)
    without_dropout(base.model)
    require_routing_replay(spec, base)
    rows = prompt_rows(session, base.tokenizer, base.vocabulary)
    prepared = prepare(session, base, rows, answer=rl.max_completion_length)
    held = require_determinism(session, prepared.model)
    made = Generations.of(rl, spec.training, len(rows.train), session.peers.size)
    if not made.count:
        raise DataError(f"dataset {spec.data.dataset_id!r}: has {len(rows.train)} prompts to train on; expected at "
                        f"least {made.prompts}, those of one generation")  # fmt: skip
    whole = spec.adapter is None and rl.beta > 0
    reference = load_reference(session, base) if whole else None
    low, high = rl.epsilons
    if rl.shuffle_rewards:
        session.say(WARNING, "warning")
    tell_unmeasured(spec, lambda text: session.say(text, "warning"))
    engine = rl.engine
    correction = {} if isinstance(engine, TransformersEngine) else {
        "vllm_importance_sampling_mode": engine.importance_sampling,
        "vllm_importance_sampling_clip_max": engine.importance_sampling_cap,
    }  # fmt: skip
    with (
        open_rewards(spec.reward, spec.grading, spec.training.dtype, base.device) as panel,
        opened(prepared) as found,
    ):
        trainer = GRPO(
            prepared,
            GRPOConfig(
                **arguments(prepared),
                router_aux_loss_coef=base.resolved.models_aux_coef,
                beta=0.0,
                use_bias_correction_kl=True,
                loss_type="grpo" if rl.loss == "gspo" else rl.loss,
                importance_sampling_level="sequence" if rl.loss == "gspo" else "token",
                epsilon=low,
                epsilon_high=high,
                num_generations=rl.n_generations,
                num_generations_eval=1,
                steps_per_generation=rl.steps_per_generation * spec.training.gradient_accumulation_steps,
                num_iterations=rl.n_iterations,
                temperature=rl.temperature,
                top_p=rl.top_p,
                max_completion_length=rl.max_completion_length,
                mask_truncated_completions=rl.mask_truncated,
                scale_rewards=rl.scale,
                multi_objective_aggregation="sum_then_normalize" if rl.combine == "sum" else "normalize_then_sum",
                reward_weights=panel.weights,
                disable_dropout=False,  # done above
                remove_unused_columns=False,
                log_completions=False,  # answers are the user's data: `samples` keeps them
                use_vllm=False,  # TRL's own needs the package vllm and NCCL; `AnsweringTrainer` gives what it would
                **correction,
            ),
            panel,
            reference,
        )
        kind = None if not rl.beta else "a second copy" if whole else "the adapter off"
        decisions = {
            "rl": {**rl.model_dump(), "epsilon": low, "epsilon_high": high, "scale_rewards": rl.scale},
            "reference": kind, "graders": panel.names, "prompts_a_generation": made.prompts,
            "generations_per_epoch": made.count, "held_in_evaluation_mode": held,
        }  # fmt: skip
        told = "the trained model itself, with transformers"
        if found is not None:
            told = trainer.begin_with(found, rows.train[0]["prompt_ids"])
        return fit(prepared, trainer, decisions, _shown(spec, made, panel, kind, told))


def _shown(spec: GRPOSpec, made: Generations, panel: Panel, reference: str | None, engine: str) -> str:
    rl = spec.rl
    low, high = rl.epsilons
    weights = ", ".join(f"{name} x {weight:g}" for name, weight in zip(panel.names, panel.weights, strict=True))
    left_out = f"; up to {made.prompts - 1} prompts of an epoch are left out" if made.prompts > 1 else ""
    return "\n".join([
        f"rewards   {weights}{', SHUFFLED within each group: a control, which learns nothing' * rl.shuffle_rewards}",
        f"engine    {engine}",
        f"generates {made.count:,} times an epoch, {made.prompts} prompts with {made.answers} answers each of at most "
        f"{rl.max_completion_length} tokens, temperature {rl.temperature:g}, top-p {rl.top_p:g}{left_out}",
        f"learns    loss {rl.loss}, ratios within -{low:g} and +{high:g}, advantages over {rl.scale}, "
        f"{rl.n_iterations} time(s) from each answer; reference: {reference or 'none, beta 0'}",
        f"routes    {SHOWN[rl.routing_replay]}",
    ])  # fmt: skip
