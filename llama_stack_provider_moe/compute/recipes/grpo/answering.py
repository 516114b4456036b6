"""A mixin over TRL's GRPO trainer whose answers an engine generates, with the policy's weights of that moment.

The loss is corrected for the difference between the engine's probabilities and the policy's by TRL's truncated
importance sampling, whose figures are `sampling/...`.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from llama_stack_provider_moe.compute.models.upcycle import model_folder
from llama_stack_provider_moe.compute.moe.layout import text_config
from llama_stack_provider_moe.compute.recipes.grpo.engines import Answer, Engine, Sampling
from llama_stack_provider_moe.compute.recipes.grpo.policy_folder import PolicyFolder, alone_in
from llama_stack_provider_moe.compute.recipes.grpo.replaying import ReplayingTrainer
from llama_stack_provider_moe.compute.recipes.grpo.vllm_colocate import ColocatedVllm, require_vllm
from llama_stack_provider_moe.compute.recipes.grpo.vllm_server import VllmServer, server_named
from llama_stack_provider_moe.compute.recipes.on_policy.interrupting import end_if_asked
from llama_stack_provider_moe.compute.train.prepared import Batch, Loss, Prepared
from llama_stack_provider_moe.errors import EngineFailed
from llama_stack_provider_moe.ground import liveness
from llama_stack_provider_moe.spec import GRPOSpec
from llama_stack_provider_moe.spec.rl_engines import TransformersEngine, VllmServerEngine

_MISMATCH = "sampling/sampling_logp_difference/mean"  # TRL's name
_PROBE_TOKENS = 8
_GREEDY_SEED = 0


class Opened(NamedTuple):
    """An engine, and the folder from which it reads weights."""

    engine: Engine
    policy: PolicyFolder


def require_engine(spec: GRPOSpec) -> None:
    """Check, before a model is loaded, that the engine is installed or answers.

    Raises:
        EngineFailed, InvalidInput: it can't.
    """
    engine = spec.rl.engine
    if isinstance(engine, VllmServerEngine):
        server_named(engine)
    elif not isinstance(engine, TransformersEngine):
        require_vllm()


@contextmanager
def opened(prepared: Prepared[GRPOSpec]) -> Iterator[Opened | None]:
    """The job's engine, for this job alone; None: the model generates itself.

    Raises:
        EngineFailed: it can't be used.
    """
    session, base, spec = prepared.session, prepared.base, prepared.session.spec
    engine, positions = spec.rl.engine, spec.options.max_length
    if isinstance(engine, TransformersEngine):
        yield None
    elif isinstance(engine, VllmServerEngine):
        server = server_named(engine)
        with (
            alone_in(server.weights_dir, engine.server, engine.deadline_s) as folder,
            closing(VllmServer(engine, server, base.vocabulary, positions, partial(end_if_asked, session))) as found,
        ):
            yield Opened(found, PolicyFolder(folder, spec, base, prepared.model))
    else:
        with_routes = spec.rl.routing_replay == "rollout"
        model = model_folder(spec.model, "model")
        with closing(
            ColocatedVllm(engine, model, spec.training.dtype, base.vocabulary, positions, with_routes)
        ) as here:
            yield Opened(here, PolicyFolder(Path(session.cache) / "policy", spec, base, prepared.model))


class AnsweringTrainer(ReplayingTrainer):
    """Mixin over TRL's trainer."""

    use_vllm: bool  # TRL's: log-probabilities of sampling come with the answers
    _opened: Opened | None = None  # None: the model generates itself
    _in_engine: int | None = None  # the step whose weights it has

    def begin_with(self, opened: Opened, prompt: Sequence[int]) -> str:
        """Try the engine, let it generate from now on, and return a sentence on it for the log.

        Args:
            opened: the engine.
            prompt: ids of any prompt.

        Raises:
            EngineFailed: it does not answer as the policy, or returns no routes where they are to be replayed.
            AdapterError, ModelError: the weights can't be merged exactly.
        """
        self._opened = opened
        began_s = time.monotonic()
        self._synchronise(prompt)
        took_s = time.monotonic() - began_s
        self._in_engine = None  # a checkpoint may follow
        engine = self.spec.rl.engine
        assert not isinstance(engine, TransformersEngine)
        whole, anew = (count / 1e6 for count in opened.policy.sizes)
        return (
            f"{opened.engine.told}; before each generation it reads {whole:,.1f} MB of weights from "
            f"{opened.policy.folder}, of which {anew:,.1f} MB are written anew ({took_s:.1f} s the first time); loss "
            f"corrected by {engine.importance_sampling}, ratios up to {engine.importance_sampling_cap:g}"
        )

    def _generate_and_score_completions(self, inputs: Sequence[Mapping[str, object]]) -> Batch:
        self.use_vllm = self._opened is not None and self.model.training
        batch = super()._generate_and_score_completions(inputs)
        if self.use_vllm:
            self._require_same(self._metrics["train"][_MISMATCH][-1], "answers")
        return batch

    def compute_loss(
        self, model: nn.Module, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Tensor | None = None
    ) -> Loss:
        """Compute the loss of a micro-batch, in training corrected for the engine's probabilities."""
        self.use_vllm = self._opened is not None and self.model.training
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def _generate_single_turn(self, prompt_ids: list[list[int]], *arguments: object, **keywords: object) -> object:
        if self._opened is None:
            return super()._generate_single_turn(prompt_ids, *arguments, **keywords)
        rl, training = self.spec.rl, self.model.training
        size = rl.n_generations if training else 1
        prompts = prompt_ids[::size]
        assert prompt_ids == [each for each in prompts for _ in range(size)], "prompts do not stand in whole groups"
        if training or self._in_engine != self.state.global_step:
            self._synchronise(prompts[0])
        with_routes = training and self.routes is not None and self.routes.of == "rollout"
        sampling = Sampling(
            answers=size, temperature=rl.temperature if training else 0.0, top_p=rl.top_p if training else 1.0,
            most_tokens=rl.max_completion_length, ends=self.eos_token_ids, with_routes=with_routes,
            seeds=[self._seed(at) if training else _GREEDY_SEED for at in range(len(prompts))],
        )  # fmt: skip
        with liveness.stage("generating", len(prompts), "prompts") as counter:
            found = self._opened.engine.generate(prompts, sampling, counter.advance)
        answers = [answer for group in found for answer in group]
        if with_routes:
            self._take_routes(prompt_ids, answers)
        logps = [answer.logps for answer in answers] if training else None
        return [answer.tokens for answer in answers], logps

    def _seed(self, at: int) -> int:
        """The seed of a prompt's answers: the same again in a job that resumes."""
        return int(self.spec.options.seed + 1_000_003 * self.state.global_step + 7919 * at) % 2**31

    def _take_routes(self, prompt_ids: Sequence[Sequence[int]], answers: Sequence[Answer]) -> None:
        assert self.routes is not None
        lengths = [(len(prompt), len(answer.tokens)) for prompt, answer in zip(prompt_ids, answers, strict=True)]
        found = [torch.from_numpy(answer.routes.astype("int16")) for answer in answers if answer.routes is not None]
        layers = int(text_config(self.model).num_hidden_layers)
        self.routes.take_from_engine(found, lengths, layers)

    def _synchronise(self, prompt: Sequence[int]) -> None:
        """Give the engine the weights of now, and try whether it then answers as the policy does."""
        assert self._opened is not None
        rl = self.spec.rl
        with liveness.stage("giving the engine the policy's weights", unit="tensors"):
            self._opened.policy.write()
            self._opened.engine.take(self._opened.policy.folder)
        with_routes = self.routes is not None and self.routes.of == "rollout"
        sampling = Sampling(
            answers=1, temperature=rl.temperature, top_p=1.0, most_tokens=min(_PROBE_TOKENS, rl.max_completion_length),
            ends=self.eos_token_ids, seeds=[self._seed(0)], with_routes=with_routes,
        )  # fmt: skip
        ((answer,),) = self._opened.engine.generate([prompt], sampling, lambda: None)
        if with_routes:
            self._take_routes([prompt], [answer])
        ids = torch.tensor([[*prompt, *answer.tokens]], device=self.args.device)
        with torch.no_grad():
            # Not through `ReplayingTrainer`, for which this would be the old policy's pass.
            own = super(ReplayingTrainer, self)._get_per_token_logps_and_entropies(
                self.model, ids, torch.ones_like(ids), len(answer.tokens)
            )[0]
        known = [(a, b) for a, b in zip(own[0].tolist(), answer.logps, strict=True) if b is not None]
        if known:
            self._require_same(sum(abs(a - b) for a, b in known) / len(known), "a try")
        self._in_engine = self.state.global_step

    def _require_same(self, mismatch: float, of: str) -> None:
        engine = self.spec.rl.engine
        assert not isinstance(engine, TransformersEngine)
        assert self._opened is not None
        if not mismatch <= engine.max_mismatch:
            raise EngineFailed(
                f"{self._opened.engine.told} does not speak as the policy: log-probabilities of {of} differ by "
                f"{mismatch:.3g} nats in the mean; expected at most {engine.max_mismatch:g} (rl.engine.max_mismatch). "
                "It has other weights, or computes another model"
            )
