"""Files of deploy/ and the Containerfile, none of which is run here: they parse, and what they name exists."""

import configparser
import json
import re
import shlex
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from llama_stack_provider_moe.control.cli.hosts import HOSTS
from llama_stack_provider_moe.control.config_check.run_yaml import read_run_config
from tests.contracts.doc_blocks import ROOT
from tests.contracts.doc_shell import require_known, require_parses

DEPLOY = ROOT / "deploy"
CONTAINERFILE = (ROOT / "Containerfile").read_text(encoding="utf-8").replace("\\\n", " ")
COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text(encoding="utf-8"))
MANIFESTS = list(yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text(encoding="utf-8")))
UNITS = sorted((DEPLOY / "systemd").glob("*.service"))
USER = "10001"
# Of llamastack.io/v1alpha1 (the operator's api/v1alpha1/llamastackdistribution_types.go), what we use and what is near.
OPERATOR_FIELDS = {
    "spec": {"replicas", "server"},
    "server": {"distribution", "containerSpec", "podOverrides", "storage", "userConfig", "tlsConfig"},
    "distribution": {"name", "image"},
    "containerSpec": {"name", "port", "resources", "env", "envFrom", "command", "args"},
    "podOverrides": {"serviceAccountName", "volumes", "volumeMounts"},
    "userConfig": {"configMapName", "configMapNamespace"},
}


def by_kind(kind: str) -> dict[str, Any]:
    (found,) = [each for each in MANIFESTS if each["kind"] == kind]
    return dict(found)


def require_startable(command: list[str]) -> None:
    """Our command line, or the host's with a run YAML."""
    program = Path(command[0]).name
    if program == "llama":
        assert command[1:3] == ["stack", "run"]
        assert command[3].endswith("/run.yaml")
        assert command[4:] == ["--port", "8321"]
    else:
        assert program == "moe-train"
        require_known(["moe-train", *command[1:]])
        require_parses(command[1:])


@pytest.mark.parametrize(
    "environment",
    [{}, {"MOE_STATE_DIR": "/srv/moe", "MOE_STORE_URL": "postgresql+psycopg://moe@moe-db/moe", "MOE_HOST": "0.0.0.0"}],
)
def test_the_run_yaml_is_a_servers(environment: dict[str, str]) -> None:
    config = read_run_config(DEPLOY / "run.yaml", None, environment)
    assert not config.supervisor.start
    assert (config.store_url or "").startswith("postgresql+psycopg://")
    assert config.state_dir == Path(environment.get("MOE_STATE_DIR", "/var/lib/moe/state"))


# The Containerfile.


def test_stages_copy_what_exists_and_install_extras_that_exist() -> None:
    for line in re.findall(r"^COPY (?!--from)(.+)$", CONTAINERFILE, re.MULTILINE):
        for source in line.split()[:-1]:
            assert (ROOT / source).exists(), source
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    groups = re.findall(r"\.whl\)\[([\w,-]+)\]", CONTAINERFILE)
    assert len(groups) == 2
    for group in groups:
        assert set(group.split(",")) <= set(project["optional-dependencies"])
    server, trainer = (set(group.split(",")) for group in groups)
    assert "train" not in server, "the server's image has no torch"
    assert {"train", "postgres"} <= trainer


def test_the_wheels_stage_copies_what_the_build_puts_into_the_package() -> None:
    stage = CONTAINERFILE.split("\nFROM ")[1]
    copied = {source for line in re.findall(r"^COPY (.+)$", stage, re.MULTILINE) for source in line.split()[:-1]}
    needed = {"setup.py", "run_configs", "job_templates", *(host.constraints for host in HOSTS.values())}
    assert needed <= copied


