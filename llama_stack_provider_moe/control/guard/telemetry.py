"""OpenTelemetry metrics about shields, sent through the host's exporter. No text of a conversation is in them.

moe.guard.checks      counter          {check}    type, shield, outcome: none, info, warn or error
moe.guard.failures    counter          {check}    type, shield, reason, chosen: block or allow
moe.guard.duration    histogram        s          type, shield
moe.guard.sessions    up-down counter  {session}  sessions that are kept
moe.guard.feedback    counter          {row}      outcome: kept, full or failed
"""

from collections.abc import Callable, Iterable

from opentelemetry.metrics import CallbackOptions, Meter, Observation

from llama_stack_provider_moe.shields.verdict import Verdict

BOUNDARIES_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)


class Telemetry:
    """The instruments of one server process.

    Args:
        meter: a meter of the host's OpenTelemetry provider.
        sessions: the number of sessions that are kept.
    """

    def __init__(self, meter: Meter, sessions: Callable[[], int]) -> None:
        def observed(_: CallbackOptions) -> Iterable[Observation]:
            return [Observation(sessions())]

        self._checks = meter.create_counter("moe.guard.checks", "{check}", "Conversations that shields checked.")
        self._failures = meter.create_counter("moe.guard.failures", "{check}", "Checks without a score.")
        self._duration = meter.create_histogram(
            "moe.guard.duration", "s", "Time of a check.", explicit_bucket_boundaries_advisory=BOUNDARIES_S
        )
        self._feedback = meter.create_counter("moe.guard.feedback", "{row}", "Flagged conversations for training.")
        meter.create_observable_up_down_counter("moe.guard.sessions", [observed], "{session}", "Sessions kept.")

    def checked(self, kind: str, shield_id: str, verdict: Verdict, took_s: float) -> None:
        """Count a check; shields are registered by an operator, so their ids make few series."""
        about = {"moe.guard.type": kind, "moe.guard.shield": shield_id}
        level = "none" if verdict.violation is None else verdict.violation.level
        self._checks.add(1, about | {"moe.guard.outcome": level})
        self._duration.record(took_s, about)
        if verdict.failed is not None:
            chosen = "allow" if verdict.violation is None else "block"
            self._failures.add(1, about | {"moe.guard.reason": verdict.failed, "moe.guard.chosen": chosen})

    def feedback(self, outcome: str) -> None:
        """Count a flagged conversation: `kept`, `full` or `failed`."""
        self._feedback.add(1, {"moe.guard.outcome": outcome})
