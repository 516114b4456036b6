"""A playground in this process: what it answers with its adapter on and off, and which experts it shows."""

import json
import signal
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from llama_stack_provider_moe.compute.models.loader import load_plain
from llama_stack_provider_moe.compute.moe.codes import Coding
from llama_stack_provider_moe.compute.moe.derive import find_layout
from llama_stack_provider_moe.compute.moe.quantize import Bits, dequantize, quantize
from llama_stack_provider_moe.compute.moe.routing import RoutingRecorder
from llama_stack_provider_moe.compute.recipes import playground as recipe
from llama_stack_provider_moe.compute.recipes.playground.inbox import RESTARTED
from llama_stack_provider_moe.compute.recipes.playground.writing import Writing
from llama_stack_provider_moe.compute.worker.main import COMPLETED, STOPPED, train
from llama_stack_provider_moe.jobdir import events
from llama_stack_provider_moe.jobdir.folder import JobFolder, write_atomic
from llama_stack_provider_moe.jobdir.prompts import (
    Answered,
    AnswerLog,
    Begun,
    Ended,
    Piece,
    PromptFiles,
    Routed,
    Text,
    pieces_from,
)
from llama_stack_provider_moe.spec import JOB_SPEC
from llama_stack_provider_moe.spec.playground import MIN_TEMPERATURE, ROUTED_TOKENS, PromptRequest
from tests.support import tiny_models
from tests.support.chosen import few
from tests.support.training_support import Run, Workshop, signals_put_back, workshop

__all__ = ["workshop"]
QUESTION = [{"role": "user", "content": "Write 3 words about friend."}]


@pytest.fixture(scope="module")
def trained(workshop: Workshop) -> Run:
    """A job whose adapter answers differently from its base."""
    run = workshop.run("sft", "granitemoe", optimizer={"lr": 5e-2}, training={"n_epochs": 4, "batch_size": 4})
    assert run.exit_code == COMPLETED, run.reason
    return run


def playground(workshop: Workshop, trained: Run | None = None, **changes: Any) -> JobFolder:
    """The folder of a playground that ends soon."""
    workshop.jobs += 1
    folder = JobFolder(workshop.root / "jobs" / f"playground-{workshop.jobs}")
    folder.data.mkdir(parents=True)
    PromptFiles(folder.prompts).folder.mkdir()
    body = {
        "recipe": "playground", "job_uuid": folder.root.name, "model": str(workshop.model("granitemoe")),
        "training": {"dtype": "fp32"}, "playground": {"idle_s": 5},
        "adapter_folder": None if trained is None else str(trained.folder.adapter), **changes,
    }  # fmt: skip
    write_atomic(folder.spec, JOB_SPEC.validate_python(body))
    return folder


def ask(folder: JobFolder, **fields: Any) -> int:
    """Put a prompt into a playground's folder; its number."""
    asked = {"max_tokens": 12, "temperature": 1.0} | fields
    if "prompt" not in asked:
        asked.setdefault("messages", QUESTION)
    return PromptFiles(folder.prompts).add(PromptRequest.model_validate(asked), 0o600)


def run(folder: JobFolder) -> None:
    with signals_put_back():
        code = train(folder)
    assert code == COMPLETED, [event for event in events.read(folder.events).events if event.type == "failed"]


def answer(folder: JobFolder, number: int) -> list[Piece]:
    found, _ = pieces_from(PromptFiles(folder.prompts).answer(number), 0)
    return found


def texts(pieces: Sequence[Piece]) -> dict[str, str]:
    return {piece.side: piece.text for piece in pieces if isinstance(piece, Answered)}


@pytest.fixture(scope="module")
def answered(workshop: Workshop, trained: Run) -> tuple[JobFolder, dict[str, int]]:
    """One playground that has answered these prompts."""
    folder = playground(workshop, trained)
    numbers = {
        "both": ask(folder, adapter="both", routing=True),
        "both again": ask(folder, adapter="both", routing=True),
        "off": ask(folder, adapter="off"),
        "on": ask(folder),
        "other seed": ask(folder, seed=7),
        "greedy": ask(folder, temperature=0, seed=1),
        "greedy with another seed": ask(folder, temperature=0, seed=2),
        "text": ask(folder, prompt="The capital of", max_tokens=5),
        "one token": ask(folder, max_tokens=1),
    }
    run(folder)
    return folder, numbers


