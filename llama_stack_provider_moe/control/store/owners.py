"""Owners in queries: one user, or every user of a tenant."""

from sqlalchemy import ColumnElement

from llama_stack_provider_moe.control.store.schema import jobs_table

_EVERYBODY = "/*"


def everybody_of(tenant: str) -> str:
    """Return the owner that stands for every user of a tenant, the part of their names before the slash."""
    return tenant + _EVERYBODY


def is_one_user(owner: str | None) -> bool:
    """Return whether an owner in a query is a single user; None stands for every owner."""
    return owner is not None and not owner.endswith(_EVERYBODY)


def belongs_to(owner: str, column: ColumnElement[str] = jobs_table.c.owner) -> ColumnElement[bool]:
    """Return the condition that a job belongs to an owner.

    Args:
        owner: A user's name in the store, or `everybody_of` a tenant.
        column: Column with the owner, if it is not about jobs.
    """
    if not owner.endswith(_EVERYBODY):
        return column == owner
    return column.startswith(owner.removesuffix("*"), autoescape=True)
