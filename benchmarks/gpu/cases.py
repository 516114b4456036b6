"""A case (shape, tokens, routing, mode, rank): every variant's time, memory and errors; and the order of all cases.

Each variant has its own layer, made with the same weights and deleted before the next: peak memory is then what one
forward and backward takes in addition to weights and inputs. Errors of the output and of every gradient are relative to
the norm of the truth. A variant whose error is more than `WORSE` times that of the path that it replaces has failed:
its times are kept, but no ratio is computed from them.
"""

import math
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.layers import VARIANTS, Inputs, Layer, Routing, Variant, draw, replaced, why_not
from benchmarks.gpu.shapes import SHAPES, Mode, Pass, Shape
from benchmarks.gpu.timing import Clock, DeviceLost, Times

WORSE = 2.0
ROUNDING = 1e-5  # errors below it are fp32's own, and nobody's failure
SLOW = 0.25  # of a measurement's time, for what is known to be slow
PASSES: tuple[Pass, Pass] = ("forward", "forward+backward")


@dataclass(frozen=True)
class Case:
    """What is measured; the defaults are what the targets are of."""

    shape: Shape
    tokens: int = 8192
    routing: Routing = "balanced"
    mode: Mode = "LoRA"
    rank: int = 16

    @property
    def name(self) -> str:
        """As it stands in the result."""
        kind = self.mode if self.mode == "full" else f"{self.mode} r={self.rank}"
        return f"{self.shape.name}, {kind}, {self.tokens} tokens, {self.routing}"


@dataclass
class Found:
    """Of one variant of a case."""

    status: str  # ok, failed, skipped
    why: str = ""
    first_s: float = 0.0
    times: dict[Pass, Times] = field(default_factory=dict)
    peak_bytes: int | None = None
    errors: dict[str, float] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """For the result file."""
        if self.status == "skipped":
            return {"status": self.status, "why": self.why}
        return {
            "status": self.status,
            **({"why": self.why} if self.why else {}),
            "first_call_s": round(self.first_s, 2),
            "ms": {what: times.as_json() for what, times in self.times.items()},
            "peak_mib": None if self.peak_bytes is None else round(self.peak_bytes / 2**20, 1),
            "relative_errors": {name: float(f"{error:.3g}") for name, error in self.errors.items()},
        }


def in_order() -> list[Case]:
    """The most telling first: what the targets are of, then what differs from it in one thing, then in several."""
    most, later = [], []
    for changes in (
        {}, {"mode": "full", "rank": 0}, {"routing": "Zipf"}, {"mode": "4-bit LoRA"}, {"rank": 64}, {"tokens": 32768},
        {"tokens": 1024}, {"routing": "one-hot"},
    ):  # fmt: skip
        most += [replace(Case(shape), **changes) for shape in SHAPES]
    modes: tuple[tuple[Mode, int], ...] = (
        ("LoRA", 16),
        ("full", 0),
        ("4-bit LoRA", 16),
        ("LoRA", 64),
        ("4-bit LoRA", 64),
    )
    routings: tuple[Routing, ...] = ("balanced", "Zipf", "one-hot")
    for (mode, rank), tokens, routing, shape in product(modes, (8192, 32768, 1024), routings, SHAPES):
        later.append(Case(shape, tokens, routing, mode, rank))
    seen = {case.name for case in most}
    return most + [case for case in later if case.name not in seen]


def tiny(shapes: tuple[Shape, ...]) -> list[Case]:
    """For a machine without a GPU: LoRA and full on every shape, each other thing on one; 16 tokens."""
    first = Case(shapes[0], 16, "Zipf", "LoRA", 4)
    found = [replace(each, shape=shape) for each in (first, replace(first, mode="full", rank=0)) for shape in shapes]
    found += [replace(first, routing=routing) for routing in ("balanced", "one-hot")]
    return found + [replace(first, shape=shape, mode="4-bit LoRA") for shape in shapes[2:]]


