"""A PostgreSQL server for tests, if the distribution's package is installed; the tests remove it completely."""

import itertools
import os
import pwd
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import quote

import pytest

from tests.support.jobs_support import ram_folder

_SCHEMAS = itertools.count()


def binaries() -> Path | None:
    """The folder that has `initdb` and `postgres`, of the newest version if there are several."""
    on_path = shutil.which("postgres")
    debian = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"), key=lambda path: float(path.parts[-3]))
    places = [Path(found).resolve().parent for found in [*debian[::-1], on_path] if found is not None]
    return next((place for place in places if (place / "initdb").exists()), None)


@contextmanager
def new_store_urls() -> Iterator[Callable[[], str]]:
    """Run a server; yields a function that makes the URL of a new, empty store. Skips if PostgreSQL is not installed.

    It listens only on a socket in its folder, so there is no conflict of ports.
    """
    programs = binaries()
    if programs is None:
        pytest.skip("PostgreSQL is not installed (Debian: apt-get install postgresql)")
    psycopg = pytest.importorskip("psycopg", reason="psycopg is not installed (extra `postgres`)")
    with ram_folder() as folder:
        user = _unprivileged(folder)
        data = folder / "data"
        subprocess.run(
            [programs / "initdb", "-D", data, "-U", "moe", "-A", "trust", "-N", "-E", "UTF8", "--locale=C"],
            user=user, cwd=folder, check=True, capture_output=True,
        )  # fmt: skip
        with (folder / "server.log").open("wb") as log:
            server = subprocess.Popen(
                [programs / "postgres", "-D", data, "-k", folder, "-c", "listen_addresses=", "-c", "fsync=off"],
                user=user, cwd=folder, stdout=log, stderr=subprocess.STDOUT,
            )  # fmt: skip
        try:
            until = time.monotonic() + 120
            while True:
                try:
                    connection = psycopg.connect(f"host={folder} user=moe dbname=postgres", autocommit=True)
                    break
                except psycopg.OperationalError:
                    assert server.poll() is None, (folder / "server.log").read_text()
                    assert time.monotonic() < until, (folder / "server.log").read_text()
                    time.sleep(0.1)

            def new_url() -> str:
                schema = f"store{next(_SCHEMAS)}"
                connection.execute(f"CREATE SCHEMA {schema}")
                search = quote(f"-csearch_path={schema}")
                return f"postgresql+psycopg://moe@/postgres?host={quote(str(folder))}&options={search}"

            with suppress(psycopg.OperationalError), connection:  # a test may have ended the server
                yield new_url
        finally:
            server.send_signal(signal.SIGQUIT)  # immediately, because nothing is kept
            server.wait(60)


def _unprivileged(folder: Path) -> int | None:
    """The user who runs the server, because PostgreSQL refuses root."""
    if os.geteuid() != 0:
        return None
    user = pwd.getpwnam("nobody")
    os.chown(folder, user.pw_uid, user.pw_gid)
    return user.pw_uid
