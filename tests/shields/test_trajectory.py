"""Sessions: maximum, decayed sum, end of a session, bound, and that two owners' sessions never mix."""

import random
from collections import Counter

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


def test_no_owner_pushes_out_the_sessions_of_another_who_has_fewer(clock: Clock) -> None:
    """One owner floods the server; the sessions of the others go on, and the flood ends its own."""
    sessions = Sessions(10, 1e6, clock)
    for name in ("s", "t"):
        sessions.add(Key("ann", "x", name), {"a": 0.9}, 60)
        sessions.add(Key("bob", "x", name), {"a": 0.9}, 60)
    for number in range(1000):
        sessions.add(Key("eve", "x", str(number)), {"a": 0.0}, 60)
    assert (len(sessions), sessions.dropped) == (10, 1000 - 6)
    for owner in ("ann", "bob"):
        for name in ("s", "t"):
            state = sessions.add(Key(owner, "x", name), {"a": 0.1}, 60)
            assert (state.turns, state.maximum) == (2, 0.9)
    assert sessions.add(Key("eve", "x", "999"), {"a": 0.0}, 60).turns == 2, "the newest of hers are left"
    assert sessions.add(Key("eve", "x", "993"), {"a": 0.0}, 60).turns == 1


def test_of_owners_with_as_many_sessions_the_least_recent_one_makes_room(clock: Clock) -> None:
    sessions = Sessions(3, 1e6, clock)
    for owner in ("ann", "bob", "carl", "ann", "dora"):
        sessions.add(Key(owner, "x", "s"), {"a": 0.1}, 60)
    assert [sessions.add(Key(owner, "x", "s"), {"a": 0.1}, 60).turns for owner in ("carl", "ann", "dora")] == [2, 3, 2]


def test_an_owner_has_a_bound_of_their_own(clock: Clock) -> None:
    sessions = Sessions(100, 1e6, clock, most_of_owner=2)
    for owner in ("ann", "bob"):
        for name in ("r", "s", "t"):
            sessions.add(Key(owner, "x", name), {"a": 0.5}, 60)
    assert (len(sessions), sessions.dropped) == (4, 2)
    assert sessions.add(Key("ann", "x", "s"), {"a": 0.5}, 60).turns == 2
    assert sessions.add(Key("ann", "x", "r"), {"a": 0.5}, 60).turns == 1


def test_a_session_ends_only_if_no_other_owner_has_more(clock: Clock) -> None:
    """Against a plain count of all owners, over many random turns, ends and expiries."""
    choice = random.Random(3)
    sessions = Sessions(40, 30, clock, most_of_owner=15)
    alive: dict[Key, float] = {}
    for _ in range(20_000):
        clock.now_s += choice.random() ** 3 * 3
        alive = {key: at for key, at in alive.items() if clock.now_s - at <= 30}
        key = Key(f"o{min(9, int(choice.expovariate(0.5)))}", "x", str(choice.randrange(25)))
        expected = key in alive
        assert (sessions.add(key, {"a": 0.1}, 60).turns > 1) == expected
        alive[key] = clock.now_s
        counts = Counter(each.owner for each in alive)
        kept = Counter({owner: len(mine) for owner, mine in sessions._of_owner.items()})
        for owner in counts - kept:
            assert counts[owner] == 16 or (len(alive) == 41 and counts[owner] == max(counts.values()))
            del alive[min((each for each in alive if each.owner == owner), key=alive.__getitem__)]
        assert len(sessions) == len(alive) == sum(kept.values()) <= 40
