"""What a server does not do before its first request: contracts, because a start's time is hard to test."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import fastapi.routing
import pytest
from fastapi import FastAPI
from fastapi.routing import APIRoute

from llama_stack_provider_moe.control.server import wire_requests
from llama_stack_provider_moe.control.server.routes import create_router
from llama_stack_provider_moe.control.server.schemas import SchemaOf, inlined
from llama_stack_provider_moe.spec import Moe
from tests.support.host_support import app_of, serving_in_process

# Libraries that no start of a server needs, and modules of ours that serve other processes. They take from 50 ms to
# seconds each; the host may load one of them itself, which does not count.
NOT_AT_START = (
    "torch", "transformers", "datasets", "accelerate", "triton", "matplotlib", "huggingface_hub", "pyarrow", "lm_eval",
    "llama_stack_provider_moe.control.cli", "llama_stack_provider_moe.compute", "llama_stack_provider_moe.client",
    "llama_stack_provider_moe.control.store.migrations.to_9",
)  # fmt: skip

# What only requests need. All of it together takes more processor time than the rest of our start.
NOT_BEFORE_A_REQUEST = tuple(
    f"llama_stack_provider_moe.{name}"
    for name in (
        "control.server.routes", "control.server.service", "control.server.wire", "control.supervisor.supervisor",
        "control.config_check.run_yaml", "jobdir.events", "spec.job_spec", "spec.training_jobs", "spec.graders",
        "spec.default_blocks", "spec.rows.columns",
    )
)  # fmt: skip


def test_a_start_imports_nothing_for_other_processes_and_nothing_for_requests(tmp_path: Path) -> None:
    """A start as a host makes it, up to the routes. The first request loads the rest, see `late_routes`."""
    code = (
        "import sys\n"
        "import llama_stack.core.server.server\n"
        "hosts = set(sys.modules)\n"
        "import asyncio, llama_stack_provider_moe, llama_stack_provider_moe.provider as provider\n"
        "from llama_stack_provider_moe.control.config_check.start import HostConfig\n"
        "provider.get_provider_spec()\n"
        f"config = HostConfig(state_dir={str(tmp_path / 'state')!r}, defaults={{'training': {{'dtype': 'fp32'}}}})\n"
        "impl = asyncio.run(llama_stack_provider_moe.get_provider_impl(config, {}))\n"
        "llama_stack_provider_moe.create_router(impl)\n"
        f"unwanted = {(*NOT_AT_START, *NOT_BEFORE_A_REQUEST)!r}\n"
        "print([each for each in unwanted if each in set(sys.modules) - hosts])\n"
        "asyncio.run(impl.shutdown())"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600, check=True)
    assert ended.stdout.splitlines()[-1] == "[]"


def test_what_requests_need_loads_nothing_for_other_processes() -> None:
    code = (
        "import sys\n"
        "import llama_stack.core.server.server\n"
        "hosts = set(sys.modules)\n"
        "from llama_stack_provider_moe.control.server import routes, service\n"
        f"print([each for each in {NOT_AT_START!r} if each in set(sys.modules) - hosts])"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600, check=True)
    assert ended.stdout.splitlines()[-1] == "[]"


def test_routes_build_few_validators(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """FastAPI builds one for each model of a route, when it is made and when it is included: refusals have none."""
    built: list[object] = []
    real = fastapi.routing.create_model_field

    def counted(*arguments: Any, **keywords: Any) -> Any:
        built.append(keywords.get("name"))
        return real(*arguments, **keywords)

    monkeypatch.setattr(fastapi.routing, "create_model_field", counted)
    with serving_in_process(tmp_path) as service:
        router = create_router(service)
        app = FastAPI()
        app.include_router(router)
    assert not [name for name in built if str(name).startswith(("Response_4", "Response_501"))]
    assert len(built) <= 1.5 * len(router.routes), "an answer of most routes, and no more"


def test_no_request_builds_a_validator_of_a_route(tmp_path: Path) -> None:
    """Blocks build theirs when they are first used, which for the body of a route would be on the event loop."""
    with serving_in_process(tmp_path) as service:
        routes = [route for route in create_router(service).routes if isinstance(route, APIRoute)]
    late = {
        route.path
        for route in routes
        for field in (route.body_field, route.response_field, *route.dependant.query_params)
        if field is not None and not field._type_adapter.pydantic_complete
    }
    assert not late, "give their blocks `model_config = BUILT_AT_ONCE`"


def test_the_document_still_has_the_refusals_and_the_blocks(tmp_path: Path) -> None:
    with serving_in_process(tmp_path) as service:
        document = app_of(service).openapi()
    answers = document["paths"]["/v1alpha/post-training/jobs"]["post"]["responses"]
    for status in ("400", "401", "403", "404", "409", "413", "429", "500", "501", "503", "507"):
        schema = answers[status]["content"]["application/json"]["schema"]
        assert schema["properties"]["error"]["properties"]["message"]["type"] == "string"
    request = document["components"]["schemas"]["SupervisedFineTuneRequest"]["properties"]
    moe = next(each for each in request["moe"]["anyOf"] if each.get("type") == "object")
    assert moe["properties"].keys() == inlined(Moe)["properties"].keys() == Moe.model_fields.keys()
    assert "$ref" not in str(moe)


def test_a_blocks_schema_is_made_when_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[object] = []
    monkeypatch.setattr(Moe, "model_json_schema", classmethod(lambda cls: made.append(cls) or {}))
    assert any(isinstance(each, SchemaOf) for each in wire_requests.MoeBlock.__metadata__)
    assert not made
