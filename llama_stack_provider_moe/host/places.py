"""Which folders a job may read a model from and write checkpoints to. Everything is checked where links lead."""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llama_stack_provider_moe.config import ProviderConfig
from llama_stack_provider_moe.errors import Conflict, Forbidden, InvalidInput, NotFound

_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}"
_PATTERNS_SHOWN = 12
_HUB_ID = re.compile(rf"{_NAME}(/{_NAME})?")
_NAME_LIMIT_BYTES = 255  # of every file system that matters
_HEADS = ("ForCausalLM", "LMHeadModel")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "spiece.model")
_INDEX = "model.safetensors.index.json"


def resolve_model(model: str, field: str, config: ProviderConfig, may_use_job: Callable[[str], None]) -> str:
    """A hub id as it is, or the absolute path of a folder that holds a causal language model.

    A name without a leading `/` is a folder of `state_dir/models` where one of that name exists, else a hub id,
    which the training process loads (the server may not reach the hub, or not the same one).

    Args:
        model: what the caller asked for.
        field: the caller's name for it.
        config: the server's.
        may_use_job: raises unless the caller may read that job's artifacts.

    Raises:
        InvalidInput: neither a hub id that this server allows nor a folder with a model that we train.
        Forbidden: a folder outside the roots.
        NotFound: no such folder.
    """
    own = config.models_dir / model
    if not model.startswith(("/", "~")) and not (".." not in Path(model).parts and _exists(own, field, model)):
        if _HUB_ID.fullmatch(model) and ".." not in model:
            if config.models.allow(model):
                return model
            raise InvalidInput(field, model, _what_is_allowed(config.models.allowed or []))
        raise InvalidInput(field, model, "a hub id (owner/name), an absolute path, or a folder in state_dir/models")
    path, root = _readable(Path(model) if model.startswith(("/", "~")) else own, field, model, config, may_use_job)
    _check_model(path, root, field, model)
    return str(path)


def resolve_adapter_folder(folder: str, field: str, config: ProviderConfig, may_use_job: Callable[[str], None]) -> str:
    """The absolute path of a folder that holds a LoRA adapter; a relative one lies in `state_dir/models`.

    Raises:
        InvalidInput: no adapter that can be read.
        Forbidden: a folder outside the roots.
        NotFound: no such folder.
    """
    given = Path(folder)
    where = given if folder.startswith(("/", "~")) else config.models_dir / given
    path, root = _readable(where, field, folder, config, may_use_job)
    _no_links_out(path, root, field, folder)
    if _json(path / "adapter_config.json", field, folder).get("peft_type") != "LORA":
        raise InvalidInput(field, folder, "a folder with a LoRA adapter; its adapter_config.json is of another kind")
    if not (path / "adapter_model.safetensors").is_file():
        raise InvalidInput(field, folder, "a folder with an adapter's weights, adapter_model.safetensors")
    return str(path)


def _readable(
    where: Path, field: str, given: str, config: ProviderConfig, may_use_job: Callable[[str], None]
) -> tuple[Path, Path]:
    """The real path of a folder that jobs may read, and the root that it and its files must lie under."""
    path = _real(where, field, given)
    root = _root_of(path, [config.models_dir, *config.allowed_roots])
    if root is None and path.is_relative_to(config.jobs_dir) and path != config.jobs_dir:
        root = config.jobs_dir / path.relative_to(config.jobs_dir).parts[0]
        may_use_job(root.name)
    if root is None:
        raise Forbidden(f"{field}: {given!r} is in no folder that models may be read from: "
                        f"{_listed([config.models_dir, *config.allowed_roots])}, or a job's own artifacts")  # fmt: skip
    if not path.is_dir():
        raise NotFound(f"{field}: there is no folder {given!r}")
    return path, root


def _what_is_allowed(patterns: list[str]) -> str:
    """The server's own list, which names nobody's folders or jobs."""
    folders = "a folder in state_dir/models or under an allowed root, or a job's own artifacts"
    if not patterns:
        return f"{folders}; this server allows no model of the hub (`models.allowed`)"
    more = ", ..." if len(patterns) > _PATTERNS_SHOWN else ""
    shown = ", ".join(map(repr, patterns[:_PATTERNS_SHOWN]))
    return f"one of {shown}{more} (`models.allowed` of this server), {folders}"


