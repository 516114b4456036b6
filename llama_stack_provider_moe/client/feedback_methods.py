"""The clients' methods about conversations that shields flagged."""

from abc import abstractmethod

from llama_stack_provider_moe.client.calls import Call
from llama_stack_provider_moe.client.dataset_documents import ErasedFeedback, KeptFeedback, PushedDataset


def kept() -> Call[KeptFeedback]:
    """Ask how many there are."""
    return Call(KeptFeedback, "GET", "/feedback")


def push(name: str, only: str, shield: str | None, everybody: bool) -> Call[PushedDataset]:
    """Make a data set of them."""
    body: dict[str, object] = {"name": name, "only": only, "shield": shield, "everybody": everybody}
    return Call(PushedDataset, "POST", "/feedback", body=body)


def erase() -> Call[ErasedFeedback]:
    """Delete them."""
    return Call(ErasedFeedback, "DELETE", "/feedback")


class FeedbackMethods:
    """Part of `Client`."""

    @abstractmethod
    def _send[Kind](self, call: Call[Kind]) -> Kind: ...

    def feedback(self) -> KeptFeedback:
        """Return how many of your conversations shields have flagged: {rows, answered, bytes}."""
        return self._send(kept())

    def push_feedback(
        self, name: str, only: str = "all", shield: str | None = None, everybody: bool = False
    ) -> PushedDataset:
        """Make flagged conversations the current version of a data set; the same ones again are the same version.

        Args:
            name: name of the data set.
            only: `all`, or `answered`: those that end with an answer.
            shield: only what this shield flagged; None: any.
            everybody: those of every user, for administrators; else your own.
        """
        return self._send(push(name, only, shield, everybody))

    def erase_feedback(self) -> ErasedFeedback:
        """Delete your flagged conversations: {bytes}. Data sets and jobs keep their copies."""
        return self._send(erase())


class AsyncFeedbackMethods:
    """Part of `AsyncClient`; see `FeedbackMethods`."""

    @abstractmethod
    async def _send[Kind](self, call: Call[Kind]) -> Kind: ...

    async def feedback(self) -> KeptFeedback:
        """Return how many of your conversations shields have flagged: {rows, answered, bytes}."""
        return await self._send(kept())

    async def push_feedback(
        self, name: str, only: str = "all", shield: str | None = None, everybody: bool = False
    ) -> PushedDataset:
        """Make flagged conversations the current version of a data set; the same ones again are the same version.

        Args:
            name: name of the data set.
            only: `all`, or `answered`: those that end with an answer.
            shield: only what this shield flagged; None: any.
            everybody: those of every user, for administrators; else your own.
        """
        return await self._send(push(name, only, shield, everybody))

    async def erase_feedback(self) -> ErasedFeedback:
        """Delete your flagged conversations: {bytes}. Data sets and jobs keep their copies."""
        return await self._send(erase())
