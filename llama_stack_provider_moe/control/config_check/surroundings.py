"""Checks what a configuration needs on this machine: folders, the database, interpreters, files and variables."""

import importlib.util
import json
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from sqlalchemy.exc import SQLAlchemyError

from llama_stack_provider_moe.control.store import state_layout, store_url
from llama_stack_provider_moe.control.store.state_folder import require_same_store
from llama_stack_provider_moe.errors import InvalidInput, MoeError, NoToolchain
from llama_stack_provider_moe.ground.webhook_signature import EXPECTED, secrets_in
from llama_stack_provider_moe.llama_cpp import find_toolchain
from llama_stack_provider_moe.spec.server_config import ProviderConfig
from llama_stack_provider_moe.spec.serving_config import LlamaCppServing, gguf_of

# Packages that a training process imports; they bring the rest of the extra `train`.
_TRAINING = ("llama_stack_provider_moe", "torch", "transformers", "trl", "peft")
_ASK = (
    "import importlib.util, json, sys; print(json.dumps([n for n in sys.argv[1:] if not importlib.util.find_spec(n)]))"
)
_ASK_LIMIT_S = 60.0


class Findings(NamedTuple):
    """Problems and warnings; each names its setting.

    Attributes:
        problems: a server can't work before they are fixed.
        warnings: may be intended, or may be fixed later.
    """

    problems: list[str]
    warnings: list[str]


def check(config: ProviderConfig, environment: Mapping[str, str], thoroughly: bool = False) -> Findings:
    """Find what a server with this configuration would lack here. Creates only a temporary file in each folder.

    Args:
        config: configuration of the provider.
        environment: environment variables of the server.
        thoroughly: also run the interpreters, to see what they can import; report a variable that is not set as a
            warning, because the server may have another environment than this shell.
    """
    problems = [*_folders(config), *_files(config)]
    problems += _store(config) or _another_store(config)
    warnings = [*_open_folder(config)]
    warnings += [
        f"allowed_roots: {str(root)!r} is not a folder; no file will be found there" for root in config.allowed_roots
        if not root.is_dir()
    ]  # fmt: skip
    problems += _serving_folder(config)
    # With `supervisor.start: false`, jobs may run on another machine that has these.
    here = problems if config.supervisor.start else warnings
    here += [*_interpreters(config, thoroughly), *_serving_toolchain(config, environment)]
    unset = [name for name in config.child_secrets if not environment.get(name)]
    if unset:
        (warnings if thoroughly else here).append(
            f"child_secrets: {', '.join(unset)} is not set; expected environment variables of the server"
        )
    keyless = [
        f"graders.judges.{name}.key_variable: {judge.key_variable} is not set; expected the judge's key"
        for name, judge in config.graders.judges.items()
        if judge.key_variable is not None and not environment.get(judge.key_variable)
    ]
    keyless += [
        f"engines.{name}.key_variable: {engine.key_variable} is not set; expected the vLLM server's key"
        for name, engine in config.engines.items()
        if engine.key_variable is not None and not environment.get(engine.key_variable)
    ]
    here += _engine_folders(config)
    (warnings if thoroughly else here).extend(keyless)
    (warnings if thoroughly else here).extend(_signing(config, environment))
    if (config.mirror.url or "").startswith("s3:") and importlib.util.find_spec("s3fs") is None:
        warnings.append("mirror.url: s3 needs the package 's3fs' here too, or copies of deleted jobs remain; "
                        "pip install 'llama-stack-provider-moe[s3]'")  # fmt: skip
    return Findings(problems, warnings)


def explain(error: SQLAlchemyError | OSError | ValueError, config: ProviderConfig) -> str:
    """Return one line that says why a server could not start."""
    if isinstance(error, SQLAlchemyError):
        return _unreachable(config.store_url or config.url, store_url.reason(error))
    if isinstance(error, MoeError):
        return str(error)
    if isinstance(error, OSError):
        where = f" {str(error.filename)!r}" if error.filename else ""
        why = f"{error.strerror or error}{where}"
        return (
            f"state_dir: {str(config.state_dir)!r} can't be used; expected a folder that the server can write ({why})"
        )
    return str(error)


def _folders(config: ProviderConfig) -> Iterator[str]:
    wanted = [("state_dir", config.state_dir)]
    wanted += [] if config.mirror.folder is None else [("mirror.url", config.mirror.folder)]
    for field, folder in wanted:
        why = _unwritable(folder)
        if why is not None:
            yield _not_writable(field, folder, why)
        elif field == "state_dir":
            try:
                shared = state_layout.refusal(folder)
            except OSError as error:
                yield _not_writable(field, folder, error.strerror or str(error))
            else:
                yield from () if shared is None else (str(shared),)


def _serving_folder(config: ProviderConfig) -> Iterator[str]:
    if not isinstance(config.serving, LlamaCppServing):
        return
    folder = config.serving.models_dir
    # It is not created: a folder that is not there may be a disk that is not mounted.
    why = _unwritable(folder) if folder.is_dir() else "there is no such folder"
    if why is not None:
        yield _not_writable("serving.models_dir", folder, why)


