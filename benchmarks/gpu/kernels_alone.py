"""One Triton kernel with every candidate of its tiles, against double precision, in a process of its own.

    python -m benchmarks.gpu.kernels_alone KERNEL [--from N] [--device cpu] [--ahead]

It prints one line of JSON when it begins a candidate and one when it has ended: what follows a `begins` without an end
is the candidate that took the process down. With `--ahead` it compiles the candidates into Triton's cache and runs
none, so that several processes do at once what takes most of the time. On a CPU Triton must interpret
(TRITON_INTERPRET=1), with small sizes.
"""

import argparse
import json
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from triton import TritonError

from llama_stack_provider_moe.compute.moe.kernels import grouped, pointwise, reference
from llama_stack_provider_moe.compute.moe.kernels.agreement import worst_error
from llama_stack_provider_moe.compute.moe.kernels.drop import UP, Drop
from llama_stack_provider_moe.compute.moe.kernels.groups import Groups, sort_by_expert
from llama_stack_provider_moe.compute.moe.kernels.reference import Activation
from llama_stack_provider_moe.compute.moe.kernels.tiles import INTERPRETED, Call, Tiles

Results = tuple[Tensor, ...]
# Of the error of the plain-torch twin in the same dtype, in the worst block of 16 x 16; both round what is in between.
# The interpreter cuts fp32 off to bf16 instead of rounding it.
NO_WORSE, FLOOR = (4.0, 2**-6) if INTERPRETED else (2.0, 2**-8)
REPETITIONS = 1 if INTERPRETED else 20


