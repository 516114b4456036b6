"""Names of owners by principal and tenant, and whose jobs a caller may use.

`tests.system.test_hosts` has the same with the users and the policy of a real host.
"""

import hashlib

import pytest

from llama_stack_provider_moe.control.server import callers, compat
from llama_stack_provider_moe.control.server.compat import Caller
from llama_stack_provider_moe.control.store.owners import everybody_of


def sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def come(monkeypatch: pytest.MonkeyPatch, who: Caller | None, is_admin: bool = False) -> None:
    monkeypatch.setattr(compat, "caller", lambda: who)
    monkeypatch.setattr(compat, "may_reach_every_job", lambda policy, action: is_admin)


def test_owners_are_hashes_of_tenant_and_principal(monkeypatch: pytest.MonkeyPatch) -> None:
    names = []
    for who in (None, Caller("a", None), Caller("a", "t"), Caller("a", "u"), Caller("b", "t"), Caller("t", "a")):
        come(monkeypatch, who)
        names.append(callers.owner())
    assert names[:3] == ["anonymous", sha("a"), f"{sha('t')}/{sha('a')}"]
    assert len(set(names)) == len(names)
    assert max(map(len, names)) <= 256, "as the store's column"


def test_an_administrator_reaches_the_own_tenant(monkeypatch: pytest.MonkeyPatch) -> None:
    come(monkeypatch, Caller("a", "t"))
    assert callers.whose([], "read") == callers.owner()
    come(monkeypatch, Caller("a", "t"), is_admin=True)
    assert callers.whose([], "read") == everybody_of(sha("t"))
    come(monkeypatch, Caller("a", None), is_admin=True)
    assert callers.whose([], "read") is None


@pytest.mark.parametrize(
    ("who", "is_admin", "one_tenant", "may"),
    [
        (None, False, False, True),  # authentication is off
        (Caller("a", None), False, False, False),
        (Caller("a", None), True, False, True),
        (Caller("a", "t"), True, False, False),
        (Caller("a", "t"), True, True, True),
        (Caller("a", "t"), False, True, False),
    ],
)
def test_figures_of_every_job(
    who: Caller | None, is_admin: bool, one_tenant: bool, may: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    come(monkeypatch, who, is_admin)
    monkeypatch.setattr(compat, "has_one_tenant", lambda: one_tenant)
    assert callers.may_see_all_figures([]) is may


def test_this_host_has_no_tenants() -> None:
    assert not compat.has_one_tenant()
