"""The scorer process itself: a real one with a tiny model, and its queue."""

import asyncio
import os
import threading
import time
from pathlib import Path

from llama_stack_provider_moe.compute.analysis.routing_report import Prompt
from llama_stack_provider_moe.compute.probing.scorer_queue import ROUND, Work, WorkQueue, score_for_ever
from llama_stack_provider_moe.compute.probing.scoring import LoadedProbe, ReadProbe, load_probes
from llama_stack_provider_moe.compute.probing.texts import messages_of
from llama_stack_provider_moe.control.scorer.client import ScorerClient
from llama_stack_provider_moe.shields.scorer_settings import ScorerSettings
from llama_stack_provider_moe.shields.scorer_wire import Answer, ScoreRequest
from tests.support.jobs_support import wait_for
from tests.support.tiny_probe import OTHERS, TARGETS, messages, tiny_probe


def asked(probe: LoadedProbe, text: str) -> list[Prompt]:
    return probe.reader.prompts(messages_of(messages(text)))


def work(probe: str, answers: list[Answer], texts: list[str], deadline_s: float = 60) -> Work:
    request = ScoreRequest(probe=probe, conversations=[messages(text) for text in texts], deadline_s=60)
    return Work(request, answers.append, time.monotonic() + deadline_s)


def test_a_queue_is_bounded_pings_pass_it_and_a_round_is_small() -> None:
    queue, nothing = WorkQueue(40), list[Answer]()
    first, second, third = (work("p", nothing, ["a"] * size) for size in (ROUND - 2, 2, 8))
    assert [queue.put(each) for each in (first, second, third)] == [True, True, True]
    assert not queue.put(work("p", nothing, ["a"]))
    ping = Work(None, nothing.append)
    assert queue.put(ping)
    assert queue.take() == ([ping], [first, second])
    assert queue.waiting == 40, "what is being scored counts too"
    for done in (first, second):
        queue.done(done)
    assert queue.waiting == 8
    assert queue.take() == ([], [third])
    large = work("p", nothing, ["a"] * 32)
    assert queue.put(large)
    assert queue.take() == ([], [large])


def test_what_the_scoring_thread_answers() -> None:
    folder = tiny_probe()[1]
    probes, _ = load_probes([ReadProbe.at("p", folder)])
    queue, answers = WorkQueue(100), {name: list[Answer]() for name in ("good", "late", "gone", "other", "bad", "long")}
    works = {
        "good": work("p", answers["good"], [TARGETS[0], OTHERS[0]]),
        "late": work("p", answers["late"], ["a"], deadline_s=-1),
        "gone": work("p", answers["gone"], ["a"]),
        "other": work("other", answers["other"], ["a"]),
        "bad": work("bad", answers["bad"], ["a"]),
        "long": work("p", answers["long"], ["fine", "eggs " * 500]),
    }
    works["gone"].is_wanted = False
    for each in works.values():
        assert queue.put(each)
    threading.Thread(target=score_for_ever, args=(queue, probes, {"bad": "it is bad"}, 4), daemon=True).start()
    wait_for(lambda: queue.waiting == 0 and sum(map(len, answers.values())) == len(works) - 1)
    assert answers.pop("gone") == []
    found = {name: answer for name, (answer,) in answers.items()}
    assert {name: answer.failed for name, answer in found.items()} == {
        "good": None, "late": "deadline", "other": "refused", "bad": "refused", "long": "refused",
    }  # fmt: skip
    assert "more than options.max_length = 128" in found["long"].message
    assert found["good"].scores is not None
    alone = [probes["p"].score([asked(probes["p"], text)], 1)[0] for text in (TARGETS[0], OTHERS[0])]
    for score, wanted in zip(found["good"].scores, alone, strict=True):
        assert abs(score[0] - wanted.probability) < 1e-6
        assert score[1:] == (wanted.threshold, wanted.layer)


def test_who_has_an_answer_finds_room_at_once() -> None:
    """With as many callers as the queue holds, each of whom asks again as soon as it is answered, none is refused."""
    probes, _ = load_probes([ReadProbe.at("p", tiny_probe()[1])])
    queue, room = WorkQueue(2), list[bool]()

    def again(_: Answer) -> None:
        if len(room) < 6:
            request = ScoreRequest(probe="p", conversations=[messages(OTHERS[0])], deadline_s=60)
            room.append(queue.put(Work(request, again, time.monotonic() + 60)))

    for _ in range(2):
        again(Answer())
    threading.Thread(target=score_for_ever, args=(queue, probes, {}, 4), daemon=True).start()
    wait_for(lambda: len(room) == 6 and queue.waiting == 0)
    assert room == [True] * 6


def test_a_real_process_scores_as_this_one_does_and_ends_with_its_server(tmp_path: Path) -> None:
    model, folder, _ = tiny_probe()
    settings = ScorerSettings(probes={"eggs": str(folder)}, ping_s=0.1, threads=1)
    client = ScorerClient(settings, tmp_path / "scorer", os.environ)
    client.start()
    try:
        wait_for(lambda: client.keeper.health().status == "ready")
        assert asyncio.run(client.health()).probes == ("eggs",)
        texts = [*TARGETS[:20], *OTHERS[:20]]
        scores = asyncio.run(client.score("eggs", [messages(text) for text in texts], 60))
        probes, _ = load_probes([ReadProbe.at("eggs", folder)])
        wanted = probes["eggs"].score([asked(probes["eggs"], text) for text in texts], 8)
        for score, here in zip(scores, wanted, strict=True):
            assert abs(score.probability - here.probability) < 1e-5
        process = client.keeper.process
        assert process is not None
        assert (tmp_path / "scorer" / "scorer.sock").stat().st_mode & 0o777 == 0o600
        assert process._process.stdin is not None
        process._process.stdin.close()  # as when the server dies
        wait_for(lambda: process.how_it_ended() is not None)
        assert process.how_it_ended() == "exit code 0"
    finally:
        client.close()
    assert any(str(model) in path.read_text() for path in (tmp_path / "scorer").glob("scorer.log*"))
