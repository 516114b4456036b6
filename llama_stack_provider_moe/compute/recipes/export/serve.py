"""The step `serve` of an export: publish the result on the server's inference, and require an answer.

Where the result goes comes from the server (`SERVING_VARIABLE`), never from the job. A result that gives no answer is
withdrawn again.
"""

import os
from collections.abc import Callable
from pathlib import Path

from llama_stack_provider_moe.compute.export import servers as adapter_servers
from llama_stack_provider_moe.compute.recipes.export.step_log import Done
from llama_stack_provider_moe.compute.runtime.context import Session
from llama_stack_provider_moe.errors import ExportError, MoeError
from llama_stack_provider_moe.ground import liveness
from llama_stack_provider_moe.jobdir.attempt import require_current
from llama_stack_provider_moe.jobdir.events import now
from llama_stack_provider_moe.serving.placing import place
from llama_stack_provider_moe.serving.record import PlacedFile, ServedRecord, read_record, write_record
from llama_stack_provider_moe.serving.servers import LlamaCpp, OllamaModels, Vllm, first_answer, server_of
from llama_stack_provider_moe.spec import ExportSpec
from llama_stack_provider_moe.spec.serving_config import (
    SERVING,
    SERVING_VARIABLE,
    ServingConfig,
    served_name,
)

type Push = Callable[[str, str], object]  # a model's name and an Ollama server's URL


def asked_of_environment() -> ServingConfig | None:
    """Return the server's `serving`; None if it has none."""
    given = os.environ.get(SERVING_VARIABLE)
    return SERVING.validate_json(given) if given else None


class Publication:
    """One result and the server that it goes to.

    Args:
        session: of the export job.
        adapter: folder of the adapter; None: all weights were trained.
        gguf: the GGUF file, where the server takes one.
        push: creates a model on an Ollama server from that file.

    Raises:
        ExportError: the server has no `serving` any more.
    """

    def __init__(self, session: Session[ExportSpec], adapter: Path | None, gguf: Path | None, push: Push) -> None:
        self._folder = session.folder
        self._base = session.spec.model
        serving = asked_of_environment()
        if serving is None:
            raise ExportError("this server has no `serving` in its configuration any more; configure it, and resume")
        self._serving = serving
        self._adapter, self._gguf, self._push = adapter, gguf, push
        name = served_name(session.spec.of)
        self._record = ServedRecord(kind=self._serving.kind, provider_id=self._serving.provider_id, name=name)
        self._server = server_of(self._serving, name)

    def run(self) -> Done:
        """Publish, ask, and record that the model is served.

        Raises:
            ExportError: it is not served; nothing of it is left on the server, unless the text says so.
        """
        earlier = self._earlier()
        if self._server.is_taken(earlier):
            raise ExportError(f"{self._server.connection.what} at {self._serving.url} has another model named "
                              f"{self._record.name}; nothing was replaced")  # fmt: skip
        require_current()
        # From here on, a deletion of the job looks for the model.
        self._record = self._record if earlier is None else earlier
        write_record(self._folder, self._record)
        try:
            how = self._publish()
            with liveness.stage(f"waiting for the first answer of {self._record.name}"):
                answer = first_answer(self._server.connection, self._record.name, self._serving.answer_s)
            if not self._server.knows():
                raise ExportError(f"{self._server.connection.what} at {self._serving.url} answers as any model, also "
                                  f"as {self._record.name}, which it does not list")  # fmt: skip
            self._keep(served_at=now())
        except BaseException as error:
            self._withdraw(error)
            raise
        note = f"{self._record.model_id} answers after {answer.seconds:g} s ({self._server.connection.what}; {how})"
        figures = {"model": self._record.model_id, "url": self._serving.url, "how": how, "answer": answer.text,
                   "answer_seconds": answer.seconds}  # fmt: skip
        return Done(note=note, figures=figures)

    def _earlier(self) -> ServedRecord | None:
        """What an earlier start published, if the configuration is still the same."""
        try:
            found = read_record(self._folder)
        except (OSError, ValueError) as error:
            raise ExportError(f"{self._folder.served.name} can't be read: {error}") from None
        if found is None or (found.kind, found.model_id) == (self._record.kind, self._record.model_id):
            return found
        raise ExportError(f"an earlier start published {found.model_id} with {found.kind}, and `serving` has changed "
                          "since; delete this export and ask for another")  # fmt: skip

    def _keep(self, **changes: object) -> None:
        self._record = self._record.model_copy(update=changes)
        write_record(self._folder, self._record)

    def _publish(self) -> str:
        """Put the model on the server; return how."""
        match self._server:
            case LlamaCpp():
                return self._place(self._server)
            case OllamaModels():
                self._push(self._record.name, self._serving.url)
                return "pushed"
            case Vllm():
                return self._load(self._server)

    def _place(self, server: LlamaCpp) -> str:
        assert self._gguf is not None, "the step needs the file"

        def record(file: PlacedFile) -> None:
            self._keep(file=file)

        how = "already there"
        if self._record.file is None or not self._record.file.is_at(server.target):
            how = "linked" if place(self._gguf, server.target, record) else "copied"
        if not server.knows():
            raise ExportError(f"llama.cpp's server at {self._serving.url} does not list {self._record.name}; it must "
                              f"run with --models-dir {server.target.parent}")  # fmt: skip
        return how

    def _load(self, server: Vllm) -> str:
        assert self._adapter is not None, "refused when it was submitted"
        if self._base not in server.bases():
            raise ExportError(f"vLLM at {self._serving.url} runs {', '.join(sorted(server.bases())) or 'no model'}; "
                              f"the adapter needs its base {self._base}")  # fmt: skip
        said = adapter_servers.vllm(self._model_type(), adapter_servers.read_kind(self._adapter))
        if said.applies != "yes":  # it may load an adapter and answer like the base
            raise ExportError(f"not known to apply this adapter: {said.text()}. Serve a GGUF file instead")
        server.load(str(self._adapter), self._serving.answer_s)
        return "adapter loaded"

    def _model_type(self) -> str:
        from transformers import AutoConfig  # takes seconds to import

        return str(AutoConfig.from_pretrained(self._base).get_text_config().model_type).removesuffix("_text")

    def _withdraw(self, why: BaseException) -> None:
        try:
            self._server.withdraw(self._record)
        except (MoeError, OSError) as error:  # the record stays, so deleting the job tries again
            why.add_note(f"{self._record.name} could not be withdrawn either: {error}")
            return
        self._folder.served.unlink(missing_ok=True)
