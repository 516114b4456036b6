"""Owners in queries: a user, or every user of a tenant."""

from collections.abc import Iterator

import pytest

from llama_stack_provider_moe.control.store.owners import everybody_of
from llama_stack_provider_moe.control.store.store import JobStore
from llama_stack_provider_moe.errors import NotFound

RED, BLUE = "a" * 64, "ab" * 32  # RED is no beginning of BLUE's, but both begin alike
OWNERS = {"red-alice": f"{RED}/1", "red-bob": f"{RED}/2", "blue-alice": f"{BLUE}/1", "none": RED, "like": f"{RED}_/1"}


@pytest.fixture
def filled(url: str) -> Iterator[JobStore]:
    store = JobStore(url)
    for name, owner in OWNERS.items():
        store.submit(name, owner, "sft", "m", f"/jobs/{name}")
    yield store
    store.close()


def test_a_tenant_is_its_users_and_nobody_else(filled: JobStore) -> None:
    red = everybody_of(RED)
    assert {job.id for job in filled.list(red)} == {"red-alice", "red-bob"}
    assert filled.get("red-bob", red).owner == f"{RED}/2"
    for other in ("blue-alice", "none", "like"):
        with pytest.raises(NotFound):
            filled.get(other, red)
        with pytest.raises(NotFound):
            filled.request_cancel(other, red)
        with pytest.raises(NotFound):
            filled.list(red, after=other)
    assert [job.id for job in filled.list(everybody_of(f"{RED}_"))] == ["like"], "no character stands for others"


def test_a_user_of_a_tenant_is_one_user(filled: JobStore) -> None:
    assert [job.id for job in filled.list(f"{RED}/1")] == ["red-alice"]
    assert [job.id for job in filled.list(RED)] == ["none"]
    assert {job.id for job in filled.list(None)} == set(OWNERS)
