"""`JobFilter`: which jobs a list shows."""

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import ColumnElement, or_, select

from llama_stack_provider_moe.control.store.schema import jobs_table, labels_table
from llama_stack_provider_moe.jobdir.state import JobState


@dataclass(frozen=True)
class JobFilter:
    """Conditions that all must hold; by default every job is chosen.

    Attributes:
        states: States of the jobs; none: any state.
        recipe: Their recipe.
        model: Their model, as lists show it.
        labels: Labels that they all have: a key, and its value or None for any value.
        owner: Their owner, as the store names owners.
        sweep: The sweep that they belong to.
        pipeline: The pipeline that they belong to.
        text: A part of their names, of their models' names, of their notes or of the values of their labels, in any
            case of letters.
    """

    states: tuple[JobState, ...] = ()
    recipe: str | None = None
    model: str | None = None
    labels: tuple[tuple[str, str | None], ...] = ()
    owner: str | None = None
    sweep: str | None = None
    pipeline: str | None = None
    text: str | None = None

    def conditions(self) -> Sequence[ColumnElement[bool]]:
        """Return the conditions for a query of the jobs table."""
        table, found = jobs_table.c, list[ColumnElement[bool]]()
        if self.states:
            found.append(_in_states(self.states))
        for column, wanted in (
            (table.recipe, self.recipe), (table.model, self.model), (table.owner, self.owner),
            (table.sweep, self.sweep), (table.pipeline, self.pipeline),
        ):  # fmt: skip
            if wanted is not None:
                found.append(column == wanted)
        found += [_has_label(key, value) for key, value in self.labels]
        if self.text is not None:
            found.append(_mentions(self.text))
        return found


EVERY_JOB = JobFilter()


def _in_states(states: Sequence[JobState]) -> ColumnElement[bool]:
    named = jobs_table.c.state.in_([state.value for state in states])
    if JobState.UNREADABLE not in states:
        return named
    # The row has a state that this version does not know.
    known = [state.value for state in JobState if state is not JobState.UNREADABLE]
    return or_(named, jobs_table.c.state.not_in(known))


def _has_label(key: str, value: str | None) -> ColumnElement[bool]:
    label = labels_table.c
    found = select(label.job).where(label.key == key)
    return jobs_table.c.id.in_(found if value is None else found.where(label.value == value))


def _mentions(text: str) -> ColumnElement[bool]:
    # `autoescape`: a percent sign that somebody looks for is a percent sign.
    own = (jobs_table.c.id, jobs_table.c.model, jobs_table.c.note)
    label = labels_table.c
    labelled = select(label.job).where(label.value.icontains(text, autoescape=True))
    return or_(*(column.icontains(text, autoescape=True) for column in own), jobs_table.c.id.in_(labelled))
