"""The folder of a playground's prompts: none is overlooked, none is taken for another, and few stay."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from llama_stack_provider_moe.compute.recipes.playground.inbox import Inbox
from llama_stack_provider_moe.jobdir.prompts import (
    AnswerLog,
    Ended,
    PromptFiles,
)
from llama_stack_provider_moe.spec.playground import KEPT_PROMPTS, PromptRequest


def test_a_prompt_of_the_last_moment_is_answered(tmp_path: Path) -> None:
    """The server looks for `closed` after it has written a prompt; here the process finds the prompt."""
    inbox = Inbox(tmp_path / "prompts")
    inbox.reopen()
    assert inbox.close()
    assert inbox.files.closed.exists()
    inbox.reopen()
    assert not inbox.files.closed.exists()
    number = inbox.files.add(PromptRequest(prompt="a"), 0o600)
    assert not inbox.close()
    assert not inbox.files.closed.exists()
    assert inbox.next() == number


def test_old_answers_are_removed(tmp_path: Path) -> None:
    files = PromptFiles(tmp_path)
    for number in range(1, KEPT_PROMPTS + 4):
        assert files.add(PromptRequest(prompt="a"), 0o600) == number
        if number != 2:
            log = AnswerLog(files.answer(number))
            log.append(Ended())
            log.close()
    files.forget_old()
    kept = files.numbers()
    assert kept[:2] == [2, 4], "one that waits stays"
    assert len(kept) == KEPT_PROMPTS + 1
    assert files.add(PromptRequest(prompt="a"), 0o600) == KEPT_PROMPTS + 4


def test_a_number_is_never_used_again(tmp_path: Path) -> None:
    """Not after a prompt was withdrawn, not by two servers at once, and few marks stay."""
    files = PromptFiles(tmp_path)
    asked = PromptRequest(prompt="a")
    assert [files.add(asked, 0o600) for _ in range(2)] == [1, 2]
    for number in (2, 1):
        files.withdraw(number)
    assert files.add(asked, 0o600) == 3

    def send_and_withdraw(_: int) -> list[int]:
        got = []
        for _ in range(20):
            got.append(files.add(asked, 0o600))
            files.withdraw(got[-1])
        return got

    with ThreadPoolExecutor(8) as pool:
        numbers = [number for got in pool.map(send_and_withdraw, range(8)) for number in got]
    assert len(set(numbers)) == len(numbers) == 160
    highest = files.add(asked, 0o600)
    assert highest > max(numbers)
    assert [path.name for path in tmp_path.glob("*.taken")] == [f"{highest:06d}.taken"]
