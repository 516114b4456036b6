"""Which folders a job may read models from and write checkpoints to. All checks follow links to their targets."""

import errno
import os
import re
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from llama_stack_provider_moe.control.server import ownership
from llama_stack_provider_moe.errors import Conflict, Forbidden, InvalidFile, InvalidInput, NotFound, shorten
from llama_stack_provider_moe.ground.small_files import read_config, read_index, read_object, real_path
from llama_stack_provider_moe.spec import JobSpec
from llama_stack_provider_moe.spec.server_config import ProviderConfig

_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}"
_PATTERNS_SHOWN = 12
_HUB_ID = re.compile(rf"{_NAME}(/{_NAME})?")
_NAME_LIMIT_BYTES = 255  # the limit of all common file systems
CAUSAL_HEADS = ("ForCausalLM", "LMHeadModel")
CLASSIFIER_HEADS = ("ForSequenceClassification",)
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "spiece.model")
_INDEX = "model.safetensors.index.json"


def resolve_model(
    model: str,
    field: str,
    config: ProviderConfig,
    may_use_job: Callable[[str], None],
    heads: tuple[str, ...] = CAUSAL_HEADS,
) -> str:
    """Return a hub id unchanged, or the absolute path of a folder with a model.

    A name without a leading `/` means a folder in `state_dir/models` if there is one of that name, and otherwise a hub
    id. The training process loads hub ids, because the server may reach no hub, or a different one.

    Args:
        model: the value that the caller wrote.
        field: the caller's name for the field.
        config: the server's configuration.
        may_use_job: raises unless the caller may read the artifacts of the job with this id.
        heads: ends of the names of its class: causal language models, or sequence classifiers.

    Raises:
        InvalidInput: neither a hub id that this server allows nor a folder with a model of this kind.
        Forbidden: a folder outside the roots.
        NotFound: no such folder.
    """
    own = config.models_dir / model
    if not model.startswith(("/", "~")) and not (".." not in Path(model).parts and _exists(own, field, model)):
        if _HUB_ID.fullmatch(model) and ".." not in model:
            if config.models.allow(model):
                return model
            raise InvalidInput(field, model, _what_is_allowed(config.models.allowed or []))
        raise InvalidInput(field, model, "a job's name, a hub id (owner/name), an absolute path, or a folder in "
                           "state_dir/models")  # fmt: skip
    path, root = _readable(Path(model) if model.startswith(("/", "~")) else own, field, model, config, may_use_job)
    check_model(path, root, field, model, heads)
    return str(path)


def shown_model(model: str, config: ProviderConfig) -> str:
    """Return a resolved model as a user names it: a folder in `state_dir/models` without the server's path."""
    path, own = Path(model), real_path(config.models_dir)
    return str(path.relative_to(own)) if path.is_absolute() and path != own and path.is_relative_to(own) else model


def model_of(spec: JobSpec, config: ProviderConfig) -> str:
    """Return the model of a resolved job as lists show it, which is as its owner named it."""
    return spec.model_from or shown_model(spec.model, config)


def resolve_adapter_folder(
    folder: str, field: str, config: ProviderConfig, may_use_job: Callable[[str], None]
) -> tuple[Path, dict[str, object]]:
    """Return the absolute path of a LoRA adapter's folder, and its config.

    Args:
        folder: the value that the caller wrote; a relative path is a folder in `state_dir/models`.
        field: the caller's name for the field.
        config: the server's configuration.
        may_use_job: raises unless the caller may read the artifacts of the job with this id.

    Raises:
        InvalidInput: the folder has no readable adapter.
        Forbidden: a folder outside the roots.
        NotFound: no such folder.
    """
    given = Path(folder)
    where = given if folder.startswith(("/", "~")) else config.models_dir / given
    path, root = _readable(where, field, folder, config, may_use_job)
    return path, check_adapter(path, root, field, folder)


def resolve_folder(folder: str, field: str, config: ProviderConfig, may_use_job: Callable[[str], None]) -> Path:
    """Return the absolute path of a folder that jobs may read, such as one with a probe.

    Args:
        folder: the value that the caller wrote; a relative path is a folder in `state_dir/models`.
        field: the caller's name for the field.
        config: the server's configuration.
        may_use_job: raises unless the caller may read the artifacts of the job with this id.

    Raises:
        InvalidInput: it has something else than files in it.
        Forbidden: a folder outside the roots.
        NotFound: no such folder.
    """
    where = Path(folder) if folder.startswith(("/", "~")) else config.models_dir / folder
    path, root = _readable(where, field, folder, config, may_use_job)
    with _reading(field, folder):
        _check_files(path, root, field, folder)
    return path


