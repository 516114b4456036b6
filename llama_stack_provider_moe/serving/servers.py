"""The three kinds of inference server behind one interface. `publish` is in the export's step, where the files are."""

import time
from typing import Any, NamedTuple, Protocol

import httpx

from llama_stack_provider_moe.errors import ExportError, shorten
from llama_stack_provider_moe.serving.placing import path_of, take_away
from llama_stack_provider_moe.serving.record import ServedRecord
from llama_stack_provider_moe.serving.wire import READ_S, Connection, Unreachable
from llama_stack_provider_moe.spec.serving_config import LlamaCppServing, OllamaServing, ServingConfig, VllmServing


class Answer(NamedTuple):
    """The first answer of a model.

    Attributes:
        text: what it said, which may be empty: it is one token.
        seconds: how long it took, with the loading of the model.
    """

    text: str
    seconds: float


class InferenceServer(Protocol):
    """What a model on an inference server needs from publication to withdrawal."""

    connection: Connection

    def is_taken(self, record: ServedRecord | None) -> bool:
        """Whether the server has a model of this name that is not the one in `record`."""

    def knows(self) -> bool:
        """Whether the server lists the model."""

    def withdraw(self, record: ServedRecord) -> None:
        """Take the model away; does nothing where it is gone.

        Raises:
            ExportError, OSError: it is still there.
        """


class LlamaCpp:
    """llama.cpp's router: a folder of files, and a list that is read again on request."""

    def __init__(self, serving: LlamaCppServing, name: str, patience_s: float = READ_S) -> None:
        self.connection = Connection("llama.cpp's server", serving.url, patience_s)
        self.target = path_of(serving.models_dir, name)
        self._name = name

    def is_taken(self, record: ServedRecord | None) -> bool:
        """See `InferenceServer`."""
        placed = None if record is None else record.file
        return self.target.exists() and not (placed is not None and placed.is_at(self.target))

    def knows(self) -> bool:
        """See `InferenceServer`. `reload` lets the router read its folder again; other servers ignore it."""
        return self._name in _ids(self.connection, "/models?reload=1")

    def withdraw(self, record: ServedRecord) -> None:
        """See `InferenceServer`."""
        if not take_away(self.target, record.file):
            return
        try:
            self.knows()  # a router that has it loaded unloads it
        except ExportError:  # it is stopped, or will find out by itself
            return


class OllamaModels:
    """An Ollama server."""

    def __init__(self, serving: OllamaServing, name: str, patience_s: float = READ_S) -> None:
        self.connection = Connection("Ollama", serving.url, patience_s)
        self._name = name

    def is_taken(self, record: ServedRecord | None) -> bool:
        """See `InferenceServer`."""
        return record is None and self.knows()

    def knows(self) -> bool:
        """See `InferenceServer`."""
        answer = self.connection.ask("asking for the model", "POST", "/api/show", {"model": self._name}, also=(404,))
        return answer.status_code != httpx.codes.NOT_FOUND

    def withdraw(self, record: ServedRecord) -> None:
        """See `InferenceServer`."""
        self.connection.ask("deleting the model", "DELETE", "/api/delete", {"model": record.name}, also=(404,))


class Vllm:
    """A vLLM server with VLLM_ALLOW_RUNTIME_LORA_UPDATING."""

    def __init__(self, serving: VllmServing, name: str, patience_s: float = READ_S) -> None:
        self.connection = Connection("vLLM", serving.url, patience_s)
        self._name = name

    def is_taken(self, record: ServedRecord | None) -> bool:
        """See `InferenceServer`."""
        return record is None and self.knows()

    def knows(self) -> bool:
        """See `InferenceServer`."""
        return self._name in _ids(self.connection, "/v1/models")

    def bases(self) -> set[str]:
        """The ids and paths of the models that it runs, adapters left out."""
        found = _models(self.connection, "/v1/models")
        return {str(each[key]) for each in found if not each.get("parent") for key in ("id", "root") if each.get(key)}

    def load(self, adapter: str, limit_s: float) -> None:
        """Load an adapter under the model's name; one that an earlier attempt loaded is replaced.

        Args:
            adapter: its folder.
            limit_s: longest wait.

        Raises:
            ExportError: it refuses.
        """
        if self.knows():
            self._unload()
        body = {"lora_name": self._name, "lora_path": adapter}
        answer = self.connection.ask("loading the adapter", "POST", "/v1/load_lora_adapter", body, (404,), limit_s)
        if answer.status_code == httpx.codes.NOT_FOUND:
            raise ExportError(
                f"vLLM at {self.connection.url} could not load {adapter}: {shorten(answer.text, 300)}; it must be "
                "started with --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True, and reach that folder"
            )

    def withdraw(self, record: ServedRecord) -> None:
        """See `InferenceServer`. vLLM forgets adapters when it ends."""
        try:
            if self.knows():
                self._unload()
        except Unreachable:
            return

    def _unload(self) -> None:
        body = {"lora_name": self._name}
        self.connection.ask("unloading the adapter", "POST", "/v1/unload_lora_adapter", body, (404,))


def server_of(serving: ServingConfig, name: str, patience_s: float = READ_S) -> LlamaCpp | OllamaModels | Vllm:
    """The server that is configured, for one model.

    Args:
        serving: the configuration.
        name: of the model.
        patience_s: longest wait for most of its answers.
    """
    match serving:
        case LlamaCppServing():
            return LlamaCpp(serving, name, patience_s)
        case OllamaServing():
            return OllamaModels(serving, name, patience_s)
        case VllmServing():
            return Vllm(serving, name, patience_s)


def first_answer(connection: Connection, name: str, limit_s: float) -> Answer:
    """Ask the model for one token, and return what it says.

    Args:
        connection: to the server.
        name: of the model.
        limit_s: longest wait, for loading it too.

    Raises:
        ExportError: it gives no answer.
    """
    doing, began = f"answering as {name}", time.monotonic()
    body = {"model": name, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1, "temperature": 0}
    answer = connection.ask(doing, "POST", "/v1/chat/completions", body, limit_s=limit_s)
    content = connection.document(doing, answer)
    try:
        text = content["choices"][0]["message"].get("content")
    except (KeyError, IndexError, TypeError, AttributeError):
        raise ExportError(f"{connection.what} at {connection.url} gave no answer as {name}: "
                          f"{shorten(answer.text, 300)}") from None  # fmt: skip
    return Answer(text if isinstance(text, str) else "", round(time.monotonic() - began, 3))


def _ids(connection: Connection, path: str) -> set[str]:
    return {str(each.get("id")) for each in _models(connection, path)}


def _models(connection: Connection, path: str) -> list[dict[str, Any]]:
    doing = "asking for its models"
    listed = connection.document(doing, connection.ask(doing, "GET", path)).get("data")
    if not isinstance(listed, list):
        raise ExportError(f"{connection.what} at {connection.url} lists no models at {path}; expected a list `data`")
    return [each for each in listed if isinstance(each, dict)]
