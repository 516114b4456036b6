"""Who calls: the name under which the store keeps a caller's jobs, and whose jobs a caller may use.

    anonymous                       with authentication off
    sha256(principal)               a user
    sha256(tenant)/sha256(principal)    a user of a tenant: the same principal in another tenant is somebody else
    sha256(tenant)/*                every user of a tenant; only asked for, never stored

Hashes, because a principal may be a secret (on OGX the API key itself).
"""

import hashlib

from llama_stack_provider_moe.control.server import compat
from llama_stack_provider_moe.control.store.owners import everybody_of

ANONYMOUS = "anonymous"


def owner() -> str:
    """The owner of the caller's jobs and data sets."""
    who = compat.caller()
    if who is None:
        return ANONYMOUS
    name = _hashed(who.principal)
    return name if who.tenant is None else f"{_hashed(who.tenant)}/{name}"


def whose(policy: compat.Policy, action: compat.Action) -> str | None:
    """Return the owner whose jobs the caller may use; None for every owner's.

    An administrator who has a tenant reaches every job of that tenant, and none of another one.

    Args:
        policy: the host's access policy.
        action: what the caller wants to do with the jobs.
    """
    if not compat.may_reach_every_job(policy, action):
        return owner()
    who = compat.caller()
    return None if who is None or who.tenant is None else everybody_of(_hashed(who.tenant))


def may_see_all_figures(policy: compat.Policy) -> bool:
    """Return whether the caller may read figures that count the jobs of every owner and tenant."""
    if compat.caller() is None:
        return True
    return whose(policy, "read") is None or (compat.has_one_tenant() and compat.may_reach_every_job(policy, "read"))


def _hashed(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()
