"""Routing analyses for tests, made without a model."""

from collections.abc import Collection, Mapping

from llama_stack_provider_moe.spec.routing import LayerReport, RoutingReport, SetSummary


def report_of(
    sure: Mapping[tuple[int, int], float], layers: int = 2, experts: int = 4, unsure: Collection[tuple[int, int]] = ()
) -> RoutingReport:
    """A report of sets `a` and `b`, top-2.

    Args:
        sure: (layer, expert) -> how much more `a` uses it, with a small error.
        layers: their number; all have experts.
        experts: their number in each layer.
        unsure: experts that `a` also uses far more, but with an error so large that it may be chance.
    """

    def layer(number: int) -> LayerReport:
        difference = [sure.get((number, each), 0.9 if (number, each) in unsure else -0.1) for each in range(experts)]
        both = {"a": difference, "b": [-each for each in difference]}
        chance = [1.0 if (number, each) in unsure else 0.05 for each in range(experts)]
        return LayerReport(
            layer=number, rate={name: [0.5] * experts for name in both}, difference=both,
            low={name: [each - 0.01 for each in row] for name, row in both.items()},
            high={name: [each + 0.01 for each in row] for name, row in both.items()},
            chance_difference={"a": chance, "b": [1.0] * experts},
            mutual_information=0.1, chance_mean=0.0, chance_high=0.01,
        )  # fmt: skip

    return RoutingReport(
        model="m", adapter=None, family="f", moe_layers=list(range(layers)), num_experts=experts, top_k=2,
        tokens="all", confidence=0.95, resamples=100, permutations=20, seed=1,
        sets={name: SetSummary(source=name, rows=9, tokens=99) for name in ("a", "b")},
        layers=[layer(number) for number in range(layers)], top={},
    )  # fmt: skip
