"""Events of router health: figures of every layer at each step, and tables of every expert at some steps.

For 128 experts in each of 48 layers, the tables of one step take some 70 KB and the figures 2 KB. So the tables cover
the steps since the last ones: what they say of an expert is of all steps, not only of those that have tables.
"""

from collections.abc import Iterable

from llama_stack_provider_moe.compute.moe.layout import ExpertLayout
from llama_stack_provider_moe.compute.moe.routing_sums import LayerRouting as Recorded
from llama_stack_provider_moe.compute.moe.routing_sums import RoutingSums
from llama_stack_provider_moe.jobdir.events import Routing
from llama_stack_provider_moe.jobdir.routing_figures import LayerRouting, figures_of
from llama_stack_provider_moe.spec import Moe

TABLE_BYTES_A_STEP = 2000  # on average, unless the job says how often it wants tables
_STEPS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000)
SHARE_BYTES, LAYER_BYTES = 11, 110  # of one expert's share in a table, and of what stands beside the shares


def steps_between_tables(moe: Moe, layout: ExpertLayout, parts: int) -> int:
    """Return the number of steps from one table to the next: 1, 2, 5, 10, 20, ... if the job does not say.

    Args:
        moe: the job's block.
        layout: of the model.
        parts: number of data sets that have tables of their own.
    """
    if moe.routing_every_n_steps is not None:
        return moe.routing_every_n_steps
    tables = (1 + parts) * len(layout.moe_layers)
    least = tables * (layout.choices * SHARE_BYTES + LAYER_BYTES) / TABLE_BYTES_A_STEP
    return next(step for step in _STEPS if step >= least or step == _STEPS[-1])


class RoutingEvents:
    """Makes the event of each step.

    Args:
        every: steps from one table to the next.
    """

    def __init__(self, every: int) -> None:
        self._every = every
        self._began = False
        self._since: RoutingSums | None = None  # the last tables
        self._steps = 0

    def of_step(self, sums: RoutingSums, step: int, is_kept: bool) -> Routing:
        """Return the event of a step.

        Args:
            sums: what its routers did.
            step: its number.
            is_kept: a checkpoint of it is kept, so that no later start writes its tables.
        """
        since = sums if self._since is None else self._since + sums
        self._steps += 1
        if self._began and not is_kept and step % self._every:
            self._since = since
            return _figures(sums, step)
        covered, self._began, self._since, self._steps = self._steps, True, None, 0
        tables = since.read()
        layers = _tables(tables.layers)
        sets = {name: _tables(found) for name, found in tables.parts.items()}
        if covered == 1:
            return Routing(step=step, layers=layers, sets=sets, mutual_information=_rounded(tables.mutual_information))
        return _figures(sums, step).model_copy(update={"layers": layers, "sets": sets, "steps": covered})


def _figures(sums: RoutingSums, step: int) -> Routing:
    """Return the event of a step without tables."""
    found = sums.read(with_shares=False)
    by_set: dict[str, dict[str, float]] = {}
    for name, layers in found.parts.items():
        figures = figures_of(_tables(layers), sums.experts)
        assert figures is not None, "a part without tokens is left out"
        by_set[name] = {figure: _digits(value) for figure, value in figures.over_layers().items()}
    by_layer = figures_of(_tables(found.layers), sums.experts)
    return Routing(
        step=step, layers=[], by_layer=by_layer, by_set=by_set, mutual_information=_rounded(found.mutual_information)
    )


def _tables(layers: Iterable[Recorded]) -> list[LayerRouting]:
    return [
        LayerRouting(
            layer=each.layer,
            share=[_digits(share) for share in each.share],
            min=_digits(each.min),
            max=_digits(each.max),
            cv=_digits(each.cv),
            dead=each.dead,
            load_entropy=_digits(each.load_entropy),
            token_entropy=_digits(each.token_entropy),
        )
        for each in layers
    ]


def _rounded(value: float | None) -> float | None:
    return None if value is None else _digits(value)


def _digits(value: float) -> float:
    """Return a figure with four significant digits: a share that is not 0 stays so."""
    return float(f"{value:.4g}")