def test_the_same_prompt_and_seed_give_the_same_text(answered: tuple[JobFolder, dict[str, int]]) -> None:
    folder, numbers = answered
    found = {name: texts(answer(folder, number)) for name, number in numbers.items()}
    assert found["both"] == found["both again"]
    assert found["both"]["off"] == found["off"]["off"]
    assert found["both"]["on"] == found["on"]["on"]
    assert found["on"] != found["other seed"]
    assert found["greedy"] == found["greedy with another seed"]
    assert found["both"]["on"] != found["both"]["off"], "the adapter changes the answer"


def test_the_pieces_add_up_to_the_answer(answered: tuple[JobFolder, dict[str, int]]) -> None:
    folder, numbers = answered
    for number in numbers.values():
        pieces = answer(folder, number)
        assert isinstance(pieces[0], Begun)
        assert pieces[-1] == Ended(error=None)
        for side, text in texts(pieces).items():
            assert "".join(piece.text for piece in pieces if isinstance(piece, Text) and piece.side == side) == text
        for piece in pieces:
            if isinstance(piece, Answered):
                assert 1 <= piece.tokens <= 12
                assert piece.reason in ("stop", "length")


def test_without_its_adapter_it_is_the_base(
    workshop: Workshop, answered: tuple[JobFolder, dict[str, int]], trained: Run
) -> None:
    """The same prompts to a playground of the base alone."""
    folder, numbers = answered
    base = playground(workshop)
    number = ask(base, routing=True)
    run(base)
    mine = answer(base, number)
    theirs = [piece for piece in answer(folder, numbers["both"]) if getattr(piece, "side", None) == "off"]
    assert texts(mine) == {"on": texts(theirs)["off"]}
    assert [piece.experts for piece in mine if isinstance(piece, Routed)] == [
        piece.experts for piece in theirs if isinstance(piece, Routed)
    ]


@pytest.mark.parametrize("bits", few([4, 8], 1))
def test_a_quantised_base_answers_as_its_decoded_weights_do(
    workshop: Workshop, trained: Run, bits: Bits, tmp_path: Path
) -> None:
    folder = playground(workshop, trained, training={"dtype": "fp32", "quantize_bits": bits})
    model = load_plain(str(workshop.model("granitemoe")), "fp32", torch.device("cpu"))
    layout = find_layout(model)
    quantize(model, layout, Coding(bits), torch.device("cpu"))
    dequantize(model, layout)
    model.save_pretrained(tmp_path)
    tiny_models.tokenizer().save_pretrained(tmp_path)
    decoded = playground(workshop, trained, model=str(tmp_path))
    plain = playground(workshop, trained, training={"dtype": "fp32", "quantize_bits": 0})
    said = []
    for each in (folder, decoded, plain):
        number = ask(each, adapter="both", temperature=0)
        run(each)
        said.append(texts(answer(each, number)))
    assert said[0] == said[1]
    assert said[0] != said[2], "the numbers of the base do matter here"
    told = json.loads(folder.resolved.read_bytes())["quantized"]
    assert told["bits"] == bits
    assert told["experts"] > 0
    assert told["bytes_after"] < told["bytes_before"]
    assert json.loads(plain.resolved.read_bytes())["quantized"] is None


