"""The cache of the Hugging Face hub on this machine, without huggingface_hub, which takes long to import."""

import re
from collections.abc import Mapping
from pathlib import Path

_TRUE = {"1", "ON", "YES", "TRUE"}
_REVISION_LIMIT_BYTES = 256
_REVISION = re.compile(r"[0-9a-f]{7,64}")


def offline_variable(environment: Mapping[str, str]) -> str | None:
    """Return the name of the variable that keeps processes with this environment off the hub, if one does."""
    names = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    return next((name for name in names if environment.get(name, "").upper() in _TRUE), None)


def is_cached(model: str, environment: Mapping[str, str]) -> bool:
    """Return whether the hub's cache has the config of the model's main revision (in huggingface_hub's folders)."""
    folder = cached_model(model, environment)
    return folder is not None and (folder / "config.json").is_file()


def cached_model(model: str, environment: Mapping[str, str]) -> Path | None:
    """Return the folder for the model's main revision in the hub's cache, which may lack files; None if unknown."""
    folder = cache_folder(environment) / f"models--{model.replace('/', '--')}"
    try:
        with (folder / "refs" / "main").open("rb") as file:
            revision = file.read(_REVISION_LIMIT_BYTES).decode("ascii", "replace").strip()
    except OSError:
        return None
    return folder / "snapshots" / revision if _REVISION.fullmatch(revision) else None


def cache_folder(environment: Mapping[str, str]) -> Path:
    """Return the cache folder of huggingface_hub, from the environment variables that it reads."""
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if environment.get(name):
            return Path(environment[name]).expanduser()
    return home_folder(environment) / "hub"


def home_folder(environment: Mapping[str, str]) -> Path:
    """Return the folder of huggingface_hub, with its cache and the token that `hf auth login` saved."""
    home = environment.get("HF_HOME")
    return Path(home or f"{environment.get('XDG_CACHE_HOME') or '~/.cache'}/huggingface").expanduser()
