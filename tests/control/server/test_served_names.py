"""Served models in the host's registry, and what a deletion takes along."""

import asyncio
import logging
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import pytest
from llama_stack.core.routing_tables.models import ModelsRoutingTable
from llama_stack_api import Api

from llama_stack_provider_moe.control.server import compat, host_models
from llama_stack_provider_moe.control.server.service import PostTrainingService
from llama_stack_provider_moe.jobdir.state import JobState
from tests.control.server.test_exports import ended, trained
from tests.control.server.test_serving import (
    FINE_TUNING,
    export_of,
    published,
    retrieved,
    router,
    service,
    table,
    toolchain,
)
from tests.support.host_support import Datasets, ask, caller
from tests.support.other_hosts import POLICY

__all__ = ["router", "service", "toolchain"]


# The host's registry.


def with_table(service: PostTrainingService, models: ModelsRoutingTable) -> None:
    service.offers._deps = {Api.models: models}


def served_job(service: PostTrainingService) -> str:
    of = trained(service)
    export_id = export_of(service, of)
    published(service, of, export_id)
    ended(service, export_id, JobState.COMPLETED)
    return of


def readable(models: ModelsRoutingTable, model_id: str) -> bool:
    return asyncio.run(models.get_object_by_identifier("model", model_id)) is not None


def test_a_model_is_its_owners_alone(service: PostTrainingService, tmp_path: Path) -> None:
    models = table(tmp_path, POLICY)
    with_table(service, models)
    with caller("ann", roles=["user"]):
        of = served_job(service)
        model = f"llama-cpp/ft-{of}"
        assert not readable(models, model), "nobody has asked for it yet"
        for _ in range(2):
            assert retrieved(service, of)["fine_tuned_model"] == model
        assert readable(models, model)
    with caller("bob", roles=["user"]):
        assert ask(service, "GET", f"{FINE_TUNING}/jobs/ftjob-{of}").status_code == 404
        assert not readable(models, model)
    with caller("ann", roles=["user"]):
        deleted = ask(service, "DELETE", f"/jobs/{of}").json()
        assert deleted["withdrawn"] == model
        assert not readable(models, model)
        assert not list((tmp_path / "models").iterdir())


@pytest.mark.parametrize("kind", ["llm", "embedding"])
def test_what_the_host_listed_by_itself_becomes_the_owners(
    service: PostTrainingService, tmp_path: Path, kind: str
) -> None:
    models = table(tmp_path, POLICY)
    with_table(service, models)
    with caller("ann"):
        of = served_job(service)
    listed = SimpleNamespace(provider_resource_id=f"ft-{of}", identifier=f"ft-{of}", metadata={}, model_type=kind)
    asyncio.run(models.update_registered_models("llama-cpp", [listed]))
    with caller("ann"):
        assert not readable(models, f"llama-cpp/ft-{of}"), "nobody's, and the policy permits owners alone"
        retrieved(service, of)
        found = asyncio.run(models.get_model(f"llama-cpp/ft-{of}"))
        assert (found.model_type, found.owner.principal) == ("llm", "ann")  # type: ignore[attr-defined]


def test_somebody_elses_entry_stays(
    service: PostTrainingService, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    models = table(tmp_path, POLICY)
    with_table(service, models)
    with caller("ann"):
        of = served_job(service)
    with caller("bob"):
        asyncio.run(host_models.register({Api.models: models}, "llama-cpp", f"ft-{of}"))
    with caller("ann"), caplog.at_level(logging.WARNING):
        retrieved(service, of)
        assert not readable(models, f"llama-cpp/ft-{of}")
    assert "somebody else has registered a model of this name" in caplog.text


def test_an_administrator_registers_nothing(service: PostTrainingService, tmp_path: Path) -> None:
    models = table(tmp_path, POLICY)
    with_table(service, models)
    of = served_job(service)  # of an anonymous owner
    asyncio.run(service.offers.registered(f"llama-cpp/ft-{of}", "somebody"))
    assert asyncio.run(models.get_all_with_type("model")) == []


# Deletion.


def test_a_deleted_export_takes_its_model_along(service: PostTrainingService, tmp_path: Path) -> None:
    of = trained(service)
    export_id = export_of(service, of)
    path = published(service, of, export_id)
    ended(service, export_id, JobState.COMPLETED)
    assert ask(service, "DELETE", f"/jobs/{export_id}").json()["withdrawn"] == f"llama-cpp/ft-{of}"
    assert not path.exists()
    assert retrieved(service, of)["fine_tuned_model"] == of
    export_of(service, of)  # it can be served again


def test_what_could_not_be_withdrawn_is_withdrawn_by_the_next_server(
    service: PostTrainingService, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of = served_job(service)
    path = tmp_path / "models" / f"ft-{of}.gguf"
    with monkeypatch.context() as during:
        during.setattr(
            "llama_stack_provider_moe.serving.servers.take_away", lambda *_: (_ for _ in ()).throw(OSError("stale"))
        )
        deleted = ask(service, "DELETE", f"/jobs/{of}").json()
    assert (deleted["withdrawn"], path.exists()) == (None, True)
    again = PostTrainingService(service.config, {compat.Api.datasets: Datasets()})
    asyncio.run(again.initialize())
    asyncio.run(again.shutdown())
    assert not path.exists()
    assert not list((service.config.state_dir / "deleted").iterdir())


def test_another_file_in_its_place_stays(service: PostTrainingService, tmp_path: Path) -> None:
    of = served_job(service)
    path = tmp_path / "models" / f"ft-{of}.gguf"
    path.unlink()
    path.write_bytes(b"of an operator")
    ask(service, "DELETE", f"/jobs/{of}")
    assert path.read_bytes() == b"of an operator"


def test_the_trail_says_what_was_withdrawn(service: PostTrainingService) -> None:
    of = served_job(service)
    with closing(service.audit):
        ask(service, "DELETE", f"/jobs/{of}")
    trail = (service.config.state_dir / "audit" / "audit.jsonl").read_text()
    assert f'"withdrawn": "llama-cpp/ft-{of}"' in trail
