"""The clients' methods about pipelines."""

from abc import abstractmethod
from collections.abc import Mapping

from llama_stack_provider_moe.client import pipeline_calls
from llama_stack_provider_moe.client.calls import Call
from llama_stack_provider_moe.client.feedback_methods import AsyncFeedbackMethods, FeedbackMethods
from llama_stack_provider_moe.client.pipeline_documents import (
    CreatedPipeline,
    DeletedPipeline,
    Pipeline,
    PipelineLine,
    PipelineList,
    ResumedPipeline,
    ValidatedPipeline,
)


class PipelineMethods(FeedbackMethods):
    """Part of `Client`."""

    @abstractmethod
    def _send[Kind](self, call: Call[Kind]) -> Kind: ...

    def create_pipeline(self, body: Mapping[str, object]) -> CreatedPipeline:
        """Create a pipeline from `parts`, each with `name` and `job`: {pipeline_uuid, jobs, notes}."""
        return self._send(pipeline_calls.create(body))

    def validate_pipeline(self, body: Mapping[str, object]) -> ValidatedPipeline:
        """Run the checks of `create_pipeline` without creating anything: {parts}."""
        return self._send(pipeline_calls.validate(body))

    def pipelines(self, limit: int = 1000, after: str | None = None) -> PipelineList:
        """Return a page of pipelines, newest first: {data, has_more}; `after` is the last one of the page before."""
        return self._send(pipeline_calls.page(limit, after))

    def pipeline(self, pipeline_id: str) -> Pipeline:
        """Return a pipeline and its parts, with their progress: {status, jobs, parts}."""
        return self._send(pipeline_calls.get(pipeline_id))

    def cancel_pipeline(self, pipeline_id: str) -> PipelineLine:
        """Cancel all jobs of a pipeline; repeating it is harmless."""
        return self._send(pipeline_calls.cancel(pipeline_id))

    def resume_pipeline(self, pipeline_id: str) -> ResumedPipeline:
        """Resume the jobs of a pipeline that failed or were cancelled: {pipeline_uuid, jobs}."""
        return self._send(pipeline_calls.resume(pipeline_id))

    def delete_pipeline(self, pipeline_id: str, force: bool = False) -> DeletedPipeline:
        """Delete a pipeline and its jobs; with `force`, even if other jobs need their files: {pipeline_uuid, jobs}."""
        return self._send(pipeline_calls.delete(pipeline_id, force))


class AsyncPipelineMethods(AsyncFeedbackMethods):
    """Part of `AsyncClient`; see `PipelineMethods`."""

    @abstractmethod
    async def _send[Kind](self, call: Call[Kind]) -> Kind: ...

    async def create_pipeline(self, body: Mapping[str, object]) -> CreatedPipeline:
        """Create a pipeline from `parts`, each with `name` and `job`: {pipeline_uuid, jobs, notes}."""
        return await self._send(pipeline_calls.create(body))

    async def validate_pipeline(self, body: Mapping[str, object]) -> ValidatedPipeline:
        """Run the checks of `create_pipeline` without creating anything: {parts}."""
        return await self._send(pipeline_calls.validate(body))

    async def pipelines(self, limit: int = 1000, after: str | None = None) -> PipelineList:
        """Return a page of pipelines, newest first: {data, has_more}; `after` is the last one of the page before."""
        return await self._send(pipeline_calls.page(limit, after))

    async def pipeline(self, pipeline_id: str) -> Pipeline:
        """Return a pipeline and its parts, with their progress: {status, jobs, parts}."""
        return await self._send(pipeline_calls.get(pipeline_id))

    async def cancel_pipeline(self, pipeline_id: str) -> PipelineLine:
        """Cancel all jobs of a pipeline; repeating it is harmless."""
        return await self._send(pipeline_calls.cancel(pipeline_id))

    async def resume_pipeline(self, pipeline_id: str) -> ResumedPipeline:
        """Resume the jobs of a pipeline that failed or were cancelled: {pipeline_uuid, jobs}."""
        return await self._send(pipeline_calls.resume(pipeline_id))

    async def delete_pipeline(self, pipeline_id: str, force: bool = False) -> DeletedPipeline:
        """Delete a pipeline and its jobs; with `force`, even if other jobs need their files: {pipeline_uuid, jobs}."""
        return await self._send(pipeline_calls.delete(pipeline_id, force))