def test_the_repository_has_no_links() -> None:
    """Archives, patches and other systems turn links into plain files, and then the package lacks its data."""
    listed = subprocess.run(["git", "ls-files", "--stage"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert listed
    assert not [line for line in listed.splitlines() if line.startswith("120000")]


def test_stages_build_on_one_another_and_name_no_registry() -> None:
    named: set[str] = set()
    for image, stage in re.findall(r"^FROM (\S+) AS (\S+)$", CONTAINERFILE, re.MULTILINE):
        assert image in named or re.fullmatch(r"python:3\.12-[a-z]+", image), image
        named.add(stage)
    assert {"server", "trainer"} <= named
    assert len(re.findall(r"^FROM ", CONTAINERFILE, re.MULTILINE)) == len(named)


def test_images_start_what_exists_as_the_same_user() -> None:
    commands = [json.loads(line) for line in re.findall(r"^CMD (\[.+\])$", CONTAINERFILE, re.MULTILINE)]
    assert len(commands) == 2
    for command in commands:
        require_startable(command)
    assert re.search(rf"useradd --uid {USER} .*\bmoe\b", CONTAINERFILE)
    assert CONTAINERFILE.count("\nUSER moe\n") == 2


# compose.yaml.


def test_services_build_stages_that_exist_and_share_what_is_declared() -> None:
    services = COMPOSE["services"]
    stages = set(re.findall(r" AS (\S+)$", CONTAINERFILE, re.MULTILINE))
    for name, service in services.items():
        if "build" in service:
            build = service["build"]
            assert build["target"] in stages
            assert ((DEPLOY / build["context"]).resolve() / build["dockerfile"]).exists()
        else:
            assert "/" not in service["image"], "no registry"
        for volume in service["volumes"]:
            source = volume.split(":")[0]
            assert (DEPLOY / source).exists() if source.startswith(".") else source in COMPOSE["volumes"], name
        assert set(service["secrets"]) <= set(COMPOSE["secrets"])
        assert set(service.get("depends_on", {})) <= set(services)
    assert "state:/var/lib/moe" in services["server"]["volumes"]
    assert "state:/var/lib/moe" in services["trainer"]["volumes"]
    assert services["trainer"]["hostname"], "by it a restarted supervisor knows its own jobs"


def test_the_servers_port_is_published_on_this_machine_alone() -> None:
    assert COMPOSE["services"]["server"]["ports"] == ["127.0.0.1:8321:8321"]


def test_no_secret_is_in_the_repository() -> None:
    ignored = (ROOT / ".gitignore").read_text(encoding="utf-8").split()
    for secret in COMPOSE["secrets"].values():
        assert f"deploy/{Path(secret['file']).parent.name}/" in ignored


# kubernetes.yaml.


def test_the_operators_resource_has_fields_that_the_operator_knows() -> None:
    resource = by_kind("LlamaStackDistribution")
    assert resource["apiVersion"] == "llamastack.io/v1alpha1"
    server = resource["spec"]["server"]
    assert set(resource["spec"]) <= OPERATOR_FIELDS["spec"]
    assert set(server) <= OPERATOR_FIELDS["server"]
    for block in ("distribution", "containerSpec", "podOverrides", "userConfig"):
        assert set(server[block]) <= OPERATOR_FIELDS[block], block
    require_startable(server["containerSpec"]["command"])
    assert server["containerSpec"]["command"][3] == "/etc/llama-stack/run.yaml", "where the operator mounts userConfig"


def test_pods_mount_what_they_declare_and_share_the_state() -> None:
    server = by_kind("LlamaStackDistribution")["spec"]["server"]["podOverrides"]
    trainer = by_kind("StatefulSet")["spec"]["template"]["spec"]
    (container,) = trainer["containers"]
    for volumes, mounts in (
        (server["volumes"], server["volumeMounts"]),
        (trainer["volumes"], container["volumeMounts"]),
    ):
        assert {mount["name"] for mount in mounts} == {volume["name"] for volume in volumes}
        claims = {
            volume["persistentVolumeClaim"]["claimName"] for volume in volumes if "persistentVolumeClaim" in volume
        }
        assert claims == {by_kind("PersistentVolumeClaim")["metadata"]["name"]}
        assert {"name": "state", "mountPath": "/var/lib/moe"} in mounts
    require_startable(container["command"])
    assert str(trainer["securityContext"]["runAsUser"]) == USER


def test_pods_are_told_the_same_store() -> None:
    environments = [
        {each["name"]: each["value"] for each in container["env"]}
        for container in (
            by_kind("LlamaStackDistribution")["spec"]["server"]["containerSpec"],
            by_kind("StatefulSet")["spec"]["template"]["spec"]["containers"][0],
        )
    ]
    referred = set(re.findall(r"\$\{env\.(\w+)", (DEPLOY / "run.yaml").read_text(encoding="utf-8")))
    for environment in environments:
        assert {name for name in environment if name.startswith("MOE_")} <= referred
    for name in ("MOE_STATE_DIR", "MOE_STORE_URL", "MOE_STORE_PASSWORD_FILE"):
        assert environments[0][name] == environments[1][name]


def test_the_stateful_sets_selectors_agree() -> None:
    resource = by_kind("StatefulSet")
    labels = resource["spec"]["template"]["metadata"]["labels"]
    assert resource["spec"]["selector"]["matchLabels"].items() <= labels.items()
    assert by_kind("Service")["metadata"]["name"] == resource["spec"]["serviceName"]
    assert by_kind("Service")["spec"]["selector"].items() <= labels.items()


# systemd.


@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.stem)
def test_units_start_what_exists(path: Path) -> None:
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str  # type: ignore[assignment, method-assign]
    unit.read(path)
    service = unit["Service"]
    for name in ("ExecStart", "ExecStartPre"):
        if name in service:
            require_startable(shlex.split(service[name]))
    assert service["User"] == "moe"
    # Else a restart of the supervisor would kill the jobs that it should leave to the next one.
    assert ("supervisor" in path.stem) == (service.get("KillMode") == "process")


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.stem)
def test_systemd_understands_the_units(path: Path) -> None:
    done = subprocess.run(
        ["systemd-analyze", "verify", path], capture_output=True, text=True, timeout=60, check=False
    )  # fmt: skip
    said = [line for line in done.stderr.splitlines() if path.name in line]
    assert all("is not executable" in line for line in said), done.stderr
