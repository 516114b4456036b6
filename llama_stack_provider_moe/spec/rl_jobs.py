"""The jobs that learn from rewards: GRPO."""

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from llama_stack_provider_moe.spec.generation import Generation, least_rows, refuse_moving_routers, refuse_no_room
from llama_stack_provider_moe.spec.graders import AnyGrader, Monitor, Multi, Refusal, RewardModel
from llama_stack_provider_moe.spec.options import RLOptions
from llama_stack_provider_moe.spec.rewards import PROMPT_CLASSES, Grading, Rewards
from llama_stack_provider_moe.spec.rl import RL
from llama_stack_provider_moe.spec.row_needs import RowNeeds, noted
from llama_stack_provider_moe.spec.row_sources import RowSource
from llama_stack_provider_moe.spec.training_jobs import TrainingJob


class GRPOSpec(TrainingJob):
    """Group relative policy optimisation (arXiv 2402.03300), with rewards by graders."""

    generating_block: ClassVar[str] = "rl"  # name of the block that says how answers are written

    recipe: Literal["grpo"] = Field(description="Reinforcement learning: answers of the model, rewarded by graders.")
    rl: RL = Field(default_factory=RL)
    reward: Rewards = Field(description="Graders and their weights, whose sum is the reward.")
    grading: Grading = Field(default_factory=Grading)
    options: RLOptions = Field(default_factory=RLOptions)

    @model_validator(mode="after")
    def _generation_is_whole(self) -> "GRPOSpec":
        rl, training = self.rl, self.training
        step = training.batch_size * training.gradient_accumulation_steps * self.resources.ranks
        answers = step * rl.steps_per_generation
        if answers % rl.n_generations:
            raise ValueError(f"rl.n_generations: {rl.n_generations} is not valid; expected a divisor of {answers}, the "
                             "answers of a generation (training.batch_size x gradient_accumulation_steps x processes x "
                             "rl.steps_per_generation)")  # fmt: skip
        if training.max_steps_per_epoch % rl.steps_a_generation:
            raise ValueError(f"training.max_steps_per_epoch: {training.max_steps_per_epoch} is not valid; expected a "
                             f"multiple of {rl.steps_a_generation}, the steps of one generation")  # fmt: skip
        refuse_no_room(self, self.generating_block, rl)
        return self

    @model_validator(mode="after")
    def _no_setting_is_without_effect(self) -> "GRPOSpec":
        rl, moe = self.rl, self.moe
        if self.loader == "unsloth":
            raise ValueError("loader: 'unsloth' is not valid with recipe 'grpo'; expected 'hf'")
        if rl.engine.type != "transformers" and self.adapter is not None:
            for name, why in (("quantize_base", "vLLM would have the weights that are not quantised"),
                              ("use_dora", "DoRA can't be merged exactly into what vLLM gets")):  # fmt: skip
                if getattr(self.adapter, name):
                    raise ValueError(f"rl.engine: {rl.engine.type!r} is not valid with adapter.{name}, because {why}; "
                                     "expected 'transformers'")  # fmt: skip
        if rl.engine.type != "transformers" and self.resources.ranks > 1:
            raise ValueError(f"resources: {self.resources.ranks} processes are not valid with rl.engine "
                             f"{rl.engine.type!r}; expected 1")  # fmt: skip
        if self.adapter is not None and self.adapter.dropout > 0:
            raise ValueError(f"adapter.dropout: {self.adapter.dropout:g} is not valid with recipe 'grpo', whose model "
                             "must learn as it generated; expected 0")  # fmt: skip
        for name in ("expert_dropout", "router_jitter"):
            if getattr(moe, name) > 0:
                raise ValueError(f"moe.{name}: is for SFT only; a model that generates must learn as it generated")
        refuse_moving_routers(self, self.recipe)
        if self.data.packed or self.data.train_on_input:
            raise ValueError("data: packed and train_on_input are for SFT only; GRPO learns from generated answers")
        if self.data.domains is not None or self.data.domain_column is not None:
            raise ValueError("data.domains: are for SFT and DPO; graders know a prompt by its columns")
        if rl.epsilon is not None and rl.loss in ("sapo", "cispo"):
            raise ValueError(f"rl.epsilon: has no effect with loss {rl.loss!r}")
        if rl.epsilon_high is not None and rl.loss == "sapo":
            raise ValueError("rl.epsilon_high: has no effect with loss 'sapo'")
        if rl.scale_rewards is not None and rl.combine == "normalize":
            raise ValueError("rl.scale_rewards: has no effect with rl.combine 'normalize', which divides each reward "
                             "by its own deviation")  # fmt: skip
        if rl.routing_replay == "policy" and rl.steps_a_generation == 1:
            raise ValueError("rl.routing_replay: 'policy' has no effect where one step learns from each generation; "
                             "expected rl.n_iterations or rl.steps_per_generation above 1, or 'rollout'")  # fmt: skip
        if self.options.turns != "all":
            raise ValueError("options.turns: is for SFT only; GRPO learns from generated answers")
        return self

    @property
    def generating(self) -> Generation:
        """How answers are written."""
        return self.rl

    def grader_models(self) -> dict[str, str]:
        """Dotted name of each field of a grader that names a model or a probe -> its value."""
        found = {}
        for at, reward in enumerate(self.reward):
            path = f"reward.{at}.grader"
            named: dict[str, AnyGrader] = {path: reward.grader}
            if isinstance(reward.grader, Multi):
                named |= {f"{path}.graders.{name}": each for name, each in reward.grader.graders.items()}
            for where, grader in named.items():
                match grader:
                    case RewardModel(model=str() as model) | Refusal(model=str() as model):
                        found[f"{where}.model"] = model
                    case Monitor(probe=probe):
                        found[f"{where}.probe"] = probe
        return found

    def row_sources(self) -> list[RowSource]:
        """The prompts, and the held-out ones."""
        needs = RowNeeds.of(self.reward, self.grading)
        least, why_least = self._least_prompts()
        found = []
        for source in super().row_sources():
            if source.part in ("train", "validation"):
                source = source._replace(answered=False, needs=needs)
            if source.part == "train":
                source = source._replace(least=least, why_least=why_least)
                if needs.class_column is not None:  # of one class alone the model learns to do one thing always
                    source = source._replace(least_of_class=1, classes=tuple(map(noted, PROMPT_CLASSES)))
            found.append(source)
        return found

    def _least_prompts(self) -> tuple[int, str]:
        """Fewest rows of which those that are not held out fill one generation, and why."""
        rl, training = self.rl, self.training
        step = training.batch_size * training.gradient_accumulation_steps * self.resources.ranks
        prompts = step * rl.steps_per_generation // rl.n_generations
        product = f"training.batch_size {training.batch_size} x gradient_accumulation_steps "
        product += f"{training.gradient_accumulation_steps} x rl.steps_per_generation {rl.steps_per_generation} / "
        return least_rows(self, prompts, f"{product}rl.n_generations {rl.n_generations}")
