"""What the demos print with, and how they end."""

import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from llama_stack_provider_moe.errors import MoeError

console = Console(highlight=False, soft_wrap=True)  # the terminal wraps: paths stay whole


class DemoFailed(Exception):
    """A step of the demo did not do what it should; the text says what happened."""


def title(text: str) -> None:
    """Print a heading."""
    console.print(f"\n[bold cyan]{text}[/]")


def say(text: str) -> None:
    """Print a line as it is; square brackets are not markup."""
    console.print(text, markup=False)


def ended(work: Callable[[], None], state: Path) -> int:
    """Run a demo, say how it ended and how long it took, and return the exit code."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that every `finally` runs
    began = time.monotonic()
    try:
        work()
    except (DemoFailed, MoeError) as failure:
        console.print("[bold red]The demo failed:[/]", end=" ")
        say(str(failure))
        return 1
    except KeyboardInterrupt:
        say("\nInterrupted. The server and its jobs were stopped.")
        return 130
    minutes, seconds = divmod(round(time.monotonic() - began), 60)
    say(f"\nDone in {minutes} min {seconds} s. All files are in {state}")
    return 0
