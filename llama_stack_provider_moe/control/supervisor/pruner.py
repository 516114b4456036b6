"""Early ending of a sweep's jobs: Optuna's pruners decide. This module alone imports Optuna (extra `sweeps`).

Optuna's own studies run their trials themselves, in processes that ask the pruner. Ours are jobs that outlive servers
and supervisors. So for each decision a study in memory is built from what the store has of the sweep: the figures of
each job, and what the pruner remembered about it. The pruner's new memory goes back into the store, in the transaction
that carries out its decision.
"""

import importlib.util
import math
from typing import TYPE_CHECKING, Any

from llama_stack_provider_moe.control.store.sweep_rows import SweepRow
from llama_stack_provider_moe.control.store.trial_rows import Trial
from llama_stack_provider_moe.spec.sweeps import Halving

if TYPE_CHECKING:
    from optuna.pruners import BasePruner
    from optuna.trial import FrozenTrial

EXTRA = "pip install 'llama-stack-provider-moe[sweeps]'"


def is_installed() -> bool:
    """Return whether Optuna is there, without importing it."""
    return importlib.util.find_spec("optuna") is not None


class Pruner:
    """The pruner of one sweep.

    Args:
        sweep: The sweep.
        halving: What it was asked for.
        evaluations: The largest number of evaluations that one of its jobs does.
    """

    def __init__(self, sweep: SweepRow, halving: Halving, evaluations: int) -> None:
        import optuna  # takes a second, and most sweeps do without

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._optuna = optuna
        self._sweep = sweep
        self._halving = halving
        self._evaluations = evaluations

    def decide(self, trials: list[Trial], mine: Trial) -> tuple[bool, dict[str, Any]]:
        """Decide about a job after its newest figure.

        Args:
            trials: All jobs of the sweep that exist, by number.
            mine: The job.

        Returns:
            Whether the job ends, and what the pruner remembers about it.
        """
        trial = self._optuna.trial
        study = self._optuna.create_study(
            study_name=self._sweep.id, direction=self._sweep.plan["direction"], pruner=self._pruner()
        )
        numbers = {each.number: each for each in trials}
        for number in range(max(numbers) + 1):
            known = numbers.get(number)
            # Optuna numbers trials itself. One that was deleted is still counted, as one that failed.
            state = trial.TrialState.FAIL if known is None else trial.TrialState.RUNNING
            figures = {} if known is None else {each.number: _number(each.value) for each in known.figures}
            memory = {} if known is None else known.pruner_state
            study.add_trial(trial.create_trial(state=state, intermediate_values=figures, system_attrs=memory))
        if mine.figures[-1].number >= self._evaluations:
            return False, mine.pruner_state  # it is done
        ends = study.pruner.prune(study, self._frozen(study, mine))
        return bool(ends), dict(self._frozen(study, mine).system_attrs)

    def _frozen(self, study: Any, mine: Trial) -> "FrozenTrial":
        found: FrozenTrial = study.trials[mine.number]
        return found

    def _pruner(self) -> "BasePruner":
        asked, pruners = self._halving, self._optuna.pruners
        found: BasePruner
        if asked.pruner == "hyperband":
            found = pruners.HyperbandPruner(
                min_resource=asked.min_evaluations,
                max_resource=max(self._evaluations, asked.min_evaluations),
                reduction_factor=asked.reduction_factor,
            )
        else:
            found = pruners.SuccessiveHalvingPruner(
                min_resource=asked.min_evaluations, reduction_factor=asked.reduction_factor
            )
        return found


def _number(value: float | None) -> float:
    return math.nan if value is None else value
