"""Which `Host` a server without authentication answers to, and parameters that no route knows."""

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from llama_stack_provider_moe.control.server.own_names import must_be_own_name
from llama_stack_provider_moe.control.server.routes import OLDER_PREFIX, PREFIX
from llama_stack_provider_moe.control.server.service import PostTrainingService
from llama_stack_provider_moe.errors import Forbidden
from tests.support.host_support import ask, caller, over_http, serving_in_process

OWN = ("localhost", "LOCALHOST:8321", "localhost.", "moe.localhost", "127.0.0.1:8321", "127.9.9.9", "[::1]:8321",
       "[::ffff:127.0.0.1]", "proxy.example.org", "Proxy.Example.org:443")  # fmt: skip
FOREIGN = ("evil.example", "evil.example:8321", "localhost.evil.example", "127.0.0.1.evil.example", "10.0.0.1", "",
           "[fe80::1]", "notlocalhost", "x.proxy.example.org")  # fmt: skip


@pytest.mark.parametrize("host", OWN)
def test_own_names_are_answered(host: str) -> None:
    must_be_own_name("127.0.0.1", host, ["proxy.example.org"])
    must_be_own_name("::1", host, ["proxy.example.org"])


@pytest.mark.parametrize("host", FOREIGN)
def test_other_names_are_refused(host: str) -> None:
    for server in ("127.0.0.1", "::1", "::ffff:127.0.0.1"):
        with pytest.raises(Forbidden, match="is not a name of this server"):
            must_be_own_name(server, host, ["proxy.example.org"])
    must_be_own_name("192.168.1.7", host, [])  # its names are known to the network alone


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PostTrainingService]:
    with serving_in_process(tmp_path_factory.mktemp("names"), allowed_hosts=["moe.example.org"]) as made:
        yield made


def test_a_page_that_leads_its_name_here_reads_and_changes_nothing(service: PostTrainingService) -> None:
    """Also with the headers that such a page can set; a proxy's name is answered where the operator lists it."""
    with over_http(service) as url:
        for headers in ({"Host": "evil.example"}, {"Host": "evil.example", "X-Forwarded-Host": "localhost"}):
            for method, path in (("GET", "/jobs"), ("GET", "/activity"), ("POST", "/jobs/x/cancel")):
                answer = httpx.request(method, f"{url}{PREFIX}{path}", headers=headers)
                assert answer.status_code == 403, (headers, path)
                assert "'evil.example' is not a name of this server" in answer.json()["error"]["message"]
        for host in ("localhost", "moe.example.org:443"):
            assert httpx.get(f"{url}{PREFIX}/jobs", headers={"Host": host}).status_code == 200
        # They hold no data, and probes and proxies ask them by any name.
        for path in (f"{PREFIX}/health", "/moe"):
            assert httpx.get(url + path, headers={"Host": "evil.example"}).status_code == 200


QUERIES: tuple[tuple[str, str], ...] = (
    ("GET", "/jobs"), ("PATCH", "/jobs/a"), ("GET", "/jobs/a"), ("GET", "/jobs/a/report"),
    ("GET", "/jobs/a/routing/shares"), ("GET", "/jobs/a/samples"),
    ("GET", "/jobs/a/prompts"), ("POST", "/jobs/a/prompts"), ("GET", "/jobs/a/prompts/1"), ("GET", "/sweeps"),
    ("GET", "/sweeps/a"), ("POST", "/sweeps/a/cancel"), ("DELETE", "/sweeps/a"), ("GET", "/activity"),
    ("GET", "/overview"), ("GET", "/datasets"), ("PUT", "/datasets/a"),
)  # fmt: skip


@pytest.mark.parametrize(("method", "path"), QUERIES)
def test_an_unknown_parameter_is_refused(service: PostTrainingService, method: str, path: str) -> None:
    body: dict[str, Any] = {"json": {}} if method in ("POST", "PATCH") else {}
    answer = ask(service, method, path, params={"limt": "3"}, **body)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"].startswith("limt: unknown parameter; expected ")


def test_the_error_lists_the_parameters(service: PostTrainingService) -> None:
    answer = ask(service, "GET", "/sweeps", params={"limt": "3", "limit": 3})
    assert answer.json()["error"]["message"] == "limt: unknown parameter; expected limit, after"
    assert ask(service, "GET", "/sweeps", params={"limit": 3}).status_code == 200


@pytest.mark.parametrize("prefix", [PREFIX, OLDER_PREFIX])
def test_routes_of_the_host_take_what_clients_add(service: PostTrainingService, prefix: str) -> None:
    with over_http(service) as url:
        assert httpx.get(f"{url}{prefix}/health", params={"from": "probe"}).status_code == 200
        answer = httpx.get(f"{url}{prefix}/job/status", params={"job_uuid": "a", "more": 1})
        assert answer.status_code == 404
    with caller("ann"):
        assert ask(service, "GET", "/jobs").status_code == 200
