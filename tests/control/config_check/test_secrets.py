"""Secrets come from the environment or files: the configuration and the files of a server and a job contain none."""

import base64
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import ValidationError
from sqlalchemy.exc import OperationalError

from llama_stack_provider_moe.compute.evaluation.served import Endpoint
from llama_stack_provider_moe.control.cli.exits import Exit as Code
from llama_stack_provider_moe.control.store.opening import open_engine
from llama_stack_provider_moe.control.store.store import JobStore
from llama_stack_provider_moe.control.supervisor.executors import Child
from llama_stack_provider_moe.control.supervisor.executors.local import child_environment
from llama_stack_provider_moe.control.supervisor.executors.ray import RayExecutor
from llama_stack_provider_moe.control.supervisor.supervisor import Supervisor
from llama_stack_provider_moe.errors import InvalidInput, ServerRefused
from llama_stack_provider_moe.jobdir.events import EventLog, Failed, read
from llama_stack_provider_moe.spec.server_config import ProviderConfig
from tests.control.cli.test_words import moe_train
from tests.control.server.test_ownership import CsvDatasets
from tests.support.bad_inputs import GOOD_BODIES, JOBS, WORDS
from tests.support.host_harness import QUICKSTART, run_config, serving, tiny_interpreter
from tests.support.host_support import serving_in_process, submit
from tests.support.jobs_support import ended, new_job, wait_for
from tests.support.live_folders import contents

PLANTED = "planted-Zq7-secret"


@pytest.mark.parametrize(
    ("settings", "way_out"),
    [
        ({"store_url": f"postgresql+psycopg://moe:{PLANTED}@db/moe"}, "store_password_file"),
        ({"store_url": f"postgresql+psycopg://moe:a/{PLANTED}@db/moe"}, "PGPASSFILE"),
        ({"store_url": f"postgresql+psycopg://db/moe?user=moe&password={PLANTED}"}, "store_password_file"),
        ({"store_url": f"postgresql://moe@db/moe?sslpassword={PLANTED}"}, "store_password_file"),
        ({"child_env": {"WANDB_API_KEY": PLANTED}}, "child_secrets: [WANDB_API_KEY]"),
        ({"child_env": {"HF_TOKEN": PLANTED, "HF_HOME": "/hf"}}, "child_secrets: [HF_TOKEN]"),
        ({"child_env": {"MLFLOW_TRACKING_URI": f"http://ann:{PLANTED}@host"}}, "child_secrets: [MLFLOW_TRACKING_URI]"),
        ({"child_env": {"HTTPS_PROXY": f"http://ann:{PLANTED}@proxy"}}, "child_secrets: [HTTPS_PROXY]"),
        ({"child_secrets": [f"{PLANTED}=x"]}, "WANDB_API_KEY, whose values are in the server's environment"),
        ({"executors": {"ray": {"address": f"http://ann:{PLANTED}@head:8265"}}}, "without a user"),
        ({"exports": {"ollama_urls": [f"http://ann:{PLANTED}@host:11434"]}}, "without a user"),
        ({"mirror": {"url": f"s3://{PLANTED.lower()}:{PLANTED}@bucket"}}, "String should match"),
        ({"child_env": {"WANDB_API_KEY": [PLANTED]}}, "string"),
        ({"store_url": [PLANTED]}, "string"),
        ({"store_pasword": PLANTED}, "not permitted"),
    ],
)
def test_a_secret_in_the_configuration_is_refused_and_not_repeated(settings: dict[str, Any], way_out: str) -> None:
    with pytest.raises(ValidationError) as caught:
        ProviderConfig.model_validate(settings)
    assert way_out in str(caught.value)
    assert PLANTED not in str(caught.value), "this text ends in the host's log"


def test_settings_that_are_not_secrets_are_accepted() -> None:
    ProviderConfig(
        store_url="postgresql+psycopg://moe@db/moe?passfile=/run/pgpass&sslkey=/run/key.pem",
        child_env={"HF_TOKEN_PATH": "/run/hf", "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1", "HTTPS_PROXY": "http://p:3128"},
        child_secrets=["WANDB_API_KEY"],
    )
    with pytest.raises(ValidationError, match="child_secrets: A is in child_env too"):
        ProviderConfig(child_env={"A": "1"}, child_secrets=["A"])
    with pytest.raises(ValidationError, match="store_password_file: needs a store_url with a user"):
        ProviderConfig(store_password_file=Path("/run/password"))


