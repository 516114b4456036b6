"""What a host gets as our provider: it opens everything at the start, and is made into a service by the first request.

A host that serves no request of ours then pays for little more than the job store; see `late_routes`.
"""

import asyncio
import threading
from typing import TYPE_CHECKING

from fastapi import APIRouter

from llama_stack_provider_moe.control.server import compat
from llama_stack_provider_moe.control.server.late_routes import Later, LateRouter
from llama_stack_provider_moe.control.server.opening import Opened, opened
from llama_stack_provider_moe.control.server.route_table import PREFIXES, rows
from llama_stack_provider_moe.spec.server_config import ProviderConfig

if TYPE_CHECKING:
    from llama_stack_provider_moe.control.server.service import PostTrainingService
    from llama_stack_provider_moe.control.server.wire import Health


class LateService:
    """The provider, before and after the first request to it.

    Args:
        config: the `config:` of the run YAML.
        deps: the host's APIs, for the rows of data sets.
        policy: the host's access policy; see `callers.whose`.
    """

    def __init__(self, config: ProviderConfig, deps: compat.Deps, policy: compat.Policy = ()) -> None:
        self.config = config
        self._deps = deps
        self._policy = policy
        self._lock = threading.Lock()
        self._opened: Opened | None = None
        self._service: PostTrainingService | None = None
        self._rows = rows(prometheus=config.prometheus)
        self._later = Later(self._router, self._rows)

    async def initialize(self) -> None:
        """Make the state folder, open the store, and start a supervisor for the jobs that an earlier server left."""
        self._opened = await asyncio.to_thread(opened, self.config, self._deps)

    async def shutdown(self) -> None:
        """Close the store; the supervisor and its jobs continue."""
        if self._service is not None:
            await self._service.shutdown()
        elif self._opened is not None:
            await asyncio.to_thread(self._opened.close)

    async def health(self) -> "Health":
        """Return whether the server can accept and run jobs."""
        return await (await asyncio.to_thread(self.service)).health()

    def service(self) -> "PostTrainingService":
        """Return the service itself; the first call imports it."""
        from llama_stack_provider_moe.control.server.service import PostTrainingService

        with self._lock:
            if self._service is None:
                assert self._opened is not None, "`initialize` was called"
                self._service = PostTrainingService(self.config, self._deps, self._policy)
                self._service.serve(self._opened)
            return self._service

    def router(self) -> APIRouter:
        """Return a router with all routes. A host may ask for several; they are built once."""
        return LateRouter(self._later, self._rows, PREFIXES)

    def _router(self) -> APIRouter:
        from llama_stack_provider_moe.control.server import routes

        return routes.create_router(self.service())