@dataclass(frozen=True)
class Bench:
    """Where and how to measure."""

    clock: Clock
    dtype: torch.dtype
    interpreted: bool = False  # triton is
    variants: tuple[Variant, ...] = tuple(VARIANTS)

    @property
    def device(self) -> torch.device:
        """Of everything."""
        return self.clock.device

    def run(self, case: Case) -> dict[str, Any]:
        """All of a case, for the result file."""
        found: dict[Variant, Found] = {}
        for variant in self.variants:
            why = why_not(variant, case.shape, case.mode, self.device, self.interpreted)
            found[variant] = Found("skipped", why) if why else Found("not run yet")
        dense: dict[Pass, Times] = {}
        if any(one.status != "skipped" for one in found.values()):
            inputs = draw(case.shape, case.tokens, case.routing, self.device, self.dtype)
            truth = self._truth(case, inputs)
            for variant in [name for name, one in found.items() if one.status != "skipped"]:
                found[variant] = self._found(case, variant, inputs, truth)
            self._judge(case, found)
            del truth
            self.clock.tidy()
            dense = self._dense(case)
        return {
            "case": case.name,
            "shape": case.shape.name, "tokens": case.tokens, "routing": case.routing, "mode": case.mode,
            "rank": case.rank, "errors_measured_by": replaced(case.shape, case.mode),
            "tflop": {what: round(self._flops(case, what) / 1e12, 6) for what in PASSES},
            "dense_ms": {what: times.as_json() for what, times in dense.items()},
            "variants": {
                variant: one.as_json() | self._rates(case, one, dense) for variant, one in found.items()
            },
        }  # fmt: skip

    def _truth(self, case: Case, inputs: Inputs) -> dict[str, Tensor]:
        layer = Layer(case.shape, case.mode, case.rank, None, self.device, self.dtype)
        found = layer.learnt(inputs.copied(torch.float32))
        del layer
        self.clock.tidy()
        return found

    def _found(self, case: Case, variant: Variant, inputs: Inputs, truth: dict[str, Tensor]) -> Found:
        try:
            found = self._measured(case, variant, inputs, truth)
        except Exception as error:  # noqa: BLE001  a variant that breaks is a result, told by name; the others go on
            found = Found("failed", f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
        inputs.hidden.grad = inputs.weights.grad = None
        try:
            self.clock.tidy()
        except DeviceLost as lost:
            raise DeviceLost(f"{variant}: {found.why or lost}") from lost
        return found

    def _measured(self, case: Case, variant: Variant, inputs: Inputs, truth: dict[str, Tensor]) -> Found:
        clock = self.clock
        layer = Layer(case.shape, case.mode, case.rank, variant, self.device, self.dtype)
        prepare = partial(layer.forget, inputs)
        found = Found("ok", first_s=clock.first_s(lambda: layer.both(inputs)))
        learnt = layer.learnt(inputs)
        assert learnt.keys() == truth.keys(), f"{sorted(learnt)} are no {sorted(truth)}"
        found.errors = {name: _error(one, truth[name]) for name, one in learnt.items()}
        del learnt
        found.peak_bytes = clock.peak_bytes(prepare, lambda: layer.both(inputs))
        share = SLOW if variant == "eager" else 1.0
        found.times["forward"] = clock.times(prepare, lambda: layer(inputs), share)
        found.times["forward+backward"] = clock.times(prepare, lambda: layer.both(inputs), share)
        return found

    def _judge(self, case: Case, found: dict[Variant, Found]) -> None:
        """Errors against those of the path that is replaced; a NaN is worse than anything."""
        yardstick = found.get(replaced(case.shape, case.mode))
        for one in found.values():
            if one.status != "ok" or yardstick is None or one is yardstick:
                continue
            if yardstick.status != "ok":
                one.why = "errors not judged: what they are measured by did not run"
                continue
            worse = [
                f"{name} {error:.3g} (there {yardstick.errors[name]:.3g})"
                for name, error in one.errors.items()
                if not error <= max(ROUNDING, WORSE * yardstick.errors[name])
            ]
            if worse:
                one.status, one.why = "failed", f"errors: {', '.join(worse)}"

    def _dense(self, case: Case) -> dict[Pass, Times]:
        """As many FLOPs as the base's, in products of all rows with one expert's matrices."""
        shape, rows = case.shape, case.tokens * case.shape.top_k
        options: dict[str, Any] = {"device": self.device, "dtype": self.dtype}
        wide, narrow = torch.randn(rows, shape.hidden, **options), torch.randn(rows, shape.inner, **options)
        both = torch.randn(rows, 2 * shape.inner, **options)
        up = torch.randn(2 * shape.inner, shape.hidden, **options)
        down = torch.randn(shape.hidden, shape.inner, **options)

        def forward() -> None:
            wide @ up.T, narrow @ down.T

        def backward() -> None:
            forward()
            both @ up, wide @ down
            if case.mode == "full":
                both.T @ wide, wide.T @ narrow

        found: dict[Pass, Times] = {}
        for what, work in zip(PASSES, (forward, backward), strict=True):
            work()
            found[what] = self.clock.times(lambda: None, work)
        return found

    def _flops(self, case: Case, what: Pass) -> float:
        return case.shape.flops(case.tokens, case.mode, case.rank, what)

    def _rates(self, case: Case, found: Found, dense: dict[Pass, Times]) -> dict[str, Any]:
        """TFLOP/s, and of the rate of the dense products."""
        base_mode: Mode = "full" if case.mode == "full" else "LoRA"
        rates: dict[str, dict[str, float]] = {"tflops": {}, "share_of_dense": {}}
        for what, times in found.times.items():
            rate = self._flops(case, what) / times.median / 1e9
            dense_rate = case.shape.flops(case.tokens, base_mode, 0, what) / dense[what].median / 1e9
            rates["tflops"][what] = round(rate, 4)
            rates["share_of_dense"][what] = round(rate / dense_rate, 4)
        return rates if found.times else {}


def _error(found: Tensor, true: Tensor) -> float:
    """Relative to the norm; what is no number counts as 1e9, for JSON has none."""
    off = ((found.float() - true).norm() / true.norm()).item()
    return off if math.isfinite(off) else 1e9