def check_adapter(path: Path, root: Path, field: str, given: str) -> dict[str, object]:
    """Return the content of adapter_config.json, once `path` is known to hold a LoRA adapter.

    Args:
        path: the real path of the folder.
        root: the folder that all its files must be in, even through links.
        field: the caller's name for the field.
        given: the value that the caller wrote.

    Raises:
        InvalidInput: the folder has no readable LoRA adapter.
        Forbidden: a link leads out of `root`.
    """
    with _reading(field, given):
        _check_files(path, root, field, given)
        config: dict[str, object] = read_object(path / "adapter_config.json")
    if config.get("peft_type") != "LORA":
        raise InvalidInput(field, given, "a folder with a LoRA adapter; its adapter_config.json has another peft_type")
    if not (path / "adapter_model.safetensors").is_file():
        raise InvalidInput(field, given, "a folder with an adapter's weights, adapter_model.safetensors")
    return config


def _readable(
    where: Path, field: str, given: str, config: ProviderConfig, may_use_job: Callable[[str], None]
) -> tuple[Path, Path]:
    """The real path of a folder that jobs may read, and the root that it and its files must be in."""
    path = _real(where, field, given)
    root = ownership.readable_job_folder(path, field, given, config, may_use_job)
    if root is None and not ownership.is_private(path, config):
        root = _root_of(path, [config.models_dir, *config.allowed_roots])
    if root is None:
        raise Forbidden(f"{field}: {shorten(given, 300)} is outside the folders that jobs may read models from: "
                        f"{_listed([config.models_dir, *config.allowed_roots])}, or a job's own artifacts")  # fmt: skip
    with _reading(field, given):
        if not path.is_dir():
            raise NotFound(f"{field}: there is no folder {shorten(given, 300)}")
        ownership.refuse_links(path, field, given, config)
    return path, root


def _what_is_allowed(patterns: list[str]) -> str:
    """The operator's list of models, which reveals no other user's folders or jobs."""
    folders = "a folder in state_dir/models or under an allowed root, or a job's own artifacts"
    if not patterns:
        return f"{folders}; this server allows no models of the hub (`models.allowed`)"
    more = ", ..." if len(patterns) > _PATTERNS_SHOWN else ""
    shown = ", ".join(map(repr, patterns[:_PATTERNS_SHOWN]))
    return f"one of {shown}{more} (`models.allowed` of this server), {folders}"


