"""The clients' methods about many jobs: sweeps, labels, what runs where, and what jobs are compared by."""

from abc import abstractmethod
from collections.abc import Mapping

from llama_stack_provider_moe.client import calls
from llama_stack_provider_moe.client.calls import Call
from llama_stack_provider_moe.client.documents import RoutingShares
from llama_stack_provider_moe.client.pipeline_methods import AsyncPipelineMethods, PipelineMethods
from llama_stack_provider_moe.client.sweep_documents import (
    Activity,
    CreatedSweep,
    DeletedSweep,
    GeneratedSamples,
    JobLabels,
    Sweep,
    SweepLine,
    SweepList,
)


class SweepMethods(PipelineMethods):
    """Part of `Client`."""

    @abstractmethod
    def _send[Kind](self, call: Call[Kind]) -> Kind: ...

    def label(self, job_id: str, labels: Mapping[str, str | None], note: str | None = None) -> JobLabels:
        """Change labels and the note of a job; others of its labels stay: {job_uuid, labels, note}.

        Args:
            job_id: name of the job.
            labels: new values by key; None removes a label.
            note: the new note; an empty one removes it, and None leaves it.
        """
        return self._send(calls.label(job_id, labels, note))

    def create_sweep(self, body: Mapping[str, object]) -> CreatedSweep:
        """Create a sweep from `job`, `parameters` and further fields: {sweep_uuid, jobs, notes}."""
        return self._send(calls.create_sweep(body))

    def sweeps(self, limit: int = 1000, after: str | None = None) -> SweepList:
        """Return a page of sweeps, newest first: {data, has_more}; `after` is the last sweep of the page before."""
        return self._send(calls.sweeps(limit, after))

    def sweep(self, sweep_id: str) -> Sweep:
        """Return a sweep and its jobs, the best first: {status, best, data}."""
        return self._send(calls.sweep(sweep_id))

    def cancel_sweep(self, sweep_id: str) -> SweepLine:
        """Cancel all jobs of a sweep; repeating it is harmless."""
        return self._send(calls.cancel_sweep(sweep_id))

    def delete_sweep(self, sweep_id: str, force: bool = False) -> DeletedSweep:
        """Delete a sweep and its jobs; with `force`, even if other jobs need their files: {sweep_uuid, jobs}."""
        return self._send(calls.delete_sweep(sweep_id, force))

    def routing_shares(self, job_id: str) -> RoutingShares:
        """Return the share of every expert over a job's last steps, by layer: {steps, layers, share}."""
        return self._send(calls.routing_shares(job_id))

    def samples(self, job_id: str, step: int | None = None, limit: int = 50) -> GeneratedSamples:
        """Return answers that a GRPO or distill job generated, the newest first or those of a step."""
        return self._send(calls.samples(job_id, step, limit))

    def activity(self) -> Activity:
        """Return what runs on which device, and what waits: {devices, running, waiting}."""
        return self._send(calls.activity())


class AsyncSweepMethods(AsyncPipelineMethods):
    """Part of `AsyncClient`; see `SweepMethods`."""

    @abstractmethod
    async def _send[Kind](self, call: Call[Kind]) -> Kind: ...

    async def label(self, job_id: str, labels: Mapping[str, str | None], note: str | None = None) -> JobLabels:
        """Change labels and the note of a job; see `Client.label`."""
        return await self._send(calls.label(job_id, labels, note))

    async def create_sweep(self, body: Mapping[str, object]) -> CreatedSweep:
        """Create a sweep from `job`, `parameters` and further fields: {sweep_uuid, jobs, notes}."""
        return await self._send(calls.create_sweep(body))

    async def sweeps(self, limit: int = 1000, after: str | None = None) -> SweepList:
        """Return a page of sweeps, newest first: {data, has_more}; `after` is the last sweep of the page before."""
        return await self._send(calls.sweeps(limit, after))

    async def sweep(self, sweep_id: str) -> Sweep:
        """Return a sweep and its jobs, the best first: {status, best, data}."""
        return await self._send(calls.sweep(sweep_id))

    async def cancel_sweep(self, sweep_id: str) -> SweepLine:
        """Cancel all jobs of a sweep; repeating it is harmless."""
        return await self._send(calls.cancel_sweep(sweep_id))

    async def delete_sweep(self, sweep_id: str, force: bool = False) -> DeletedSweep:
        """Delete a sweep and its jobs; with `force`, even if other jobs need their files: {sweep_uuid, jobs}."""
        return await self._send(calls.delete_sweep(sweep_id, force))

    async def routing_shares(self, job_id: str) -> RoutingShares:
        """Return the share of every expert over a job's last steps, by layer: {steps, layers, share}."""
        return await self._send(calls.routing_shares(job_id))

    async def samples(self, job_id: str, step: int | None = None, limit: int = 50) -> GeneratedSamples:
        """Return answers that a job generated; see `Client.samples`."""
        return await self._send(calls.samples(job_id, step, limit))

    async def activity(self) -> Activity:
        """Return what runs on which device, and what waits: {devices, running, waiting}."""
        return await self._send(calls.activity())
