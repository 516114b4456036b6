"""Numbers of things in text."""

from llama_stack_provider_moe.ground.counting import number_of


def test_one_thing_is_no_plural() -> None:
    assert [number_of(count, "thread") for count in (0, 1, 2, 12_345)] == [
        "0 threads", "1 thread", "2 threads", "12,345 threads",
    ]  # fmt: skip
    assert (number_of(1, "process", "processes"), number_of(3, "process", "processes")) == ("1 process", "3 processes")
