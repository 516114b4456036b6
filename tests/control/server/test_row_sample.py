"""Which rows of a set are looked at: its beginning and a spread, of conversations, and few bytes."""

from llama_stack_provider_moe.control.server.row_sample import FIRST, LIMIT_BYTES, SPREAD, RowSample

GOOD = {"messages": [{"role": "user", "content": "Is berth 4 free?"}, {"role": "assistant", "content": "Until noon."}]}


def test_a_sample_is_the_beginning_and_a_spread() -> None:
    sample, again = RowSample(), RowSample()
    for number in range(1, 100_001):
        for each in (sample, again):
            each.offer(number, GOOD, 100)
    numbers = [each.number for each in sample.rows()]
    assert numbers[:FIRST] == list(range(1, FIRST + 1))
    assert len(numbers) == FIRST + SPREAD
    assert numbers == sorted(set(numbers)) == [each.number for each in again.rows()]
    spread = numbers[FIRST:]
    assert 30_000 < sum(spread) / SPREAD < 70_000
    assert max(spread) > 80_000


def test_a_sample_is_of_conversations_and_small() -> None:
    sample = RowSample()
    sample.offer(1, {"text": "plain"}, 10)
    sample.offer(2, GOOD, LIMIT_BYTES)
    assert sample.rows() == []
    for number in range(3, 1000):
        sample.offer(number, GOOD, 20_000)
    kept = sample.rows()
    assert 10 <= len(kept) <= LIMIT_BYTES // 20_000
    assert any(each.number > FIRST + 3 for each in kept), "long rows at the beginning leave room for the others"