def test_children_get_the_secrets_that_are_named(tmp_path: Path) -> None:
    config = ProviderConfig(state_dir=tmp_path, child_secrets=["WANDB_API_KEY", "NOT_SET"])
    environment = {"WANDB_API_KEY": PLANTED, "OPENAI_API_KEY": "other", "PGPASSWORD": "other"}
    got = child_environment(environment, config, tmp_path)
    assert got["WANDB_API_KEY"] == PLANTED
    assert not {"OPENAI_API_KEY", "PGPASSWORD", "NOT_SET"} & set(got)
    assert PLANTED not in config.model_dump_json(), "which goes to the supervisor, and is shown by the host"


def test_nodes_of_a_cluster_get_them_by_a_private_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", PLANTED)
    config = ProviderConfig(state_dir=tmp_path, child_secrets=["WANDB_API_KEY"],
                            executors={"ray": {"address": "http://head:8265"}})  # type: ignore[arg-type]  # fmt: skip
    sent: list[bytes] = []

    def answer(request: httpx.Request) -> httpx.Response:
        sent.append(request.content)
        return httpx.Response(200, json={"ray_version": "2", "submission_id": "run"})

    assert config.executors.ray is not None
    ray = RayExecutor(config, config.executors.ray, httpx.MockTransport(answer))
    (tmp_path / "job").mkdir()

    def record(_child: Child, write: Callable[[], None] | None = None) -> None:
        assert write is not None
        write()

    assert ray.submit(tmp_path / "job", record, None, "1")
    written = json.loads((tmp_path / "job" / "cluster.json").read_text())
    assert written["overrides"]["WANDB_API_KEY"] == PLANTED, "also where a node has another"
    assert (tmp_path / "job" / "cluster.json").stat().st_mode & 0o077 == 0
    assert len(sent) == 2
    assert PLANTED.encode() not in b"".join(sent), "Ray's dashboard shows what it was sent"


@pytest.mark.parametrize(
    "url", [f"postgresql+psycopg//moe:{PLANTED}@db/x", f"nonsense:{PLANTED}@db", f"postgresql://moe:{PLANTED}@db:x/y",
            f"foo+bar://moe:{PLANTED}@db/x", f"mssql+pymssql://moe:{PLANTED}@db/x"],
)  # fmt: skip
def test_no_error_repeats_the_password_of_a_url(url: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        open_engine(url)
    assert str(caught.value).startswith("store_url: ")
    assert PLANTED not in f"{caught.value} {caught.value.value}"


def test_a_child_prints_and_tells_no_secret(tmp_path: Path) -> None:
    """In its prints, a logger that an earlier import created, a traceback, and its events."""
    code = f"""
import json, logging, sys
from pathlib import Path
early = logging.StreamHandler()
from llama_stack_provider_moe.jobdir.events import EventLog, Message
from llama_stack_provider_moe.compute.runtime.redacted_output import environment_secrets, redact_output
redact_output()
import os
token, named = os.environ["HF_TOKEN"], os.environ["CUSTOM"]
print("printed", token, named, "http://u:{PLANTED}@host/")
early.handle(logging.makeLogRecord({{"msg": f"logged {{token}}"}}))
EventLog(Path("events.jsonl"), environment_secrets()).append(Message(text=f"told {{token}} {{named}} https://u:{PLANTED}@h/"))
raise RuntimeError(f"raised {{named}}")
"""
    environment = {
        **os.environ,
        "HF_TOKEN": PLANTED + "1",
        "CUSTOM": PLANTED + '"2\\',
        "MOE_CHILD_SECRETS": '["CUSTOM"]',
    }
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert "printed *** *** http://u:***@host/" in done.stdout
    assert "logged ***" in done.stderr
    assert PLANTED not in done.stdout + done.stderr.rpartition("Traceback")[0]
    assert read(tmp_path / "events.jsonl").events[0].text == "told *** *** https://u:***@h/"


def test_a_training_process_that_fails_hides_it_in_its_last_output(tmp_path: Path) -> None:
    """A real process without a spec: its error names the file, and the folder's name is the planted secret."""
    folder = tmp_path / PLANTED
    folder.mkdir()
    command = [sys.executable, "-m", "llama_stack_provider_moe.compute.worker.main", str(folder)]
    environment = {**os.environ, "HF_TOKEN": PLANTED}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=800)
    assert done.returncode == 1
    (failed,) = read(folder / "events.jsonl").events
    assert (failed.type, failed.error) == ("failed", "FileNotFoundError")
    assert failed.reason.endswith("/***/spec.json'")
    assert "/***/spec.json" in done.stderr
    assert PLANTED not in done.stdout + done.stderr + (folder / "events.jsonl").read_text()


