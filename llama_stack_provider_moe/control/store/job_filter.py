"""`JobFilter`: which jobs a list shows."""

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import ColumnElement, or_

from llama_stack_provider_moe.control.store.schema import jobs_table
from llama_stack_provider_moe.jobdir.state import JobState


@dataclass(frozen=True)
class JobFilter:
    """Conditions that all must hold; by default every job is chosen.

    Attributes:
        states: States of the jobs; none: any state.
        recipe: Their recipe.
        text: A part of their names or of their models' names, in any case of letters.
    """

    states: tuple[JobState, ...] = ()
    recipe: str | None = None
    text: str | None = None

    def conditions(self) -> Sequence[ColumnElement[bool]]:
        """Return the conditions for a query of the jobs table."""
        table, found = jobs_table.c, list[ColumnElement[bool]]()
        if self.states:
            found.append(table.state.in_([state.value for state in self.states]))
        if self.recipe is not None:
            found.append(table.recipe == self.recipe)
        if self.text is not None:
            # `autoescape`: a percent sign that somebody looks for is a percent sign.
            found.append(
                or_(table.id.icontains(self.text, autoescape=True), table.model.icontains(self.text, autoescape=True))
            )
        return found


EVERY_JOB = JobFilter()