class Subject:
    """Random rows of uneven experts, one of them idle, and what kernels make of them."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self.random = torch.Generator(device).manual_seed(0)
        small = device.type == "cpu"
        self.inputs, self.outputs, self.rank = (48, 80, 16) if small else (2048, 1536, 16)
        sizes = (9, 0, 33) if small else (900, 0, 333, 2000, 1, 128, 700, 34)
        self.groups = Groups(torch.tensor(sizes, device=device).cumsum(0).int())
        self.rows, self.experts = sum(sizes), len(sizes)
        self.index = torch.randint(0, self.rows // 2, (self.rows,), device=device, generator=self.random)
        self.drop = Drop(0.1, 11, UP, torch.arange(self.rows, device=device), exact=True)

    def made(self, *shape: int) -> Tensor:
        """Numbers of unit variance over the last dimension."""
        made = torch.randn(*shape, device=self.device, generator=self.random) / shape[-1] ** 0.5
        return made.to(self.dtype)

    def of(self, kernel: str) -> tuple[Callable[..., Results], tuple[Tensor, ...]]:
        """(what computes it from kernels and tensors, the tensors)."""
        lora = (self.made(self.experts, self.rank, self.inputs), self.made(self.experts, self.outputs, self.rank))
        rows = self.made(self.rows, self.inputs) * self.inputs**0.5
        d_rows = self.made(self.rows, self.outputs) * self.outputs**0.5
        weight = self.made(self.experts, self.outputs, self.inputs)
        cases: dict[str, tuple[Callable[..., Results], tuple[Tensor, ...]]] = {
            "forward": (self._forward, (rows, weight, *lora)),
            "forward, bias": (self._biased, (rows, weight, self.made(self.experts, self.outputs))),
            "gradient of rows": (self._turned, (d_rows, weight, *lora)),
            "gradient of A": (self._outer, (self.made(self.rows, self.rank), rows)),
            "gradient of B": (self._outer, (d_rows, self.made(self.rows, self.rank))),
            "gradient of W": (self._outer, (d_rows, rows)),
            "thin, dropout": (self._thin, (rows, lora[0])),
            "forward, dropout": (self._given, (rows, weight, self.made(self.rows, self.rank), lora[1])),
            "gradient of rows, dropout": (self._turned_dropping, (d_rows, weight, *lora)),
            "gradient of A, dropout": (self._outer_dropping, (self.made(self.rows, self.rank), rows)),
            "gate, dropout": (self._gate_dropping, (d_rows,)),
            "gate backward, dropout": (self._gate_backward_dropping, (d_rows, self.made(self.rows, self.outputs // 2))),
            "gate": (self._gate, (d_rows,)),
            "gate backward": (self._gate_backward, (d_rows, self.made(self.rows, self.outputs // 2))),
            "sum of rows": (self._sum, (rows,)),
        }
        return cases[kernel]

    def _forward(self, kernels: Any, rows: Tensor, weight: Tensor, a: Tensor, b: Tensor) -> Results:
        return _whole(kernels.product(rows, weight, self.groups, a, b, index_S=self.index))

    def _biased(self, kernels: Any, rows: Tensor, weight: Tensor, bias: Tensor) -> Results:
        return _whole(kernels.product(rows, weight, self.groups, bias_EO=bias))

    def _turned(self, kernels: Any, d_rows: Tensor, weight: Tensor, a: Tensor, b: Tensor) -> Results:
        return _whole(kernels.product(d_rows, weight, self.groups, b.mT, a.mT, flip=True))

    def _turned_dropping(self, kernels: Any, d_rows: Tensor, weight: Tensor, a: Tensor, b: Tensor) -> Results:
        return _whole(kernels.product(d_rows, weight, self.groups, b.mT, a.mT, flip=True, drop=self.drop))

    def _thin(self, kernels: Any, rows: Tensor, a: Tensor) -> Results:
        if kernels is grouped:
            return (grouped.one_pass(rows, a, self.groups, index_S=self.index, mask=grouped.Mask(self.drop)),)
        return (reference.times_weights(self.drop.of(rows[self.index]), a, self.groups),)

    def _given(self, kernels: Any, rows: Tensor, weight: Tensor, low: Tensor, b: Tensor) -> Results:
        if kernels is grouped:
            return (grouped.one_pass(rows, weight, self.groups, grouped.InPass(None, b, low), None, self.index),)
        whole = reference.times_weights(rows[self.index], weight, self.groups)
        return (reference.times_weights(low, b, self.groups, onto=whole),)

    def _outer(self, kernels: Any, left: Tensor, right: Tensor) -> Results:
        return (kernels.rows_by_rows(left, right, self.groups),)

    def _outer_dropping(self, kernels: Any, left: Tensor, right: Tensor) -> Results:
        return (kernels.rows_by_rows(left, right, self.groups, drop=self.drop),)

    def _gate(self, kernels: Any, inner: Tensor, drop: Drop | None = None) -> Results:
        return (_pointwise(kernels).gated(inner, _SILU, drop),)

    def _gate_dropping(self, kernels: Any, inner: Tensor) -> Results:
        return self._gate(kernels, inner, self.drop)

    def _gate_backward(self, kernels: Any, inner: Tensor, d_made: Tensor, drop: Drop | None = None) -> Results:
        weight = torch.ones(self.rows, device=self.device, dtype=inner.dtype)
        found: Results = _pointwise(kernels).gated_backward(inner, _SILU, d_made, weight, drop)
        return found

    def _gate_backward_dropping(self, kernels: Any, inner: Tensor, d_made: Tensor) -> Results:
        return self._gate_backward(kernels, inner, d_made, self.drop)

    def _sum(self, kernels: Any, rows: Tensor) -> Results:
        tokens = self.rows // 2
        choices = torch.arange(2 * tokens, device=self.device).view(tokens, 2) % self.experts
        found = sort_by_expert(choices, self.experts, torch.float32)
        return (_pointwise(kernels).weighted_sum(rows[: 2 * tokens].contiguous(), found),)


KERNELS = (
    "forward", "forward, bias", "gradient of rows", "gradient of A", "gradient of B", "gradient of W", "gate",
    "gate backward", "sum of rows", "thin, dropout", "forward, dropout", "gradient of rows, dropout",
    "gradient of A, dropout", "gate, dropout", "gate backward, dropout",
)  # fmt: skip


def _swiglu(inner: Tensor) -> Tensor:
    gate, up = inner.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


_SILU = Activation(_swiglu, "silu")


def _pointwise(kernels: Any) -> Any:
    return pointwise if kernels is grouped else kernels


def _whole(found: tuple[Tensor, Tensor | None]) -> Results:
    return tuple(each for each in found if each is not None)


def run(kernel: str, first: int, device: torch.device, tell: Callable[[dict[str, Any]], None]) -> None:
    """Every candidate of `kernel` from number `first` on.

    Args:
        kernel: one of `KERNELS`.
        first: number of the first candidate.
        device: where it runs.
        tell: gets each line.
    """
    dtype = torch.bfloat16
    subject = Subject(device, dtype)
    compute, tensors = subject.of(kernel)
    truth = compute(reference, *(each.double() for each in tensors))
    twin = [worst_error(one, true) for one, true in zip(compute(reference, *tensors), truth, strict=True)]
    for number, tiles in enumerate(_candidates(lambda: compute(grouped, *tensors))):
        if number < first:
            continue
        name = "its only form" if tiles is None else repr(tiles)
        tell({"begins": number, "candidate": name})
        ended: dict[str, Any] = {"ends": number, "candidate": name, "right": False}
        try:
            spills = _force(tiles)
            found = compute(grouped, *tensors)
            errors = [worst_error(one, true) for one, true in zip(found, truth, strict=True)]
            right = all(error <= NO_WORSE * other + FLOOR for error, other in zip(errors, twin, strict=True))
            ms = _ms(lambda: compute(grouped, *tensors), device) if right else None
        # Too large for the device, or this Triton can't compile it; the next candidate needs no new process.
        except (TritonError, RuntimeError) as error:
            if device.type == "cuda":
                torch.cuda.synchronize()  # raises after an illegal access, which ends this process
            tell(ended | {"why": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"})
            continue
        tell(ended | {"right": right, "worst_errors": errors, "twins": twin, "ms": ms,
                      "spills": max(spills, default=0)})  # fmt: skip


def ahead(kernel: str, device: torch.device, tell: Callable[[dict[str, Any]], None]) -> None:
    """Compile every candidate of `kernel`; errors appear when it runs."""
    compute, tensors = Subject(device, torch.bfloat16).of(kernel)
    for module, names in ((grouped, ("times", "outer")), (pointwise, ("_gated", "_gated_backward", "_weighted_sum"))):
        for name in names:
            setattr(module, name, OnlyCompiled(getattr(module, name)))
    for tiles in _candidates(lambda: compute(grouped, *tensors)):
        _force(tiles)
        with suppress(TritonError, RuntimeError):
            compute(grouped, *tensors)
        tell({"compiled": kernel, "candidate": repr(tiles)})


class OnlyCompiled:
    """A Triton kernel that a launch compiles, and does not run."""

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        """What is called in place of the launch."""

        def compile_only(*arguments: Any, **options: Any) -> None:
            self._kernel.warmup(*arguments, grid=grid, **options)

        return compile_only


def _candidates(work: Callable[[], object]) -> tuple[Tiles | None, ...]:
    """The candidates that `work` may choose from; (None,) where a kernel has one form only."""
    asked: list[tuple[Tiles, ...]] = []

    def note(_: str, __: object, candidates: tuple[Tiles, ...], ___: torch.device, call: Call) -> Tiles:
        asked.append(candidates)
        raise _Asked

    grouped.best = note  # type: ignore[assignment, attr-defined]
    try:
        work()
    except _Asked:
        return asked[0]
    return (None,)


class _Asked(Exception):
    """The candidates are known."""


def _force(tiles: Tiles | None) -> list[int]:
    """Use these tiles from now on; the result collects how many registers spill."""
    spills: list[int] = []

    def forced(_: str, __: object, candidates: tuple[Tiles, ...], ___: torch.device, call: Call) -> Tiles:
        assert tiles is not None
        if not spills:
            compiled = call.run(tiles)
            spills.append(0 if compiled is None else compiled.n_spills)
            for each in call.results:
                each.fill_(torch.nan)  # memory that is not written must show
        return tiles

    grouped.best = forced  # type: ignore[assignment, attr-defined]
    return spills


def _ms(work: Callable[[], object], device: torch.device) -> float:
    """The median, by the device's own clock."""
    if device.type != "cuda":
        return 0.0
    from triton.testing import do_bench

    found: float = do_bench(work, warmup=5, rep=REPETITIONS, return_mode="median")
    return found


def main() -> None:
    """Run what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kernel", choices=KERNELS)
    parser.add_argument("--from", dest="first", type=int, default=0, help="number of the first candidate (default: 0)")
    parser.add_argument("--ahead", action="store_true", help="compile the candidates and run none")
    parser.add_argument("--device", default="cuda", help="torch's name of the device (default: cuda)")
    arguments = parser.parse_args()

    def tell(line: dict[str, Any]) -> None:
        print(json.dumps(line), flush=True)

    if arguments.ahead:
        ahead(arguments.kernel, torch.device(arguments.device), tell)
    else:
        run(arguments.kernel, arguments.first, torch.device(arguments.device), tell)


if __name__ == "__main__":
    main()