def resolve_checkpoint_dir(directory: str, job_id: str, field: str, config: ProviderConfig) -> str:
    """The absolute path of a folder under `state_dir/checkpoints` or an allowed root; relative ones lie in the first.

    Raises:
        Forbidden: it lies elsewhere, or would lead there.
        InvalidInput: something that is no folder, or can't be written, is in its way.
        Conflict: it has a folder of this job's name with something in it.
    """
    base = config.state_dir / "checkpoints"
    given = Path(directory)
    path = _real(given if directory.startswith(("/", "~")) else base / given, field, directory)
    roots = [base, *config.allowed_roots]
    if _root_of(path, roots) is None:
        raise Forbidden(f"{field}: {directory!r} is in no folder that checkpoints may be written to: {_listed(roots)}")
    parent = next(parent for parent in (path, *path.parents) if parent.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise InvalidInput(field, directory, f"a folder that the server can write; {str(parent)!r} is in its way")
    own = path / job_id
    if own.is_symlink():
        raise Forbidden(f"{field}: {str(own)!r} is a link; a job's checkpoints go to a folder of its own")
    if own.exists() and any(own.iterdir()):
        raise Conflict(f"{field}: {str(own)!r} exists and is not empty; choose another job_uuid or folder")
    return str(path)


def _check_model(folder: Path, root: Path, field: str, model: str) -> None:
    """Raise unless `folder` has what the training process will load, and only files from under `root`."""
    _no_links_out(folder, root, field, model)
    if (folder / "adapter_config.json").exists():
        raise InvalidInput(field, model, "a whole model; this folder holds an adapter. Train it with "
                           "options.save_merged, and use the merged model")  # fmt: skip
    config = _json(folder / "config.json", field, model)
    heads = config.get("architectures") or []
    if not any(str(head).endswith(_HEADS) for head in heads) and not isinstance(config.get("text_config"), dict):
        kind = f"{config.get('model_type')!r} with architectures {heads}"
        raise InvalidInput(field, model, f"a causal language model (...ForCausalLM); config.json says {kind}")
    _check_weights(folder, field, model)
    if not any((folder / name).exists() for name in _TOKENIZERS):
        raise InvalidInput(field, model, f"a folder with its tokenizer (one of {', '.join(_TOKENIZERS)})")


def _no_links_out(folder: Path, root: Path, field: str, given: str) -> None:
    for file in folder.iterdir():
        if not file.resolve().is_relative_to(root):
            raise Forbidden(f"{field}: {given!r} has a link, {file.name!r}, that leads out of {str(root)!r}")


def _check_weights(folder: Path, field: str, model: str) -> None:
    names = {path.name for path in folder.glob("*.safetensors")}
    if not names:
        pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
        found = f"{', '.join(pickles[:3])} may run code when loaded, and is not" if pickles else "there are none"
        raise InvalidInput(field, model, f"a folder with weights in *.safetensors files; {found}")
    if (folder / _INDEX).exists():
        weights = _json(folder / _INDEX, field, model).get("weight_map")
        missing = sorted(set(map(str, weights.values())) - names) if isinstance(weights, dict) else [_INDEX]
        if missing:
            raise InvalidInput(field, model, f"all its weight files; {', '.join(missing[:3])} is missing or unreadable")


def _json(path: Path, field: str, model: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise InvalidInput(field, model, f"a folder with a readable {path.name} ({type(error).__name__})") from None
    if not isinstance(content, dict):
        raise InvalidInput(field, model, f"a folder whose {path.name} holds an object")
    return content


def _real(path: Path, field: str, value: str) -> Path:
    try:
        real = path.expanduser().resolve()
        too_long = [part for part in real.parts if len(os.fsencode(part)) > _NAME_LIMIT_BYTES]
    except (OSError, ValueError, RuntimeError) as error:  # a NUL, half a surrogate pair, no such user
        raise InvalidInput(field, value, f"a path ({error})") from None
    if too_long:  # else found out when somebody makes the folder, which may be hours later
        raise InvalidInput(field, value, f"names of at most {_NAME_LIMIT_BYTES} bytes in a path")
    return real


def _exists(path: Path, field: str, value: str) -> bool:
    try:
        return path.is_dir()
    except (OSError, ValueError) as error:
        raise InvalidInput(field, value, f"a hub id or a path ({error})") from None


def _root_of(path: Path, roots: list[Path]) -> Path | None:
    return next((root for root in roots if path.is_relative_to(root.resolve())), None)


def _listed(roots: list[Path]) -> str:
    return ", ".join(repr(str(root)) for root in roots)
