"""Sessions: maximum, decayed sum, end of a session, bound, and that two owners' sessions never mix."""

import pytest

from llama_stack_provider_moe.shields.trajectory import Key, Sessions


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


KEY = Key("ann", "session", "s")


def test_the_sum_decays_by_half_in_each_half_life(clock: Clock) -> None:
    sessions = Sessions(10, 1e6, clock)
    assert sessions.add(KEY, {"a": 0.8}, 60).decayed_sum == pytest.approx(0.8)
    clock.now_s += 60
    assert sessions.add(KEY, {"a": 0.1}, 60).decayed_sum == pytest.approx(0.4 + 0.1)
    clock.now_s += 120
    assert sessions.add(KEY, {"a": 0.2}, 60).decayed_sum == pytest.approx(0.125 + 0.2)


def test_the_maximum_stays_and_says_where_it_came_from(clock: Clock) -> None:
    sessions = Sessions(10, 1e6, clock)
    sessions.add(KEY, {"a": 0.2, "b": 0.1}, 60)
    sessions.add(KEY, {"a": 0.1, "b": 0.7}, 60)
    clock.now_s += 100_000
    state = sessions.add(KEY, {"a": 0.3, "b": 0.7}, 60)
    assert (state.turns, state.maximum) == (3, 0.7)
    assert state.of == ("b", 0.7, 2), "the first turn of that score"
    assert state.latest == ("b", 0.7, 3)


def test_a_session_ends_after_its_time(clock: Clock) -> None:
    sessions = Sessions(10, 100, clock)
    sessions.add(KEY, {"a": 0.9}, 60)
    clock.now_s += 100
    assert sessions.add(KEY, {"a": 0.1}, 60).turns == 2
    clock.now_s += 101
    state = sessions.add(KEY, {"a": 0.1}, 60)
    assert (state.turns, state.maximum) == (1, 0.1)
    assert len(sessions) == 1


def test_the_number_of_sessions_is_bounded_and_the_least_recently_used_goes(clock: Clock) -> None:
    sessions = Sessions(3, 1e6, clock)
    for name in ("a", "b", "c"):
        sessions.add(KEY._replace(session=name), {"x": 0.5}, 60)
    sessions.add(KEY._replace(session="a"), {"x": 0.5}, 60)
    sessions.add(KEY._replace(session="d"), {"x": 0.5}, 60)
    assert (len(sessions), sessions.dropped) == (3, 1)
    assert [sessions.add(KEY._replace(session=name), {"x": 0}, 60).turns for name in ("a", "c", "d")] == [3, 2, 2]
    assert sessions.add(KEY._replace(session="b"), {"x": 0}, 60).turns == 1


def test_owners_and_shields_have_sessions_of_their_own(clock: Clock) -> None:
    sessions = Sessions(100, 1e6, clock)
    keys = [Key(owner, shield, name) for owner in ("ann", "bob") for shield in ("x", "y") for name in ("s", "t")]
    for number, key in enumerate(keys):
        for _ in range(number + 1):
            sessions.add(key, {"a": number / 10}, 60)
    for number, key in enumerate(keys):
        state = sessions.add(key, {"a": 0.0}, 60)
        assert (state.turns, state.maximum) == (number + 2, number / 10)
