"""The time, as all our files and rows have it."""

from datetime import UTC, datetime


def now() -> datetime:
    """Return the current time in UTC; all our times are aware."""
    return datetime.now(UTC)
