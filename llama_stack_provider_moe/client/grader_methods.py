"""The clients' methods about graders."""

from abc import abstractmethod
from collections.abc import Mapping

from llama_stack_provider_moe.client.calls import Call
from llama_stack_provider_moe.client.grader_documents import GraderRun, ValidatedGrader


def validate(grader: Mapping[str, object]) -> Call[ValidatedGrader]:
    """Check a grader."""
    return Call(ValidatedGrader, "POST", "/graders/validate", body={"grader": dict(grader)})


def run(
    grader: Mapping[str, object], model_sample: str, item: Mapping[str, object] | None, output_tokens: int | None
) -> Call[GraderRun]:
    """Run a grader on an answer.

    Args:
        grader: an object with `type` and `name`.
        model_sample: the answer.
        item: the row that it answers; None: an empty one.
        output_tokens: number of the answer's tokens; None: not known.
    """
    body: dict[str, object] = {"grader": dict(grader), "model_sample": model_sample, "item": dict(item or {})}
    if output_tokens is not None:
        body["output_tokens"] = output_tokens
    return Call(GraderRun, "POST", "/graders/run", body=body)


class GraderMethods:
    """Part of `Client`."""

    @abstractmethod
    def _send[Kind](self, call: Call[Kind]) -> Kind: ...

    def validate_grader(self, grader: Mapping[str, object]) -> ValidatedGrader:
        """Check a grader, such as `{"type": "math", "name": "right"}`: {grader, range, runs}."""
        return self._send(validate(grader))

    def run_grader(
        self,
        grader: Mapping[str, object],
        model_sample: str,
        item: Mapping[str, object] | None = None,
        output_tokens: int | None = None,
    ) -> GraderRun:
        """Run a grader on an answer: {reward, sub_rewards, metadata}.

        Args:
            grader: an object with `type` and `name`.
            model_sample: the answer.
            item: the row that it answers.
            output_tokens: number of the answer's tokens, for graders that count them.
        """
        return self._send(run(grader, model_sample, item, output_tokens))


class AsyncGraderMethods:
    """Part of `AsyncClient`; see `GraderMethods`."""

    @abstractmethod
    async def _send[Kind](self, call: Call[Kind]) -> Kind: ...

    async def validate_grader(self, grader: Mapping[str, object]) -> ValidatedGrader:
        """Check a grader: {grader, range, runs}."""
        return await self._send(validate(grader))

    async def run_grader(
        self,
        grader: Mapping[str, object],
        model_sample: str,
        item: Mapping[str, object] | None = None,
        output_tokens: int | None = None,
    ) -> GraderRun:
        """Run a grader on an answer: {reward, sub_rewards, metadata}; see `Client.run_grader`.

        Args:
            grader: an object with `type` and `name`.
            model_sample: the answer.
            item: the row that it answers.
            output_tokens: number of the answer's tokens, for graders that count them.
        """
        return await self._send(run(grader, model_sample, item, output_tokens))
