"""What a server's configuration must not contain: secrets, and folders that give one owner's jobs to another."""

import re
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import quote

from llama_stack_provider_moe.ground.redaction import holds_secret
from llama_stack_provider_moe.ground.small_files import real_path

# SQLAlchemy's rule: a password may contain `/`.
_STORE_URL = re.compile(r"(?P<scheme>[\w+]+)://(?:(?P<user>[^:/]*)(?::(?P<password>[^@]*))?@)?(?P<rest>.*)", re.DOTALL)
_PASSWORD_IN_QUERY = re.compile(r"[?&](ssl)?passw(or)?d=", re.IGNORECASE)
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,127}")


def not_blank[Given](given: Given) -> Given:
    """Paths, unchanged; an empty one would mean the current directory.

    Raises:
        ValueError: a path is empty.
    """
    for each in given if isinstance(given, list) else (given,):
        if isinstance(each, str) and not each.strip():
            raise ValueError(f"{each!r} is not valid; expected a path")
    return given


def exclusive_folder(path: Path) -> Path:
    """The absolute path of a folder that the server uses alone.

    Raises:
        ValueError: it is the current directory, or above it, which depends on where the server is started.
    """
    real = absolute(path)
    if not path.expanduser().is_absolute() and Path.cwd().is_relative_to(real):
        raise ValueError(f"{str(path)!r} is not valid; expected a folder for the server alone, not the current "
                         "directory or one above it, such as '~/.llama/moe'")  # fmt: skip
    return real


def without_password(url: str | None) -> str | None:
    """`store_url`, unchanged.

    Raises:
        ValueError: it has a password.
    """
    parts = _STORE_URL.fullmatch(url or "")
    if (parts and parts["password"] is not None) or _PASSWORD_IN_QUERY.search(url or ""):
        raise ValueError(
            "contains a password, which the host's log and GET /v1/providers show; remove it, and put it into a file "
            "(`store_password_file`) or the server's environment (PGPASSWORD, PGPASSFILE, ~/.pgpass). Change the "
            "password, because the log may contain this one"
        )
    return url


def with_password(url: str, file: Path) -> str:
    """`store_url` with the password from `store_password_file`.

    Raises:
        OSError: the file can't be read.
        ValueError: the file has no password in it.
    """
    password = file.read_text(encoding="utf-8").rstrip("\r\n")
    parts = _STORE_URL.fullmatch(url)
    if not password or parts is None:
        raise ValueError(f"store_password_file: {str(file)!r} is empty; expected a password")
    return f"{parts['scheme']}://{parts['user']}:{quote(password, safe='')}@{parts['rest']}"


def without_secrets(variables: dict[str, str]) -> dict[str, str]:
    """`child_env`, unchanged.

    Raises:
        ValueError: a variable contains a secret.
    """
    secret = [name for name, value in variables.items() if holds_secret(name, value)]
    if secret:
        raise ValueError(
            f"{', '.join(secret)} would be shown in the host's log and GET /v1/providers; remove the value, set the "
            f"variable for the server, and name it: child_secrets: [{', '.join(secret)}]. Change the secret, because "
            "the log may contain this one"
        )
    return variables


def names_alone(names: list[str]) -> list[str]:
    """`child_secrets`, unchanged.

    Raises:
        ValueError: it contains something other than names, perhaps a secret itself; the text does not repeat it.
    """
    if not all(map(_VARIABLE.fullmatch, names)):
        raise ValueError("contains something that is not the name of an environment variable; expected names such as "
                         "WANDB_API_KEY, whose values are in the server's environment")  # fmt: skip
    return names


def check_secrets(
    store_url: str | None, store_password_file: Path | None, child_env: dict[str, str], child_secrets: list[str]
) -> None:
    """Raise ValueError if the fields that deal with secrets contradict one another.

    Args:
        store_url: the URL of the job store.
        store_password_file: the file with its password.
        child_env: variables with their values.
        child_secrets: names of variables.
    """
    twice = sorted(set(child_env) & set(child_secrets))
    if twice:
        raise ValueError(f"child_secrets: {', '.join(twice)} is in child_env too; expected it in only one of them")
    parts = None if store_url is None else _STORE_URL.fullmatch(store_url)
    if store_password_file is not None and not (parts and parts["user"]):
        raise ValueError("store_password_file: needs a store_url with a user, such as "
                         "postgresql+psycopg://moe@db.internal/moe")  # fmt: skip


def absolute(path: Path) -> Path:
    """A path of the configuration with `~` and links resolved; ValueError if it can't be resolved."""
    try:
        return real_path(path.expanduser())
    except (OSError, RuntimeError) as error:  # a circle of links; no such user
        raise ValueError(f"{str(path)!r} is not valid; expected a path ({error})") from None


def check_roots(roots: Iterable[Path], own: tuple[Path, Path], models: Path, mirror: Path | None) -> None:
    """Raise ValueError if a root or a mirror gives a caller access to other owners' data.

    A root above the state folder is safe: a job's folder belongs to its owner whatever the roots are
    (`control.server.ownership`).

    Args:
        roots: `allowed_roots`.
        own: the state folder and the folder of the jobs, with links resolved.
        models: the folder that every job may read.
        mirror: the folder of a `file://` mirror.
    """
    state, jobs = own
    mirror = None if mirror is None else absolute(mirror)
    for root in roots:
        if root.is_relative_to(models):
            continue
        if (root != state and root.is_relative_to(state)) or root.is_relative_to(jobs):
            raise ValueError(
                f"allowed_roots: {str(root)!r} is in state_dir, whose jobs belong to their owners; expected a folder "
                "outside it (`state_dir/models` needs no root, and a root above state_dir gives access to no job)"
            )
        if mirror is not None and root.is_relative_to(mirror):
            raise ValueError(f"allowed_roots: {str(root)!r} is in the folder of mirror.url, which has copies of "
                             "every owner's jobs; expected a folder outside it")  # fmt: skip
    apart = (state, jobs, models)
    if mirror is not None and any(mirror.is_relative_to(each) or each.is_relative_to(mirror) for each in apart):
        raise ValueError(f"mirror.url: {str(mirror)!r} and state_dir {str(state)!r} overlap; expected a separate "
                         "folder, on another disk")  # fmt: skip


def check_outside(setting: str, folder: Path, state: Path, roots: Iterable[Path], mirror: Path | None) -> None:
    """Raise ValueError if the folder of an inference server is one that jobs or this server use for something else.

    Args:
        setting: the folder's.
        folder: with links resolved.
        state: the state folder.
        roots: `allowed_roots`, where jobs write checkpoints.
        mirror: the folder of a `file://` mirror.
    """
    others = [("state_dir", state), *(("allowed_roots", root) for root in roots)]
    others += [] if mirror is None else [("mirror.url", absolute(mirror))]
    for field, other in others:
        if folder.is_relative_to(other) or other.is_relative_to(folder):
            raise ValueError(f"{setting}: {str(folder)!r} and {field} {str(other)!r} overlap; expected a "
                             "separate folder")  # fmt: skip
