"""A mixin over TRL's GRPO trainer that records the routes of answers, and replays them in training."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn

from llama_stack_provider_moe.compute.models.prepare import Base
from llama_stack_provider_moe.compute.moe.replay import require_replay
from llama_stack_provider_moe.compute.recipes.grpo.routes import KEY, NONE, Routes
from llama_stack_provider_moe.compute.recipes.on_policy.trainer import WritingTrainer
from llama_stack_provider_moe.compute.train.prepared import Batch, Loss
from llama_stack_provider_moe.errors import CheckpointError, ModelError
from llama_stack_provider_moe.spec import GRPOSpec

Passed = tuple[Tensor, Tensor | None, Tensor | None]  # log-probabilities, entropies, the model's balance loss
SHOWN = {
    "off": "chosen in each pass",
    "rollout": "of generating the answers, replayed in training (R3)",
    "policy": "of the old policy's pass, replayed in training (R2)",
}


def require_routing_replay(spec: GRPOSpec, base: Base) -> None:
    """Check that the model's routes can be replayed, if the job asks for it.

    Raises:
        ModelError: it has no routers, or they can't be replayed exactly.
    """
    replay = spec.rl.routing_replay
    if replay == "off":
        return
    if base.layout is None:
        raise ModelError(f"rl.routing_replay: {replay!r} is not valid with {spec.model}, which has no routers; "
                         "expected 'off'")  # fmt: skip
    require_replay(base.model, base.layout)


class ReplayingTrainer(WritingTrainer):
    """Mixin over TRL's trainer. Evaluations, generating and a reference's passes are never steered."""

    spec: GRPOSpec
    use_vllm: bool  # TRL's
    routes: Routes | None = None  # None: routers choose in each pass
    _found: Tensor | None = None  # routes of the generation that is being made
    _old_pass_is_next = False

    @property
    def _replays(self) -> Routes | None:
        """The routes, while the model trains."""
        return self.routes if self.model.training else None

    def _generate_single_turn(self, prompt_ids: list[list[int]], *arguments: object, **keywords: object) -> object:
        routes = self._replays
        with nullcontext() if routes is None else routes.generating(len(prompt_ids)):
            return super()._generate_single_turn(prompt_ids, *arguments, **keywords)

    def _generate_and_score_completions(self, inputs: Sequence[Mapping[str, object]]) -> Batch:
        routes = self._replays
        # TRL runs the old policy's pass, before the reference's, where several steps learn from a generation.
        # With an engine it always does, to compare with the engine's probabilities.
        several = self.spec.rl.steps_a_generation > 1 or self.use_vllm
        self._old_pass_is_next = routes is not None and several
        batch: Batch = super()._generate_and_score_completions(inputs)
        assert not self._old_pass_is_next, "TRL did not run the old policy"
        if routes is not None:
            found, self._found = self._found, None
            if found is None:
                mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
                found = routes.of_generation(mask, batch["completion_ids"].shape[1])
            routes.note_generation(found)
            batch[KEY] = found
        return batch

    def _get_per_token_logps_and_entropies(
        self, model: nn.Module, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int,
        batch_size: int | None = None, **keywords: object,
    ) -> Passed:  # fmt: skip
        """Call TRL's. The old policy's pass replays the routes of generating, or is where they are recorded."""
        ask = super()._get_per_token_logps_and_entropies
        if self.routes is None or not self._old_pass_is_next:
            passed: Passed = ask(model, input_ids, attention_mask, logits_to_keep, batch_size=batch_size, **keywords)
            return passed
        self._old_pass_is_next = False
        forced = None
        if self.routes.of == "rollout":
            forced = self.routes.of_generation(attention_mask, logits_to_keep)
        logps: list[Tensor] = []
        recorded: list[Tensor] = []
        for rows in torch.split(torch.arange(len(input_ids), device=input_ids.device), batch_size or len(input_ids)):
            with self.routes.old_policy(None if forced is None else forced[rows], len(rows), recorded):
                logps.append(ask(model, input_ids[rows], attention_mask[rows], logits_to_keep, **keywords)[0])
        if forced is None:
            forced = torch.cat(recorded).masked_fill(~attention_mask.bool()[..., None, None], NONE)
        self._found = forced
        return torch.cat(logps), None, None

    def compute_loss(
        self, model: nn.Module, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Tensor | None = None
    ) -> Loss:
        """Compute the loss of a micro-batch, in training with its replayed routes, which stay for its backward."""
        routes = self._replays
        if routes is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        with routes.replayed(inputs[KEY], self._metrics["train"]["routing/changed"]):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def rest(self) -> None:
        """End the training steps: routers choose again."""
        super().rest()
        if self.routes is not None:
            self.routes.rest()

    def require_routes(self, file: Path, rollouts: Sequence[Mapping[str, object]] | None) -> None:
        """Check that a checkpoint's answers have the routes that are to be replayed.

        Args:
            file: they are from it.
            rollouts: a micro-batch each; None: the next step generates anew.

        Raises:
            CheckpointError: they have not.
        """
        if self.routes is not None and any(KEY not in each for each in rollouts or []):
            raise CheckpointError(f"{file} has answers without the routes that are to be replayed (rl.routing_replay)")
