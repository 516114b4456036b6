"""A mixin over TRL's trainers that write answers to prompts and learn from them."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import cast

import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import GenerationConfig, PreTrainedTokenizerBase, TrainingArguments

from llama_stack_provider_moe.compute.data import batch_sharing
from llama_stack_provider_moe.compute.data.batch_sharing import Ballast, SharedBatches, as_if_alike
from llama_stack_provider_moe.compute.data.groups import Generations, GroupSampler
from llama_stack_provider_moe.compute.data.sampling import EpochSampler
from llama_stack_provider_moe.compute.moe.layout import text_config
from llama_stack_provider_moe.compute.recipes.on_policy import rollouts
from llama_stack_provider_moe.compute.recipes.on_policy.interrupting import interruptible
from llama_stack_provider_moe.compute.recipes.on_policy.samples import SampleFiles
from llama_stack_provider_moe.compute.train.prepared import Batch, Outcome, Prepared
from llama_stack_provider_moe.compute.train.trainer import RecordingTrainer
from llama_stack_provider_moe.jobdir.samples import GeneratedSample
from llama_stack_provider_moe.spec import WritingSpec

Row = dict[str, object]  # of the data set: prompt_ids, item


class WritingTrainer(RecordingTrainer):
    """Mixin over TRL's trainer, on prompts that are already tokenised.

    Args:
        prepared: model and prompts.
        args: TRL's.
        generations: of an epoch.
        extra: further arguments of the TRL trainer.
    """

    spec: WritingSpec
    generation_config: GenerationConfig  # TRL's
    eos_token_ids: list[int]  # TRL's
    processing_class: PreTrainedTokenizerBase  # transformers'
    _metrics: dict[str, dict[str, list[float]]]  # TRL's
    _step: int  # TRL's number of micro-batches
    _buffered_inputs: list[rollouts.Rollout] | None  # TRL's

    def __init__(
        self, prepared: Prepared[WritingSpec], args: TrainingArguments, generations: Generations, **extra: object
    ) -> None:
        session = prepared.session
        asked = session.spec.generating
        self.session = session
        self.head_temperature = asked.temperature
        self.samples = SampleFiles(session.folder.samples, asked.keep_samples)
        self.generations = generations
        self._is_ballast = False  # the answers that are being made: a held-out row of another process
        self._counted = 0  # their tokens that are learnt from
        self._asked: list[list[int]] = []  # the prompts of the generation that is being made
        self._seen_before: int | None = None  # tokens of earlier starts
        super().__init__(prepared, args, **extra)
        if self.layout is not None:
            # Trainers ask for router logits where they want a balance loss. By the config, generating would compute one
            # too, which fails with a cache.
            text_config(self.model).output_router_logits = False
        sampled = self.generation_config
        self._greedy = GenerationConfig(
            max_new_tokens=asked.max_completion_length, do_sample=False, pad_token_id=sampled.pad_token_id,
            bos_token_id=sampled.bos_token_id, eos_token_id=self.eos_token_ids, disable_compile=True,
        )  # fmt: skip

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = ["prompt_ids", "item"]

    @property
    def sequences(self) -> int:
        """Answers that are written in a full epoch."""
        made = self.generations
        return made.count * made.prompts * made.answers

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> GroupSampler:
        rows = len(self.train_dataset)
        return GroupSampler(EpochSampler(rows, rows, self.spec.data.shuffle, self.spec.options.seed), self.generations)

    def get_train_dataloader(self) -> DataLoader[Batch]:
        """TRL's loader, or one of this process's part of each generation."""
        if self.peers.size == 1:
            loader: DataLoader[Batch] = super().get_train_dataloader()
            return loader
        made = self.generations
        answers = made.prompts * made.answers // self.peers.size
        return self._share(self.train_dataset, SharedBatches(self._get_train_sampler(), answers, self.peers))

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], Tensor | None]:
        """Transformers' micro-batches. TRL's loss knows the step's tokens, so that nothing is to divide it again."""
        if self._seen_before is None:
            self._seen_before = self.state.num_input_tokens_seen
        batches, _ = super(RecordingTrainer, self).get_batch_samples(epoch_iterator, num_batches, device)
        return batches, torch.ones((), device=device)

    def _prepare_inputs(self, generation_batch: object) -> Batch:
        inputs: Batch = super()._prepare_inputs(generation_batch)
        if not self.model.training or not isinstance(generation_batch, list):
            return inputs
        steps = self.args.gradient_accumulation_steps
        assert self._buffered_inputs is not None, "the answers of this step"
        first = self._step % len(self._buffered_inputs) // steps * steps
        learnt: list[Mapping[str, Tensor | None]] = [inputs, *self._buffered_inputs[first : first + steps]]
        mine, *others = self.peers.sums([float(whole_mask(each).sum()) for each in learnt])
        share = torch.tensor(mine / sum(others), dtype=torch.float64)
        self.flops += self.operations(whole_mask(inputs).sum(dim=1).tolist())
        return {**inputs, batch_sharing.TOKEN_SHARE: share}

    def token_mask(self, inputs: Batch, share: int | None) -> Tensor | None:
        """The tokens of prompts and answers; none of an answer that the overlong filter leaves out, nor of ballast."""
        mask_BT = whole_mask(inputs)
        return torch.zeros_like(mask_BT) if self._is_ballast else mask_BT

    def begin_generation(self, inputs: Sequence[Mapping[str, object] | Ballast]) -> list[Row]:
        """What TRL is to read of rows to whose prompts answers will be written; the prompts are taken from here.

        Args:
            inputs: rows of the data set.
        """
        self.rest()  # a training step does not include generating
        self._is_ballast = isinstance(inputs[0], Ballast)
        given = [cast(Row, row.of) if isinstance(row, Ballast) else row for row in inputs]
        self._asked = [list(row["prompt_ids"]) for row in given]  # type: ignore[call-overload]
        texts = self.processing_class.batch_decode(self._asked)
        return [{"prompt": text, "item": row["item"]} for text, row in zip(texts, given, strict=True)]

    def end_generation(self, batch: Batch) -> None:
        """Count the answers' tokens that are learnt from."""
        self._counted = int(batch["completion_mask"].sum())

    def keep(self, answers: Sequence[GeneratedSample]) -> None:
        """Write the answers of all processes that the next step learns from first into the job's folder.

        Args:
            answers: of this process.
        """
        if not self.spec.generating.keep_samples:
            return
        written = [*chain(*self.peers.gathered(list(answers)))]
        if self.peers.leads:
            self.samples.keep(self.state.global_step + 1, written)

    def _tokenize_prompts(self, prompts: Sequence[str]) -> tuple[list[list[int]], None, dict[str, object]]:
        return self._asked, None, {}

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Around TRL's writing of answers: sampled in training, else the likeliest; a request to stop ends it.

        Raises:
            Interrupted: a process was asked to stop.
        """
        sampled = self.generation_config
        if not self.model.training:  # the likeliest answers, so that evaluations differ by the model alone
            self.generation_config = self._greedy
        try:
            with interruptible(self.model, self.session, self.args.device):
                yield
        finally:
            self.generation_config = sampled

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Call TRL's, in an evaluation without its figures: they are means of this process's batches (`tally`).

        A mean over nothing, such as the entropy where the overlong filter left all answers out, is no figure.
        """
        mode = "train" if self.model.training else "eval"
        figures = self._metrics[mode]
        for name, values in list(figures.items()):
            if mode == "eval" or name == "step_time" or all(map(math.isnan, values)):
                del figures[name]
        if mode == "train":  # TRL has it only in steps that generate
            figures["num_tokens"] = [float(self.state.num_input_tokens_seen - (self._seen_before or 0))]
        super().log(logs, start_time)

    def prediction_step(self, model: nn.Module, inputs: Batch, *arguments: object, **keywords: object) -> Outcome:
        """Call TRL's on this process's rows, which may be fewer than another's."""
        with as_if_alike(self.accelerator, self.peers.size):
            return super().prediction_step(model, inputs, *arguments, **keywords)

    def _save_checkpoint(self, model: nn.Module, trial: object) -> None:
        super()._save_checkpoint(model, trial)
        step = self.state.global_step
        goes_on = step % self.generations.steps != 0
        folder = Path(self.args.output_dir) / f"checkpoint-{step}"
        micro_step = step * self.args.gradient_accumulation_steps
        rollouts.write(folder, self.peers, micro_step, self._buffered_inputs if goes_on else None)

    def restore(self, model: nn.Module, folder: Path) -> None:
        """Read a checkpoint's weights, and the answers that the next steps learn from."""
        super().restore(model, folder)
        self._step, self._buffered_inputs = rollouts.read(folder, self.peers, self.args.device)


def whole_mask(inputs: Mapping[str, Tensor | None]) -> Tensor:
    """The mask of prompts and answers (rows, tokens)."""
    prompt, completion = inputs["prompt_mask"], inputs["completion_mask"]
    assert prompt is not None
    assert completion is not None
    return torch.cat([prompt, completion], dim=1)
