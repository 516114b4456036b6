"""Shields of each type through one door: verdicts, failures of the scorer, sessions."""

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from llama_stack_provider_moe.errors import InvalidConfig, InvalidInput
from llama_stack_provider_moe.shields.guard import Guard, Who
from llama_stack_provider_moe.shields.messages import canonical
from llama_stack_provider_moe.shields.scores import FailureReason, Score, ScorerFailed, ScorerHealth
from llama_stack_provider_moe.shields.verdict import Verdict
from llama_stack_provider_moe.spec.guard_config import GuardConfig, ShieldParams
from tests.support.host_harness import RUN_CONFIGS
from tests.support.word_scorer import WordScorer

RULES = RUN_CONFIGS / "shields" / "tools.yaml"
ANN, BOB = Who("ann", "ann", "s"), Who("bob", "bob", "s")
PROBE: dict[str, Any] = {"type": "rep_monitor", "probe": "cooking"}
TRAJECTORY: dict[str, Any] = {"type": "trajectory", "shields": ["cooking", "tools"], "max_sum": 1.5}
SHIELDS = {"cooking": PROBE, "tools": {"type": "tool_guard"}, "session": TRAJECTORY}


def guard(scorer: Any = None, on_failure: str = "block", **shields: Any) -> Guard:
    config = GuardConfig.model_validate(
        {"on_failure": on_failure, "rules": {"default": str(RULES)}, "probes": {"cooking": "/probe"},
         "shields": {**SHIELDS, **shields}}
    )  # fmt: skip
    return Guard(config, scorer)


def ask(made: Guard, shield_id: str, *texts: str, who: Who = ANN, messages: list[Any] | None = None) -> Verdict:
    async def lookup(name: str) -> ShieldParams:
        return made.config.shields[name]

    given = messages or [{"role": "user", "content": each} for each in texts]
    params = made.config.shields[shield_id]
    return asyncio.run(made.verdict(shield_id, params, canonical(given), who, lookup))


def about(verdict: Verdict) -> dict[str, Any]:
    assert verdict.violation is not None
    return verdict.violation.metadata


def test_a_probe_flags_above_its_threshold() -> None:
    made = guard(WordScorer({"cook": 0.9, "pan": 0.5}))
    assert ask(made, "cooking", "hello").violation is None
    assert ask(made, "cooking", "a pan").violation is None, "a score that equals the threshold is not flagged"
    verdict = ask(made, "cooking", "I cook")
    assert verdict.score == 0.9
    assert about(verdict) == {
        "shield": "rep_monitor", "probe": "cooking", "rule": "threshold", "score": 0.9, "threshold": 0.5, "layer": 3,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("scored", "flagged"),
    [("last_message", [False, True]), ("conversation", [True, True]), ("both", [True, True])],
)
def test_what_is_scored_is_what_was_asked_for(scored: str, flagged: list[bool]) -> None:
    scorer = WordScorer({"cook": 0.9})
    made = guard(scorer, cooking={**PROBE, "scored": scored})
    found = [ask(made, "cooking", *texts).violation is not None for texts in (("cook", "bye"), ("bye", "cook"))]
    assert found == flagged
    views = {"last_message": [1], "conversation": [2], "both": [2, 1]}[scored]
    assert [len(each) for each in scorer.asked[0]] == views


def test_tool_calls_are_scored_too() -> None:
    calls = [{"type": "function", "function": {"name": "search", "arguments": '{"query": "cook"}'}}]
    messages = [{"role": "user", "content": "go"}, {"role": "assistant", "content": None, "tool_calls": calls}]
    assert about(ask(guard(WordScorer({"cook": 0.9})), "cooking", messages=messages))["rule"] == "threshold"


def test_parts_that_a_probe_cannot_read() -> None:
    image = [{"role": "user", "content": [{"type": "text", "text": "hi"}, {"type": "image_url", "image_url": {}}]}]
    assert about(ask(guard(WordScorer({})), "cooking", messages=image))["parts"] == ["image_url"]
    allowed = guard(WordScorer({}), cooking={**PROBE, "other_parts": "allow"})
    assert ask(allowed, "cooking", messages=image).violation is None


@pytest.mark.parametrize("reason", ["down", "overloaded", "deadline"])
@pytest.mark.parametrize("chosen", ["block", "allow"])
def test_the_operator_chooses_what_a_failure_means(reason: FailureReason, chosen: str) -> None:
    opposite = "allow" if chosen == "block" else "block"
    for made in (
        guard(Failing(reason), on_failure=chosen),
        guard(Failing(reason), on_failure=opposite, cooking={**PROBE, "on_failure": chosen}),
    ):
        verdict = ask(made, "cooking", "hi")
        assert verdict.failed == reason
        assert (verdict.violation is None) == (chosen == "allow")
        if verdict.violation is not None:
            assert (about(verdict)["rule"], about(verdict)["failed"]) == ("on_failure", reason)


def test_an_input_that_cannot_be_scored_is_blocked_whatever_was_chosen() -> None:
    """Its sender caused it, so to allow it would be a way around the shield."""
    made = guard(Failing("refused"), on_failure="allow")
    assert about(ask(made, "cooking", "hi"))["failed"] == "refused"


def test_without_a_scorer_a_probe_is_down() -> None:
    assert ask(guard(None), "cooking", "hi").failed == "down"
    assert ask(guard(None), "tools", "hi").failed is None


class Failing:
    """A scorer that gives no score."""

    def __init__(self, reason: FailureReason) -> None:
        self._reason = reason

    async def score(
        self,
        probe: str,
        conversations: Sequence[Sequence[Mapping[str, str]]],
        deadline_s: float,
        owner: str | None = None,
    ) -> list[Score]:
        raise ScorerFailed(self._reason, "no score")

    async def health(self) -> ScorerHealth:
        return ScorerHealth("down", "failing", (), 0, 0)