def test_the_reason_of_a_failure_holds_no_secret(
    store: JobStore, config: ProviderConfig, supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last output of a process that was killed before it could hide anything."""
    monkeypatch.setenv("HF_TOKEN", PLANTED)
    folder = new_job(store, config, "job", steps=1, end=7)
    (folder / "output.log").write_text(f"401 for {PLANTED} at https://u:{PLANTED}@hub/\n")
    reason = ended(store, supervisor, "job").reason
    assert reason is not None
    assert "401 for *** at https://" in reason
    assert PLANTED not in reason


def test_an_event_hides_the_passwords_of_urls(tmp_path: Path) -> None:
    with_url = f"trackers.mlflow: can't be opened: no answer of https://ann:{PLANTED}@mlflow/"
    events = EventLog(tmp_path / "events.jsonl")
    events.append(Failed(reason=with_url, error="TrainingError"))
    events.close()
    assert PLANTED.encode() not in (tmp_path / "events.jsonl").read_bytes()


def test_the_command_line_repeats_no_password() -> None:
    """The password of a server behind basic authentication; messages end up in the log of a CI."""
    for words in (["--url", f"http://ann:{PLANTED}@127.0.0.1:9/?x=1"], ["--url", f"http://ann:{PLANTED}@127.0.0.1:9"]):
        for command in (["ls"], ["ls", "--json"], ["status", "job", "--watch"]):
            done = moe_train(*command, *words)
            assert done.code in (Code.LOST, Code.REFUSED)
            assert "127.0.0.1:9" in done.err
            assert PLANTED not in done.out + done.err


@pytest.mark.parametrize("uri", [f"http://ann:{PLANTED}@host/x.csv", f"ftp://ann:{PLANTED}@127.0.0.1:9/x.csv"])
def test_a_data_set_that_can_not_be_read_tells_no_password(uri: str, tmp_path: Path) -> None:
    """urllib reads the first as a host with a port that is not a number, and repeats it in its error."""
    with serving_in_process(tmp_path, CsvDatasets(uri)) as service, pytest.raises(InvalidInput) as caught:
        submit(service, data={"dataset_id": "stolen"})
    assert "a data set that the server can read (" in str(caught.value)
    assert PLANTED not in str(caught.value)


def test_a_judged_models_report_holds_no_password() -> None:
    endpoint = Endpoint(f"http://ann:{PLANTED}@judge/v1", "m", None, transport=httpx.MockTransport(_asks_for_password))
    with pytest.raises(ServerRefused) as caught:
        endpoint.choice(messages=[])
    assert str(caught.value) == "http://ann:***@judge/v1/chat/completions: HTTP 418: it was sent"
    assert endpoint.url == "http://ann:***@judge/v1"


def _asks_for_password(request: httpx.Request) -> httpx.Response:
    scheme, sent = request.headers["Authorization"].split()
    told = base64.b64decode(sent).decode() == f"ann:{PLANTED}"
    return httpx.Response(418, text="it was sent" if told else f"{scheme} without it")


@pytest.fixture
def locked_url(new_postgres_url: Callable[[], str]) -> str:
    """A store on PostgreSQL whose user needs the planted password."""
    import psycopg
    from sqlalchemy import make_url

    url = make_url(new_postgres_url())
    folder, role = url.query["host"], f"locked_{str(url.query['options']).rpartition('=')[2]}"
    with psycopg.connect(f"host={folder} user=moe dbname=postgres", autocommit=True) as connection:
        connection.execute(f"CREATE ROLE {role} LOGIN SUPERUSER PASSWORD '{PLANTED}'")  # type: ignore[arg-type]
        (hba,) = connection.execute("SHOW hba_file").fetchone() or ("",)
        Path(hba).write_text(f"local all {role} scram-sha-256\n{Path(hba).read_text()}")
        connection.execute("SELECT pg_reload_conf()")
    return url.set(username=role).render_as_string(hide_password=False)


def test_the_stores_password_comes_from_a_file_or_from_libpq(
    locked_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def opens(**settings: Any) -> None:
        store = JobStore(ProviderConfig(state_dir=tmp_path, store_url=locked_url, **settings).url)
        store.check()
        store.close()

    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(OperationalError):
        opens()
    password = tmp_path / "password"
    password.write_text(PLANTED + "\n")
    opens(store_password_file=password)
    password.write_text("wrong")
    with pytest.raises(OperationalError) as caught:
        opens(store_password_file=password)
    assert "wrong" not in str(caught.value)
    password.write_text("")
    with pytest.raises(ValueError, match="is empty"):
        opens(store_password_file=password)
    passfile = tmp_path / "pgpass"
    passfile.write_text(f"*:*:*:*:{PLANTED}\n")
    passfile.chmod(0o600)
    monkeypatch.setenv("PGPASSFILE", str(passfile))
    opens()
    monkeypatch.delenv("PGPASSFILE")
    monkeypatch.setenv("PGPASSWORD", PLANTED)
    opens()


@pytest.mark.e2e
def test_nothing_that_a_server_and_a_job_leave_holds_a_secret(locked_url: str, tmp_path: Path) -> None:
    password = tmp_path / "password"
    password.write_text(PLANTED)
    interpreter = tiny_interpreter(tmp_path)
    config = run_config(QUICKSTART, tmp_path, provider={
        "store_url": locked_url, "store_password_file": str(password), "child_secrets": ["WANDB_API_KEY"],
        "training_python": interpreter, "supervisor": {"poll_s": 0.1, "warm": False, "idle_exit_s": 1.0},
    })  # fmt: skip
    secrets = {"WANDB_API_KEY": PLANTED, "HF_TOKEN": PLANTED}
    answers: list[str] = []
    with serving(config, tmp_path / "state", env=secrets) as server, server.http() as http:
        server.register("words", WORDS)
        assert http.post(JOBS, json=GOOD_BODIES[JOBS] | {"job_uuid": "one"}).status_code == 200
        wait_for(lambda: http.get("/jobs/one/status").json()["status"] == "completed")
        shown = httpx.get(server.url + "/v1/providers", timeout=60)
        assert "inline::moe" in shown.text
        assert "store_url" in shown.text
        answers += [shown.text, httpx.get(server.url + "/openapi.json", timeout=60).text]
        answers += [http.get(f"/jobs/one{view}").text for view in ("", "/status", "/logs", "/events", "/artifacts")]
        commands = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if _readable(path)]
        assert not [each for each in commands if PLANTED.encode() in each], "`ps` shows it"
        # The supervisor, which got its configuration, must end before its log is read.
        wait_for(lambda: http.get("/health").json()["supervisor"] == "none")
    assert not [answer for answer in answers if PLANTED in answer]
    left = dict(contents(tmp_path / "state"))
    assert {"server.log", "supervisor.log", "spec.json", "output.log"} <= {path.name for path in left}
    holding = [path for path, content in left.items() if PLANTED.encode() in content]
    # The tiny child writes down what it got, so this shows that it did get the secret.
    assert [path.name for path in holding] == ["environment.json"]


def _readable(path: Path) -> bool:
    try:
        return bool(path.read_bytes())
    except OSError:  # ended meanwhile
        return False