@pytest.mark.parametrize("side", ["on", "off"])
def test_every_token_has_its_experts(
    workshop: Workshop, answered: tuple[JobFolder, dict[str, int]], trained: Run, side: str
) -> None:
    """As many as top_k x layers x tokens, and those that one pass over prompt and answer records."""
    folder, numbers = answered
    pieces = answer(folder, numbers["both"])
    routed = [piece for piece in pieces if isinstance(piece, Routed) and piece.side == side]
    [ended] = [piece for piece in pieces if isinstance(piece, Answered) and piece.side == side]
    loaded = PromptFiles(folder.prompts).read_model()
    assert loaded is not None
    assert len(routed) == ended.tokens
    chosen = sum(len(layer) for piece in routed for layer in piece.experts)
    assert chosen == loaded.top_k * len(loaded.moe_layers) * ended.tokens
    for piece in routed:
        assert all(0 <= weight <= 1 for layer in piece.weights for weight in layer)

    model = load_plain(str(workshop.model("granitemoe")), "fp32", torch.device("cpu"))
    layout = find_layout(model)
    assert layout is not None
    whole = PeftModel.from_pretrained(model, str(trained.folder.adapter)).eval() if side == "on" else model
    tokenizer = tiny_models.tokenizer()
    text = tokenizer.apply_chat_template(QUESTION, tokenize=False, add_generation_prompt=True)
    prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
    recorder = RoutingRecorder(whole, layout)
    with torch.no_grad(), recorder.recording(None):
        whole(torch.tensor([[*prompt, *(piece.id for piece in routed[:-1])]]), use_cache=False)
    for place, layer in enumerate(layout.moe_layers):
        expected = recorder.chosen_in(layer)[len(prompt) - 1 :]
        assert [sorted(piece.experts[place]) for piece in routed] == [sorted(each) for each in expected.tolist()]


def test_a_prompt_that_cannot_be_answered_says_why(workshop: Workshop) -> None:
    """And the playground answers the next one."""
    folder = playground(workshop, options={"max_length": 8})
    long, damaged, good = ask(folder), ask(folder), ask(folder, prompt="The", max_tokens=1)
    PromptFiles(folder.prompts).prompt(damaged).write_text("{")
    run(folder)
    [ended] = answer(folder, long)
    assert isinstance(ended, Ended)
    assert ended.error is not None
    assert "tokens; expected 1 to 8 (options.max_length)" in ended.error
    [ended] = answer(folder, damaged)
    assert isinstance(ended, Ended)
    assert str(ended.error).startswith("the prompt can't be read")
    assert answer(folder, good)[-1] == Ended()
    manifest = folder.read_manifest()
    assert manifest is not None
    assert manifest.summary["prompts"] == 3
    assert manifest.artifacts == []


def test_a_prompt_needs_room_in_the_models_positions(workshop: Workshop) -> None:
    """A longer one would be answered from positions that the model has never seen."""
    most = 64
    folder = playground(workshop, model=str(workshop.model("granitemoe", max_position_embeddings=most)))
    tokens = tiny_models.tokenizer()("a a a a a")["input_ids"]
    assert tokens[-2:-1] * 2 == tokens[-3:-1], "one more word is one more token"
    short = len(tokens) - 5
    texts_of = {length: " ".join(["a"] * (length - short)) for length in (most - 3, most, most + 50)}
    numbers = {length: ask(folder, prompt=text, max_tokens=100, seed=3) for length, text in texts_of.items()}
    run(folder)
    for length in (most, most + 50):
        [ended] = answer(folder, numbers[length])
        assert isinstance(ended, Ended)
        assert ended.error == (
            f"the prompt has {length:,} tokens, but the model has {most:,} positions for prompt and answer "
            f"(max_position_embeddings {most}); expected at most {most - 1:,} tokens"
        )
    [ended] = [piece for piece in answer(folder, numbers[most - 3]) if isinstance(piece, Answered)]
    assert ended.tokens <= 3
    assert ended.reason in ("positions", "stop")
    loaded = PromptFiles(folder.prompts).read_model()
    assert loaded is not None
    assert loaded.positions == most


