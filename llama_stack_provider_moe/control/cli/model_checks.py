"""Checks of models and adapters that a local command names, before its process imports torch: what their files say."""

import os
from pathlib import Path
from typing import Any

from llama_stack_provider_moe.errors import InvalidFile, InvalidInput
from llama_stack_provider_moe.ground.hub_cache import is_cached, offline_variable
from llama_stack_provider_moe.ground.small_files import read_config, read_index, read_object
from llama_stack_provider_moe.jobdir import local_names
from llama_stack_provider_moe.spec.local_commands import UPCYCLED

_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"


def model(name: str, option: str) -> None:
    """Raise InvalidInput if the folder `name` is not a model's, or a hub id can't be had here."""
    path = Path(name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise InvalidInput(option, name, f"a folder with config.json{_what_it_is(path)}")
    elif path.exists():
        raise InvalidInput(option, name, "a folder, the name of a job, or a hub id; this is a file")
    elif _looks_like_a_path(name):
        raise InvalidInput(option, name, "a folder that exists, the name of a job, or a hub id")
    else:
        _hub_id(name, option)


def contents(name: str, option: str) -> None:
    """Raise InvalidInput if a model's folder can't be read or lacks weights; a hub id's are only read later."""
    if Path(name).is_dir():
        _config(Path(name) / "config.json", name, option)
        _weights(Path(name), option)


def dense(name: str, option: str) -> None:
    """As `contents`; and raise InvalidInput if no Mixture-of-Experts model can be made of it."""
    contents(name, option)
    if not Path(name).is_dir():
        return
    config = _config(Path(name) / "config.json", name, option)
    family = config.get("model_type")
    if family not in UPCYCLED:
        raise InvalidInput(option, name, f"a dense model of type {', '.join(UPCYCLED)}; its model_type is {family!r}")
    for switch in UPCYCLED[family]:
        if config.get(switch):
            raise InvalidInput(option, name, f"a model without {switch}, which the new model would not have")


def planned(name: str, option: str) -> None:
    """Raise InvalidInput if `name`, where a model's config is read, can't be one's."""
    base, _ = local_names.on_base(name, option=option)
    path = Path(base)
    if path.is_dir() and not (path / "config.json").is_file():
        raise InvalidInput(option, name, f"a folder with config.json{_what_it_is(path)}")
    if path.exists():
        config = _config(path / "config.json" if path.is_dir() else path, name, option)
        if not isinstance(config.get("model_type"), str):
            raise InvalidInput(option, name, "a model's config.json; this one has no model_type")
    elif _looks_like_a_path(base):
        raise InvalidInput(option, name, "a folder or config.json that exists, the name of a job, or a hub id")
    else:
        _hub_id(base, option)


def adapter(name: str, option: str) -> None:
    """Raise InvalidInput if the folder `name` is not an adapter's."""
    try:
        read_object(Path(name) / "adapter_config.json")
    except FileNotFoundError:
        raise InvalidInput(option, name, "a folder with adapter_config.json") from None
    except InvalidFile as error:
        raise InvalidInput(option, name, f"a readable adapter; its adapter_config.json {error.reason}") from None
    if not any((Path(name) / weights).is_file() for weights in ("adapter_model.safetensors", "adapter_model.bin")):
        raise InvalidInput(option, name, "a folder with adapter_model.safetensors")


def _config(path: Path, name: str, option: str) -> dict[str, Any]:
    try:
        config = read_config(path)
    except (InvalidFile, OSError) as error:
        why = error.reason if isinstance(error, InvalidFile) else error.strerror
        raise InvalidInput(option, name, f"a model with a readable config.json; it {why}") from None
    if config.get("quantization_config") is not None:
        raise InvalidInput(option, name, "a model with unquantised weights; its config.json has quantization_config")
    return config


def _weights(folder: Path, option: str) -> None:
    if (folder / _INDEX).is_file():
        try:
            files = sorted(set(read_index(folder / _INDEX).values()))
        except InvalidFile as error:
            raise InvalidInput(option, str(folder), f"a model with a readable index; it {error.reason}") from None
        lost = [file for file in files if not (folder / file).is_file()]
        if lost:
            raise InvalidInput(option, str(folder), f"a complete model; {', '.join(lost[:3])} of its index "
                               f"{'is' if len(lost) == 1 else 'are'} missing")  # fmt: skip
    elif not (folder / _WEIGHTS).is_file():
        raise InvalidInput(option, str(folder), f"a folder with {_WEIGHTS} or an index of its parts")


def _hub_id(name: str, option: str) -> None:
    offline = offline_variable(os.environ)
    if offline is not None and not is_cached(name, os.environ):
        raise InvalidInput(option, name, "a folder that exists, the name of a job, or a model of the hub that was "
                           f"downloaded before: {offline} is set, and the cache has no such model")  # fmt: skip


def _looks_like_a_path(name: str) -> bool:
    return name.startswith((".", "/", "~")) or name.endswith("/") or name.count("/") > 1


def _what_it_is(folder: Path) -> str:
    if (folder / "adapter_config.json").is_file():
        return "; this one holds an adapter, which needs its base model"
    return ""
