"""Schedules of loss coefficients over optimiser steps, as plain numbers.

t counts optimiser steps from 1, never micro-batches. The official circuit-breaker code counts micro-batches: with 4 of
them per step it passes the end of its schedule after a quarter of the run and reaches a coefficient of -alpha.
"""

import math
from typing import Literal, NamedTuple

Shape = Literal["linear", "cosine"]


class Coefficients(NamedTuple):
    """Weights of the two losses in one optimiser step."""

    reroute: float
    retain: float


def rise(done: float, shape: Shape) -> float:
    """From 0 to 1 as `done` goes from 0 to 1, and 1 beyond; cosine: (1 - cos(pi * done)) / 2."""
    done = min(max(done, 0.0), 1.0)
    return done if shape == "linear" else (1 - math.cos(math.pi * done)) / 2


def paper(t: int, steps: int, alpha: float, shape: Shape = "linear") -> Coefficients:
    """Circuit breakers' schedule (arXiv 2406.04313, algorithm 1): alpha (1 - p) and alpha p with p = t / (2 T).

    alpha 10, T 150: 9.97 and 0.03 at t = 1, 5 and 5 at t = 150, 0 and 10 from t = 300 on.

    Args:
        t: optimiser step, from 1.
        steps: T, half the length of the schedule.
        alpha: the weight that both coefficients share.
        shape: shape of p as a function of t / (2 T).
    """
    p = rise(t / (2 * steps), shape)
    return Coefficients(reroute=alpha * (1 - p), retain=alpha * p)


def between(t: int, steps: int, start: float, end: float, shape: Shape = "linear") -> float:
    """One coefficient on its own schedule: `start` at t = 0, `end` from t = `steps` on.

    Args:
        t: optimiser step, from 1.
        steps: length of the schedule in optimiser steps.
        start: value at t = 0.
        end: value from t = `steps` on.
        shape: shape of the curve between them.
    """
    return start + (end - start) * rise(t / steps, shape)