@pytest.mark.parametrize("kind", [RuntimeError, ValueError, torch.OutOfMemoryError])
def test_an_error_ends_only_its_answer(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch, kind: type[Exception]
) -> None:
    """The second pass of the first answer fails; the next prompt is answered."""
    folder = playground(workshop)
    bad, good = ask(folder, routing=True), ask(folder, routing=True)
    write_token = Writing.token
    calls = 0

    def fail_once(self: Writing, *given: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise kind("no room for the logits")
        return write_token(self, *given, **named)

    monkeypatch.setattr(Writing, "token", fail_once)
    run(folder)
    assert answer(folder, bad)[-1] == Ended(error=f"no answer: {kind.__name__}: no room for the logits")
    assert answer(folder, good)[-1] == Ended()
    assert texts(answer(folder, good))


def test_the_smallest_temperature_gives_an_answer(workshop: Workshop) -> None:
    folder = playground(workshop)
    number = ask(folder, temperature=MIN_TEMPERATURE)
    run(folder)
    assert answer(folder, number)[-1] == Ended()


def test_an_idle_playground_makes_room_for_another_job(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not before it is asked to, and not with a prompt unanswered."""
    monkeypatch.setattr(recipe, "YIELD_S", 1)
    folder = playground(workshop, playground={"idle_s": 7200})
    number, files = ask(folder), PromptFiles(folder.prompts)

    def want() -> None:
        while not files.is_answered(number):
            time.sleep(0.05)
        time.sleep(1.5)
        assert not files.closed.exists()
        files.ask_for_room(True)

    wanting = threading.Thread(target=want)
    wanting.start()
    run(folder)
    wanting.join()
    assert files.closed.exists()
    assert answer(folder, number)[-1] == Ended()


def test_an_answer_can_be_stopped(workshop: Workshop) -> None:
    folder = playground(workshop, model=str(workshop.model("granitemoe", max_position_embeddings=8192)))
    number, after = ask(folder, max_tokens=4000), ask(folder, max_tokens=1)
    files = PromptFiles(folder.prompts)

    def stop() -> None:
        while not any(isinstance(piece, Text) for piece in answer(folder, number)):
            time.sleep(0.01)
        files.stop(number).touch()

    stopping = threading.Thread(target=stop)
    stopping.start()
    run(folder)
    stopping.join()
    [ended] = [piece for piece in answer(folder, number) if isinstance(piece, Answered)]
    assert ended.reason == "stopped"
    assert 1 <= ended.tokens < 4000
    assert answer(folder, number)[-1] == Ended()
    assert answer(folder, after)[-1] == Ended()


def test_a_cancelled_playground_ends_its_answer_and_answers_the_rest_when_resumed(workshop: Workshop) -> None:
    folder = playground(workshop, model=str(workshop.model("granitemoe", max_position_embeddings=8192)))
    number, waiting = ask(folder, max_tokens=4000), ask(folder, max_tokens=1)

    def cancel() -> None:
        while not any(isinstance(piece, Text) for piece in answer(folder, number)):
            time.sleep(0.01)
        signal.raise_signal(signal.SIGTERM)

    cancelling = threading.Thread(target=cancel)
    cancelling.start()
    with signals_put_back():
        assert train(folder) == STOPPED
    cancelling.join()
    ended = answer(folder, number)[-1]
    assert isinstance(ended, Ended)
    assert ended.error is not None
    assert "cancelled" in ended.error
    assert answer(folder, waiting) == []
    run(folder)
    assert answer(folder, waiting)[-1] == Ended()


def test_what_a_lost_process_left_half_answered_ends_with_an_error(workshop: Workshop) -> None:
    folder = playground(workshop)
    number = ask(folder)
    files = PromptFiles(folder.prompts)
    log = AnswerLog(files.answer(number))
    log.append(Begun(side="on", prompt_tokens=3))
    log.close()
    with files.answer(number).open("a", encoding="utf-8") as file:
        file.write('{"type":"text","side":')
    files.closed.touch()
    run(folder)
    assert answer(folder, number) == [Begun(side="on", prompt_tokens=3), Ended(error=RESTARTED)]


def test_few_tokens_have_their_experts_written_down(workshop: Workshop) -> None:
    folder = playground(workshop)
    number = ask(folder, max_tokens=ROUTED_TOKENS + 8, routing=True, seed=3)
    run(folder)
    pieces = answer(folder, number)
    [ended] = [piece for piece in pieces if isinstance(piece, Answered)]
    assert sum(isinstance(piece, Routed) for piece in pieces) == min(ROUTED_TOKENS, ended.tokens)
