"""A server that can't start ends with the lines of `moe-train config check` instead of a traceback."""

import logging
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from pydantic import ValidationError
from sqlalchemy.exc import SQLAlchemyError

from llama_stack_provider_moe.control.config_check import surroundings
from llama_stack_provider_moe.errors import InvalidConfig, InvalidInput
from llama_stack_provider_moe.spec.server_config import ProviderConfig

# Variable in which hosts keep the path of their run YAML (llama-stack 0.6.1 and 0.7.3).
_FILE = "LLAMA_STACK_CONFIG"
log = logging.getLogger(__name__)


class HostConfig(ProviderConfig):
    """The provider's configuration as a host creates it, from the `config:` of the run YAML."""

    def __init__(self, **settings: Any) -> None:
        with without_traceback():
            try:
                super().__init__(**settings)
            except ValidationError as error:
                from llama_stack_provider_moe.control.config_check.problems import lines

                raise InvalidConfig(where_of(settings), lines(error)) from None


def require(config: ProviderConfig, where: str | None = None) -> None:
    """Raise InvalidConfig if this machine lacks something that a server or supervisor needs; log warnings.

    Args:
        config: configuration of the provider.
        where: names it in errors; None: by the host's run YAML.
    """
    found = surroundings.check(config, os.environ)
    if not found.problems and not found.warnings:
        return
    named = where_of(None) if where is None else where
    if found.problems:
        raise InvalidConfig(named, found.problems)
    for warning in found.warnings:
        log.warning("%s: %s", named, warning)


@contextmanager
def plain_start_errors(config: ProviderConfig) -> Iterator[None]:
    """Check the configuration, then start a server inside; an error of the start becomes an InvalidConfig as well.

    Raises:
        InvalidConfig: the server can't start with this configuration.
    """
    with without_traceback():
        require(config)
        try:
            yield
        except (SQLAlchemyError, OSError, InvalidInput) as error:
            raise InvalidConfig(where_of(None), [surroundings.explain(error, config)]) from error


@contextmanager
def without_traceback() -> Iterator[None]:
    """If an InvalidConfig ends this process, print only its text.

    A host does not catch a provider's exceptions, so Python would print a hundred lines of traceback before the text.
    (llama-stack 0.6.1 treats a SystemExit like Ctrl-C, and then exits with 0.)
    """
    try:
        yield
    except InvalidConfig:
        previous_hook = sys.excepthook

        def print_text(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
            if isinstance(error, InvalidConfig):
                print(f"\n{error}\n\nThe server was not started. `moe-train config check FILE` checks a run YAML.",
                      file=sys.stderr)  # fmt: skip
            else:
                previous_hook(kind, error, trace)

        sys.excepthook = print_text
        raise


def where_of(settings: Mapping[str, object] | None, kind: str | None = None) -> str:
    """Return file and provider of `settings`, whose variables the host has filled in; None: of the only provider.

    `kind` is the type of the provider; None: `inline::moe`.
    """
    from llama_stack_provider_moe.control.config_check import run_yaml  # not at a start that succeeds

    kind = kind or run_yaml.PROVIDER_TYPE
    file = os.environ.get(_FILE)
    found: list[run_yaml.ProviderEntry] = []
    if file:
        with suppress(InvalidInput):
            found = run_yaml.entries(Path(file), os.environ, kind=kind)
    if len(found) > 1 and settings is not None:
        with suppress(InvalidInput):
            found = [each for each in found if run_yaml.substituted(each.settings, os.environ) == settings] or found
    if len(found) == 1:
        return found[0].where
    named = f" ({', '.join(repr(each.provider_id) for each in found)})" if found else ""
    return f"{file or 'run YAML'}: a provider {kind}{named}"
