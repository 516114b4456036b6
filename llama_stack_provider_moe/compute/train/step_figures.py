"""Means over the rows or tokens of a whole step or evaluation, in place of TRL's means of micro-batch means.

TRL 1.16 reports the mean of the micro-batches' means, so a micro-batch of one row weighs as much as one of eight. Here
each figure is weighted by the number of pairs or tokens that it is a mean over, and summed over all processes.
"""

from collections.abc import Mapping

from torch import Tensor, nn
from transformers import Trainer

from llama_stack_provider_moe.compute.runtime.peers import ALONE, Peers
from llama_stack_provider_moe.compute.train.prepared import Batch, Loss

TOKENS = "num_tokens"  # a count, not a mean
# A figure of a whole batch. With one process the step's is the mean over micro-batches; with several,
# `RecordingTrainer` computes it.
BALANCE = "aux_loss"


class WeightedMeans:
    """Sums of figures and of their weights, by name."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[float, float]] = {}

    def add(self, figures: Mapping[str, float], weights: Mapping[str, float]) -> None:
        """Add the means of a micro-batch.

        Args:
            figures: name -> mean.
            weights: name -> number of rows or tokens that it is a mean over; with 0 the mean is ignored.
        """
        for name, figure in figures.items():
            total, weight = self._sums.get(name, (0.0, 0.0))
            more = weights[name]
            self._sums[name] = (total + (figure * more if more else 0.0), weight + more)

    def take(self, peers: Peers) -> dict[str, float]:
        """Return the means over all processes, which must have added the same names, and reset the sums."""
        sums, self._sums = self._sums, {}
        names = sorted(sums)
        found = peers.sums([number for name in names for number in sums[name]])
        return {
            name: total / weight
            for name, total, weight in zip(names, found[::2], found[1::2], strict=True)
            if weight > 0
        }


class StepFigures(Trainer):
    """Comes between `RecordingTrainer` and a TRL trainer, and replaces TRL's `_metrics` at each `log`."""

    peers: Peers = ALONE
    counts: bool = True  # False: the current micro-batch is ballast (`batch_sharing`)
    _metrics: dict[str, dict[str, list[float]]]  # TRL's: "train" or "eval" -> name -> a value for each micro-batch
    _total_train_tokens: float  # TRL's; of this process, because `batch_sharing.local_metrics` keeps TRL from gathering

    def __init__(self, **arguments: object) -> None:
        self.means = {"train": WeightedMeans(), "eval": WeightedMeans()}
        super().__init__(**arguments)

    def figure_weights(self, inputs: Batch) -> dict[str, float]:
        """The number of rows or tokens of a micro-batch that each of TRL's figures is a mean over."""
        raise NotImplementedError

    def derived(self, figures: Mapping[str, float]) -> dict[str, float]:
        """Figures that are made of a step's (or an evaluation's) other means."""
        return {}

    def compute_loss(
        self, model: nn.Module, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Tensor | None = None
    ) -> Loss:
        """Compute TRL's loss, then add its figures with their weights. The arguments are transformers'."""
        weights = self.figure_weights(inputs) if self.counts else {}
        loss: Loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch=num_items_in_batch)
        mode = "train" if self.model.training else "eval"
        left_out = {TOKENS} if mode == "train" and self.peers.size == 1 else {TOKENS, BALANCE}
        figures = {name: values[-1] for name, values in self._metrics[mode].items() if name not in left_out}
        self.means[mode].add(figures, weights if self.counts else dict.fromkeys(figures, 0.0))
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Call TRL's, which averages `_metrics`, with one value for each figure: the weighted mean."""
        mode = "train" if self.model.training else "eval"
        had_tokens = TOKENS in self._metrics[mode]
        self._metrics[mode].clear()
        means = self.means[mode].take(self.peers)
        self._metrics[mode].update({name: [mean] for name, mean in (means | self.derived(means)).items()})
        if had_tokens:
            self._metrics[mode][TOKENS] = self.peers.sums([self._total_train_tokens])
        super().log(logs, start_time)