def _engine_folders(config: ProviderConfig) -> Iterator[str]:
    for name, engine in config.engines.items():
        folder = engine.weights_dir
        why = _unwritable(folder) if folder.is_dir() else "there is no such folder"
        if why is not None:
            yield _not_writable(f"engines.{name}.weights_dir", folder, why)


def _serving_toolchain(config: ProviderConfig, environment: Mapping[str, str]) -> Iterator[str]:
    if config.serving is None or gguf_of(config.serving) is None:
        return
    try:
        find_toolchain({**environment, **config.child_env})
    except NoToolchain as error:
        yield f"serving: {error}"


def _open_folder(config: ProviderConfig) -> list[str]:
    try:
        told = state_layout.left_open(config.state_dir)
    except OSError:
        return []  # already reported as a problem
    return [] if told is None else [told]


def _another_store(config: ProviderConfig) -> list[str]:
    """Compare the state folder's `store-id` with the store, if both can be read."""
    try:
        require_same_store(config)
    except (InvalidInput, SQLAlchemyError) as error:
        return [explain(error, config)]
    except (OSError, ValueError):
        return []  # already reported: a folder, or the password file
    return []


def _not_writable(field: str, folder: Path, why: str) -> str:
    return f"{field}: {str(folder)!r} is not valid; expected a folder that the server can write in ({why})"


def _unwritable(folder: Path) -> str | None:
    """Return why `folder`, which need not exist yet, is not writable; None if it is."""
    there = folder
    try:
        there = next(each for each in (folder, *folder.parents) if each.exists())
        if not there.is_dir():
            return f"{str(there)!r} is not a folder"
        # Try it: neither mode nor user shows that a file system is read-only or full.
        with tempfile.TemporaryFile(dir=there, prefix=state_layout.PROBE_PREFIX):
            return None
    except OSError as error:
        return f"{str(there)!r}: {error.strerror or error}"


def _files(config: ProviderConfig) -> Iterator[str]:
    token = None if config.executors.ray is None else config.executors.ray.token_file
    for field, file in (("store_password_file", config.store_password_file), ("executors.ray.token_file", token)):
        if file is None:
            continue
        try:
            content = file.read_bytes()
        except OSError as error:
            yield f"{field}: {str(file)!r} is not valid; expected a file that the server can read ({error.strerror})"
        else:
            if not content.strip():
                yield f"{field}: {str(file)!r} is empty; expected a {'password' if 'store' in field else 'token'}"


def _store(config: ProviderConfig) -> list[str]:
    if config.store_url is None:
        return []  # in state_dir
    try:
        url = store_url.parsed(config.url)
        if url.get_backend_name() == "sqlite":
            folder = None if not url.database or url.database.startswith((":", "file:")) else Path(url.database).parent
            why = None if folder is None else _unwritable(folder)
            return [] if why is None else [_unreachable(config.store_url, why)]
        why = store_url.unreachable(url)
    except InvalidInput as error:
        return [str(error)]
    except (OSError, ValueError):
        return []  # already reported: the password file
    return [] if why is None else [_unreachable(config.store_url, why)]


def _unreachable(url: str, why: str) -> str:
    return f"store_url: {store_url.shown(url)!r} can't be used; expected a database that answers within " \
           f"{store_url.CONNECT_S} s ({why})"  # fmt: skip


def _signing(config: ProviderConfig, environment: Mapping[str, str]) -> Iterator[str]:
    name = config.notify.secret_variable
    if name is not None:
        try:
            secrets_in(environment.get(name, ""))
        except ValueError as problem:
            yield f"notify.secret_variable: {name} {problem}; expected an environment variable of the server with " \
                  f"{EXPECTED}"  # fmt: skip


def _interpreters(config: ProviderConfig, thoroughly: bool) -> Iterator[str]:
    named = {"training_python": config.training_python, "unsloth_python": config.unsloth_python}
    for field, interpreter in named.items():
        if interpreter is None:
            continue
        if shutil.which(interpreter) is None:
            yield f"{field}: {interpreter!r} is not valid; expected a Python interpreter that can be run here"
        elif thoroughly:
            yield from _lacks(field, interpreter, (*_TRAINING, "unsloth") if "unsloth" in field else _TRAINING)


def _lacks(field: str, interpreter: str, packages: tuple[str, ...]) -> Iterator[str]:
    try:
        done = subprocess.run(
            [interpreter, "-c", _ASK, *packages],
            capture_output=True, text=True, timeout=_ASK_LIMIT_S, check=True, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        missing = json.loads(done.stdout)
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        yield f"{field}: {interpreter!r} is not valid; expected a Python interpreter ({type(error).__name__})"
        return
    if missing:
        extra = "this package and those in constraints-unsloth.txt" if "unsloth" in packages else \
                "pip install 'llama-stack-provider-moe[train]'"  # fmt: skip
        yield f"{field}: {interpreter!r} lacks {', '.join(missing)}; expected an environment for training ({extra})"
