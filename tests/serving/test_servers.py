"""The inference servers' protocols: what is asked, and errors that say who refused what."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from llama_stack_provider_moe.errors import ExportError
from llama_stack_provider_moe.serving.record import PlacedFile, ServedRecord
from llama_stack_provider_moe.serving.servers import Vllm, first_answer, server_of
from llama_stack_provider_moe.serving.wire import Unreachable
from llama_stack_provider_moe.spec.serving_config import LlamaCppServing, OllamaServing, VllmServing
from tests.support.inference_servers import State, inference
from tests.support.ollama_server import ollama

NAME = "ft-job"


@pytest.fixture
def router(tmp_path: Path) -> Iterator[tuple[LlamaCppServing, State]]:
    with inference(tmp_path) as (url, state):
        yield LlamaCppServing(kind="llama_cpp", provider_id="llama-cpp", url=url, models_dir=tmp_path), state


@pytest.fixture
def vllm() -> Iterator[tuple[VllmServing, State]]:
    with inference() as (url, state):
        state.bases = [{"id": "base", "root": "owner/name"}]
        yield VllmServing(kind="vllm", provider_id="vllm", url=url), state


def record(kind: str, file: PlacedFile | None = None) -> ServedRecord:
    return ServedRecord.model_validate({"kind": kind, "provider_id": "p", "name": NAME, "file": file})


def test_the_router_lists_a_file_and_answers(router: tuple[LlamaCppServing, State]) -> None:
    serving, state = router
    server = server_of(serving, NAME)
    assert (server.is_taken(None), server.knows()) == (False, False)
    path = serving.models_dir / f"{NAME}.gguf"
    path.write_bytes(b"GGUF")
    assert server.is_taken(None), "of somebody else"
    own = record("llama_cpp", PlacedFile.of(path))
    assert (server.is_taken(own), server.knows()) == (False, True)
    assert first_answer(server.connection, NAME, 10).text == "Yes"
    server.withdraw(own)
    assert (path.exists(), state.listed) == (False, set())
    server.withdraw(own)


def test_a_router_that_is_stopped_keeps_no_file(router: tuple[LlamaCppServing, State]) -> None:
    serving = router[0].model_copy(update={"url": "http://127.0.0.1:9"})
    path = serving.models_dir / f"{NAME}.gguf"
    path.write_bytes(b"GGUF")
    server_of(serving, NAME).withdraw(record("llama_cpp", PlacedFile.of(path)))
    assert not path.exists()


def test_ollama_has_a_model_until_it_is_deleted() -> None:
    with ollama() as (url, state):
        serving = OllamaServing(kind="ollama", provider_id="ollama", url=url)
        server = server_of(serving, NAME)
        assert not server.is_taken(None)
        state.models[NAME] = {}
        assert (server.is_taken(None), server.is_taken(record("ollama"))) == (True, False)
        assert first_answer(server.connection, NAME, 10).text == "Yes"
        server.withdraw(record("ollama"))
        assert state.models == {}
        server.withdraw(record("ollama"))
        state.answers["DELETE", "/api/delete"] = (500, {"error": "no such luck"})
        with pytest.raises(ExportError, match="refused deleting the model with 500: 'no such luck'"):
            server.withdraw(record("ollama"))
    with pytest.raises(Unreachable, match=re.escape(f"no server answers at {url} (Ollama: ")):
        server.withdraw(record("ollama"))


def test_vllm_loads_an_adapter_again_and_unloads_it(vllm: tuple[VllmServing, State], tmp_path: Path) -> None:
    serving, state = vllm
    server = server_of(serving, NAME)
    assert isinstance(server, Vllm)
    assert server.bases() == {"base", "owner/name"}
    with pytest.raises(ExportError, match=r"could not load .*VLLM_ALLOW_RUNTIME_LORA_UPDATING=True"):
        server.load(str(tmp_path), 10)
    (tmp_path / "adapter_config.json").write_text("{}")
    for _ in range(2):  # an earlier attempt may have loaded it
        server.load(str(tmp_path), 10)
    assert state.adapters == {NAME: str(tmp_path)}
    assert server.bases() == {"base", "owner/name"}, "an adapter is not a base"
    assert (server.is_taken(None), server.is_taken(record("vllm"))) == (True, False)
    server.withdraw(record("vllm"))
    assert state.adapters == {}
    server.withdraw(record("vllm"))


def test_vllm_that_has_ended_has_no_adapters() -> None:
    serving = VllmServing(kind="vllm", provider_id="vllm", url="http://127.0.0.1:9")
    server_of(serving, NAME).withdraw(record("vllm"))


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (
            (404, {"error": {"message": "model 'ft-job' not found"}}),
            "refused answering as ft-job with 404: \"model 'ft",
        ),
        ((200, {"choices": []}), "gave no answer as ft-job"),
        ((200, "<html>"), "while answering as ft-job; expected a JSON object"),
        ((302, {}), "refused answering as ft-job with 302"),
    ],
    ids=["unknown", "empty", "another server", "redirect"],
)
def test_an_answer_is_required(router: tuple[LlamaCppServing, State], answer: tuple[int, object], told: str) -> None:
    serving, state = router
    state.answers["POST", "/v1/chat"] = answer
    with pytest.raises(ExportError, match=re.escape(told)):
        first_answer(server_of(serving, NAME).connection, NAME, 10)


def test_another_server_lists_no_models(router: tuple[LlamaCppServing, State]) -> None:
    serving, state = router
    state.answers["GET", "/models"] = (200, {"models": []})
    with pytest.raises(ExportError, match=r"lists no models at /models\?reload=1; expected a list `data`"):
        server_of(serving, NAME).knows()
