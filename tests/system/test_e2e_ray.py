"""All three recipes over HTTP on a real Ray cluster of two nodes, by each strategy: they leave what one process leaves.

    MOE_TEST_RAY=1 .venv/bin/python -m pytest tests/system/test_e2e_ray.py

Each job imports its libraries on both nodes anew, some minutes in all, so `make test` has one of each on Ray elsewhere
(`tests.control.supervisor.test_ray`) and leaves these out.
"""

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.support import tiny_models, together_jobs
from tests.support.host_harness import QUICKSTART, Server, run_config, serving
from tests.support.ray_cluster import Cluster
from tests.system.test_e2e import DPO_ROWS, SFT_ROWS, asking
from tests.system.test_e2e_experts import KEPT_ROWS, ended, weights

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif("MOE_TEST_RAY" not in os.environ, reason="some minutes; MOE_TEST_RAY=1 runs them"),
    pytest.mark.timeout(3600),
]
TWO_NODES = {"gpus": 0, "processes": 1, "nodes": 2, "executor": "ray"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    cluster = Cluster()
    try:
        cluster.start(nodes=2)
        folder = tmp_path_factory.mktemp("e2e-ray")
        provider = {
            "child_env": {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
            "supervisor": {"max_concurrent_jobs": 1, "poll_s": 1},
            "executors": {"ray": {"address": cluster.url, "token_file": str(cluster.token_file)}},
        }
        with serving(run_config(QUICKSTART, folder, provider=provider), folder / "state") as running:
            for family, _ in together_jobs.RECIPES.values():
                tiny_models.build(family, running.state_dir / "models" / family)
            for name, rows in (("words", SFT_ROWS), ("pairs", DPO_ROWS), ("kept", KEPT_ROWS)):
                running.register(name, rows)
            yield running
    finally:
        cluster.close()


@pytest.fixture(scope="module")
def jobs(server: Server) -> dict[str, dict[str, Any]]:
    """Run each recipe in one process here, and on two nodes with each strategy."""
    with asking(server) as http:
        bodies = together_jobs.bodies(server.state_dir / "models")
        for body in bodies:
            if "resources" in body:
                body["resources"] = {**TWO_NODES, "strategy": body["resources"]["strategy"]}
            answer = http.post("/jobs", json=body)
            assert answer.status_code == 200, answer.text
        return ended(http, [body["job_uuid"] for body in bodies])


@pytest.mark.parametrize(("recipe", "strategy"), together_jobs.PAIRS)
def test_two_nodes_leave_what_one_process_leaves(
    jobs: dict[str, dict[str, Any]], server: Server, recipe: str, strategy: str
) -> None:
    alone, both = jobs[f"{recipe}-alone"], jobs[f"{recipe}-{strategy}"]
    assert (alone["status"], both["status"]) == ("completed", "completed"), (alone["reason"], both["reason"])
    assert (both["resolved"]["processes"], both["resolved"]["strategy"]) == (2, strategy)
    with asking(server) as http:
        log = (server.state_dir / "jobs" / both["job_uuid"] / "output.log").read_text()
        expected, found = (weights(http, job["job_uuid"]) for job in (alone, both))
    assert "on Ray: 2 nodes" in log
    assert found.keys() == expected.keys()
    far = max((found[name] - tensor).abs().max().item() for name, tensor in expected.items())
    print(f"{recipe} by {strategy} on two nodes: weights {far:.1e} apart")
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