def resolve_checkpoint_dir(directory: str, job_id: str, field: str, config: ProviderConfig) -> str:
    """Return the absolute path of a folder under `state_dir/checkpoints` or an allowed root.

    Args:
        directory: the value that the caller wrote; a relative path is a folder in `state_dir/checkpoints`.
        job_id: the job, whose checkpoints go to a subfolder of this name.
        field: the caller's name for the field.
        config: the server's configuration.

    Raises:
        Forbidden: the folder is elsewhere, or a link leads elsewhere.
        InvalidInput: something on the path is not a folder, or the server can't write there.
        Conflict: the job's subfolder exists and is not empty.
    """
    base = config.state_dir / "checkpoints"
    given = Path(directory)
    path = _real(given if directory.startswith(("/", "~")) else base / given, field, directory)
    roots = [base, *config.allowed_roots]
    if _root_of(path, roots) is None:
        raise Forbidden(
            f"{field}: {shorten(directory, 300)} is outside the folders that jobs may write checkpoints to: "
            f"{_listed(roots)}"
        )
    ownership.refuse_to_write(path, field, directory, config)
    parent = next(parent for parent in (path, *path.parents) if parent.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise InvalidInput(field, directory, f"a folder that the server can write; it can't write to {str(parent)!r}")
    own = path / job_id
    if own.is_symlink():
        raise Forbidden(f"{field}: {str(own)!r} is a link; a job's checkpoints need a folder of their own")
    if own.exists() and (not own.is_dir() or any(own.iterdir())):
        raise Conflict(f"{field}: {str(own)!r} exists and is not empty; choose another job_uuid or folder")
    return str(path)


def check_model(folder: Path, root: Path, field: str, model: str, heads: tuple[str, ...] = CAUSAL_HEADS) -> None:
    """Raise unless `folder` has what the training process will load, and all its files are in `root`.

    Args:
        folder: the real path of the model's folder.
        root: the folder that all its files must be in, even through links.
        field: the caller's name for the field.
        model: the value that the caller wrote.
        heads: see `resolve_model`.

    Raises:
        InvalidInput: the folder has no readable model of this kind with weights and tokenizer.
        Forbidden: a link leads out of `root`.
    """
    with _reading(field, model):
        _check_model(folder, root, field, model, heads)


def _check_model(folder: Path, root: Path, field: str, model: str, heads: tuple[str, ...]) -> None:
    _check_files(folder, root, field, model)
    if (folder / "adapter_config.json").exists():
        raise InvalidInput(field, model, "a whole model; this folder holds an adapter. Name its base here and the "
                           "adapter in adapter.init_from, or export it merged")  # fmt: skip
    config = read_config(folder / "config.json")
    made_as = config.get("architectures") or []
    is_composite = heads == CAUSAL_HEADS and isinstance(config.get("text_config"), dict)
    if not any(head.endswith(heads) for head in made_as) and not is_composite:
        kind = f"{shorten(config.get('model_type'))} with architectures {shorten(made_as)}"
        wanted = "causal language model" if heads == CAUSAL_HEADS else "sequence classifier"
        raise InvalidInput(field, model, f"a {wanted} (...{heads[0]}); config.json says {kind}")
    _check_weights(folder, field, model)
    if not any((folder / name).exists() for name in _TOKENIZERS):
        raise InvalidInput(field, model, f"a folder with its tokenizer (one of {', '.join(_TOKENIZERS)})")


@contextmanager
def _reading(field: str, given: str) -> Iterator[None]:
    """Turn a problem with a file in the folder into an `InvalidInput` that names the file and the caller's value."""
    try:
        yield
    except InvalidFile as error:
        name = Path(str(error.path)).name
        raise InvalidInput(field, given, f"a folder with a readable {name}; this one {error.reason}") from None
    except OSError as error:
        if error.errno == errno.ELOOP:
            name = Path(os.fsdecode(error.filename)).name if error.filename else "one"
            raise InvalidInput(field, given, f"a folder of files; its link {name!r} is circular") from None
        what = f"with a readable {Path(os.fsdecode(error.filename)).name}" if error.filename else "that can be read"
        raise InvalidInput(field, given, f"a folder {what} ({type(error).__name__})") from None


def _check_files(folder: Path, root: Path, field: str, given: str) -> None:
    """Raise where a file of `folder` leads out of `root`, or opening it could wait forever (a FIFO, a device)."""
    for file in folder.iterdir():
        if not real_path(file).is_relative_to(root):
            raise Forbidden(
                f"{field}: {shorten(given, 300)} has a link, {file.name!r}, that leads out of {str(root)!r}"
            )
        mode = file.lstat().st_mode if not file.exists() else file.stat().st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode) and not stat.S_ISLNK(mode):
            what = {stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket"}.get(stat.S_IFMT(mode), "a device")
            raise InvalidInput(field, given, f"a folder of regular files; {file.name!r} is {what}")


def _check_weights(folder: Path, field: str, model: str) -> None:
    names = {path.name for path in folder.glob("*.safetensors")}
    if not names:
        pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
        found = f"{', '.join(pickles[:3])} may run code when loaded" if pickles else "this one has none"
        raise InvalidInput(field, model, f"a folder with weights in *.safetensors files; {found}")
    if (folder / _INDEX).exists():
        missing = sorted(set(read_index(folder / _INDEX).values()) - names)
        if missing:
            shown = ", ".join(name[:100] for name in missing[:3])
            raise InvalidInput(field, model, f"all its weight files; {shown} is missing or unreadable")


def _real(path: Path, field: str, value: str) -> Path:
    try:
        real = real_path(path.expanduser())
        too_long = [part for part in real.parts if len(os.fsencode(part)) > _NAME_LIMIT_BYTES]
    except (
        OSError,
        ValueError,
        RuntimeError,
    ) as error:  # circular links, a NUL, half a surrogate pair, no such user
        raise InvalidInput(field, value, f"a path ({_why(error)})") from None
    if too_long:  # otherwise the job fails when it makes the folder, which may be hours later
        raise InvalidInput(field, value, f"names of at most {_NAME_LIMIT_BYTES} bytes in a path")
    return real


def _exists(path: Path, field: str, value: str) -> bool:
    try:
        return path.is_dir()
    except (OSError, ValueError) as error:
        raise InvalidInput(field, value, f"a hub id or a path ({_why(error)})") from None


def _why(error: Exception) -> str:
    """What is wrong with a path, without the server's folders, which an `OSError` has in its text."""
    if isinstance(error, OSError):
        return error.strerror or type(error).__name__
    return str(error) if isinstance(error, ValueError) else "its links are circular, or there is no such user"


def _root_of(path: Path, roots: list[Path]) -> Path | None:
    for root in roots:
        with suppress(OSError):  # its links are circular, so nothing is in it
            if path.is_relative_to(real_path(root)):
                return root
    return None


def _listed(roots: list[Path]) -> str:
    return ", ".join(repr(str(root)) for root in roots)
