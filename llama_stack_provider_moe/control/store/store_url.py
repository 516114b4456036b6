"""Parse and show the URL of a job store, and connect once to check that the database is reachable."""

from typing import Any

from sqlalchemy import URL, Engine, create_engine, text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, SQLAlchemyError
from sqlalchemy.pool import NullPool

from llama_stack_provider_moe.errors import InvalidInput
from llama_stack_provider_moe.ground.redaction import HIDDEN, without_passwords

# How long a connection may take. If the database's machine is gone, drivers wait for minutes otherwise.
CONNECT_S = 3
# Drivers with a time limit for `connect` only, and the argument's name. (pg8000's limit also applies to each query.)
_LIMITS = {"psycopg": "connect_timeout", "psycopg2": "connect_timeout", "pymysql": "connect_timeout"}


def parsed(url: str) -> URL:
    """Parse `url`.

    Raises:
        InvalidInput: It is not an SQLAlchemy URL.
    """
    try:
        return make_url(url)
    except (ArgumentError, ValueError):  # ValueError: a port that is not a number
        raise InvalidInput("store_url", shown(url), "an SQLAlchemy URL, such as 'sqlite:////path/jobs.db'") from None


def shown(url: URL | str) -> str:
    """Return `url` without a password."""
    if isinstance(url, URL):
        return without_passwords(url.render_as_string(hide_password=True))
    before, at, after = url.rpartition("@")
    # Text that is not a URL can't be parsed, so everything before the host is hidden.
    return without_passwords(url) if "://" in before or not at else f"{HIDDEN}@{after}"


def engine(url: URL, **options: Any) -> Engine:
    """Call `create_engine` and translate its errors.

    Raises:
        InvalidInput: The dialect or driver does not exist, or its package is not installed.
    """
    try:
        return create_engine(url, **options)
    except ImportError as error:
        install = "; pip install 'llama-stack-provider-moe[postgres]'" if url.get_backend_name() == "postgresql" else ""
        expected = f"a database whose driver is installed (package {error.name!r} is missing{install})"
        raise InvalidInput("store_url", shown(url), expected) from None
    except ArgumentError as error:  # NoSuchModuleError is one
        raise InvalidInput("store_url", shown(url), f"a database that SQLAlchemy knows ({error})") from None


def time_limit(url: URL) -> dict[str, int]:
    """Arguments for the driver's `connect` so that it gives up after `CONNECT_S`.

    Empty if the URL sets a limit itself, or the driver has no such argument.
    """
    # `get_driver_name` would load the driver. PostgreSQL's default driver has the same argument in every version.
    name = url.drivername.partition("+")[2] or ("psycopg" if url.get_backend_name() == "postgresql" else "")
    argument = _LIMITS.get(name)
    return {} if argument is None or argument in url.query else {argument: CONNECT_S}


def unreachable(url: URL) -> str | None:
    """Return why the database can't be reached; None if it can. Creates and changes nothing.

    Raises:
        InvalidInput: See `engine`.
    """
    looking = engine(url, connect_args=time_limit(url), poolclass=NullPool)
    try:
        with looking.connect() as connection:
            connection.execute(text("SELECT 1"))
    except SQLAlchemyError as error:
        return reason(error)
    return None


def reason(error: SQLAlchemyError) -> str:
    """Return the driver's message on one line, without SQL and without a password."""
    said = str(error.orig) if isinstance(error, DBAPIError) and error.orig is not None else str(error)
    return without_passwords(" ".join(said.split()))[:500]