def test_the_scorer_learns_whose_conversations_wait_unless_callers_have_no_name() -> None:
    scorer = WordScorer({})
    made = guard(scorer)
    for who in (ANN, BOB, Who("anonymous", "anonymous", "s", is_named=False)):
        ask(made, "cooking", "hello", who=who)
    assert scorer.owners == ["ann", "bob", None]


def test_a_session_adds_up_what_no_turn_shows() -> None:
    made = guard(WordScorer({"pan": 0.4}))
    verdicts = [ask(made, "session", "a pan") for _ in range(5)]
    assert [each.violation is not None for each in verdicts] == [False, False, False, True, True]
    first = about(verdicts[3])
    assert (first["rule"], first["turns"], first["maximum"]) == ("max_sum", 4, 0.4)
    assert first["decayed_sum"] == pytest.approx(1.6, abs=1e-3)
    assert first["pushed_by"] == {"shield_id": "cooking", "score": 0.4, "turn": 4}
    assert ask(made, "session", "a pan", who=ANN._replace(session="other")).violation is None
    assert ask(made, "session", "hi", who=BOB).violation is None, "another owner's session of the same name"


def test_a_high_score_stays_in_its_session() -> None:
    limits = {**TRAJECTORY, "max_sum": None, "max_score": 0.8}
    made = guard(WordScorer({"cook": 0.9}), session=limits)
    assert about(ask(made, "session", "cook"))["rule"] == "max_score"
    later = about(ask(made, "session", "hello"))
    assert (later["rule"], later["pushed_by"]) == ("max_score", {"shield_id": "cooking", "score": 0.9, "turn": 1})


def test_a_trajectory_tells_the_objections_of_its_shields() -> None:
    made = guard(WordScorer({"cook": 0.9}))
    found = about(ask(made, "session", "cook"))
    assert (found["rule"], found["shield_id"]) == ("threshold", "cooking")


def test_a_failure_is_no_turn_of_a_session() -> None:
    only = {**TRAJECTORY, "shields": ["cooking"]}
    made = guard(Failing("down"), on_failure="allow", session=only)
    verdict = ask(made, "session", "hi")
    assert (verdict.violation, verdict.failed, len(made.sessions)) == (None, "down", 0)
    blocked = guard(Failing("down"), session=only)
    assert about(ask(blocked, "session", "hi"))["rule"] == "on_failure"


def test_a_session_needs_a_name_or_a_beginning() -> None:
    nameless = ANN._replace(session=None)
    made = guard(WordScorer({"pan": 0.4}))
    with pytest.raises(InvalidInput, match=r"`metadata\.session_id` of the request, header X-Moe-Session"):
        ask(made, "session", "hi", who=nameless)
    with pytest.raises(InvalidInput, match="1 to 256 characters"):
        ask(made, "session", "hi", who=ANN._replace(session="x" * 257))
    begins = guard(WordScorer({"pan": 0.4}), session={**TRAJECTORY, "no_session": "first_message"})
    turns = [ask(begins, "session", "a pan", *["more"] * count, who=nameless) for count in range(6)]
    assert [each.violation is not None for each in turns] == [False] * 3 + [True] * 3
    assert ask(begins, "session", "another", "a pan", who=nameless).violation is None


WRONG: list[tuple[Any, str]] = [
    (None, "params.type: None is not valid; expected one of tool_guard, rep_monitor, trajectory"),
    ({}, "params.type: None"),
    ({"type": ["tool_guard"]}, "params.type: ['tool_guard']"),
    ({"type": "Tool_guard"}, "params.type: 'Tool_guard'"),
    ({"type": "tool_guard", "rule": "default"}, "params.rule: unknown key"),
    ({"type": "tool_guard", "rules": "/etc/passwd"}, "params.rules: '/etc/passwd' is not valid"),
    ({"type": "tool_guard", "rules": "other"}, "expected a name of the provider's `rules`: 'default'"),
    ({"type": "rep_monitor"}, "params.probe: is missing"),
    ({"type": "rep_monitor", "probe": "other"}, "expected a name of the provider's `probes`: 'cooking'"),
    ({**PROBE, "deadline_s": 0}, "params.deadline_s: 0 is not valid"),
    ({**PROBE, "on_failure": "ignore"}, "params.on_failure: 'ignore' is not valid"),
    ({"type": "trajectory", "shields": ["a"]}, "max_score and max_sum are both left out"),
    ({"type": "trajectory", "shields": [], "max_sum": 1}, "params.shields: [] is not valid"),
    ({"type": "trajectory", "shields": ["a", "a"], "max_sum": 1}, "named twice"),
]


@pytest.mark.parametrize(("params", "says"), WRONG, ids=[str(number) for number in range(len(WRONG))])
def test_wrong_parameters_are_refused(params: Any, says: str) -> None:
    with pytest.raises(InvalidInput) as refused:
        guard().params(params)
    assert says in str(refused.value), str(refused.value)


def test_a_file_of_rules_that_is_wrong_ends_the_start(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("version: 1\ntools: {a: {}}\n")
    config = GuardConfig.model_validate(
        {"on_failure": "block", "rules": {"bad": str(tmp_path / "bad.yaml"), "gone": str(tmp_path / "gone.yaml")}}
    )
    with pytest.raises(InvalidConfig) as refused:
        Guard(config, None)
    assert len(refused.value.problems) == 2
    assert "rules.bad: " in str(refused.value)
    assert "rules.gone: " in str(refused.value)
