"""A router on a port of this machine, without a host."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn
from fastapi import APIRouter, FastAPI

from tests.support.jobs_support import wait_for


@contextmanager
def served(router: APIRouter) -> Iterator[str]:
    """Serve it with uvicorn until the block ends; yields the URL."""
    app = FastAPI()
    app.router.routes.extend(router.routes)
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning", lifespan="off"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        wait_for(lambda: server.started)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
