"""Signs of life from long calls of libraries, through their bars, hooks, callbacks and files (see `liveness`).

The library calls each of these while it works, so a call that hangs gives no sign of life.
"""

import io
from collections.abc import Buffer, Callable, Iterator, Sized
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor, nn
from transformers.utils import logging

from llama_stack_provider_moe.ground import liveness

# The name of transformers' bar -> the stage and its unit; other bars keep their name.
_BARS = {
    "Loading weights": ("loading weights", "tensors"),
    "Writing model shards": ("writing weights", "files"),
}


class _Bar:
    """A bar of transformers, or the empty one that it uses while bars are off; it also counts a stage.

    Args:
        bar: transformers' bar.
        name: of the stage.
        total: units of work, if known.
        unit: of the work.
    """

    def __init__(self, bar: Any, name: str, total: int | None, unit: str) -> None:
        self._bar = bar
        self._context = liveness.stage(name, total, unit)
        self._name, self._total, self._unit = name, total, unit
        self._counter: liveness.Counter | None = None

    def __iter__(self) -> Iterator[object]:
        return liveness.counted(self._name, self._bar, self._total, self._unit)

    def __enter__(self) -> "_Bar":
        self._bar.__enter__()
        self._counter = self._context.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> object:
        self._context.__exit__(kind, error, trace)
        return self._bar.__exit__(kind, error, trace)

    def update(self, count: int = 1) -> object:
        """Count `count` more units as done."""
        if self._counter is None:
            liveness.alive()
        else:
            self._counter.advance(count)
        return self._bar.update(count)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._bar, name)


def _counted_bar(make: Callable[..., object], arguments: tuple[object, ...], keywords: dict[str, Any]) -> _Bar:
    """See transformers' `set_tqdm_hook`."""
    items = arguments[0] if arguments else keywords.get("iterable")
    total = keywords.get("total")
    if total is None and isinstance(items, Sized):
        total = len(items)
    title = str(keywords.get("desc") or "working")
    name, unit = _BARS.get(title, (title.lower(), "steps"))
    return _Bar(make(*arguments, **keywords), name, total, unit)


@contextmanager
def transformers_counts() -> Iterator[None]:
    """Inside, work for which transformers shows a bar (tensors that it loads, files that it writes) is a stage."""
    before = logging.set_tqdm_hook(_counted_bar)
    try:
        yield
    finally:
        logging.set_tqdm_hook(before)


def watch_layers(model: nn.Module) -> None:
    """Give a sign of life for each layer's forward and backward pass, because one batch can take minutes.

    The layers are the members of the outermost lists of modules.
    """
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    for name, layers in lists.items():
        if not any(name.startswith(f"{outer}.") for outer in lists):
            for layer in layers:
                layer.register_forward_hook(_after_layer)


def _after_layer(_: nn.Module, __: object, output: object) -> None:
    liveness.alive()
    states = output[0] if isinstance(output, tuple) else output
    if isinstance(states, Tensor) and states.requires_grad:
        states.register_hook(_after_backward)  # type: ignore[no-untyped-call]


def _after_backward(_: Tensor) -> None:
    liveness.alive()


class CountingWriter(io.FileIO):
    """A file that gives a sign of life for each write: `torch.save` writes a tensor at a time."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, "w")

    def write(self, data: Buffer, /) -> int:
        """Write all of `data`; a raw file may write only a part at a time."""
        left = memoryview(data).cast("B")
        size = left.nbytes
        while left.nbytes:
            left = left[super().write(left) :]
            liveness.alive()
        return size
