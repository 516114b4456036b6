"""The files beside the weights of a merged model: config, tokenizer, chat template, generation config."""

import json
from pathlib import Path

from pydantic import ValidationError

from llama_stack_provider_moe.compute.export.model_card import Source, recorded
from llama_stack_provider_moe.compute.models.rope import read_beside
from llama_stack_provider_moe.compute.models.upcycle import SIDE_FILES
from llama_stack_provider_moe.errors import AdapterError, ModelError
from llama_stack_provider_moe.ground.small_files import read_config, read_text
from llama_stack_provider_moe.jobdir.folder import JobFolder

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
_GENERATION = "generation_config.json"
# File of a base's tokenizer that stays if the adapter has a tokenizer: the model file that it was converted from.
_BESIDE = "tokenizer.model"


def find_source(given: Path) -> Source:
    """The adapter at `given`, which is an adapter's folder, possibly inside a job's folder, or a job's folder.

    Raises:
        AdapterError: there is no adapter, or the job's files can't be read.
    """
    if not given.is_dir():
        raise AdapterError(f"adapter: there is no folder {str(given)!r}")
    inside = given.resolve().parent
    roots = [given, *([inside.parent] if inside.name in ("artifacts", "checkpoints") else [])]
    job = next((JobFolder(root) for root in roots if (root / "spec.json").is_file()), None)
    if job is None:
        return Source(given)
    adapter = job.adapter if job.root == given else given
    if not adapter.is_dir():
        raise AdapterError(f"adapter: the job in {str(given)!r} has no adapter")
    try:
        spec, manifest = job.read_spec(), job.read_manifest()
    except (OSError, ValidationError) as error:
        raise AdapterError(f"adapter: the job's files in {job.root} can't be read: {error}") from error
    listed = [] if manifest is None else manifest.artifacts
    artifact = next((each for each in listed if Path(each.path).resolve() == adapter.resolve()), None)
    return Source(adapter, spec, artifact, None if manifest is None else manifest.summary, *recorded(job))


def side_files(base: Path, adapter: Path) -> dict[str, Path]:
    """Name in the merged folder -> the file to copy; the adapter's tokenizer and generation config come first."""
    found = {file.name: file for pattern in SIDE_FILES for file in sorted(base.glob(pattern)) if file.is_file()}
    if (adapter / "tokenizer_config.json").is_file():
        found = {name: file for name, file in found.items() if name not in TOKENIZER_FILES or name == _BESIDE}
        found |= {name: adapter / name for name in TOKENIZER_FILES if (adapter / name).is_file()}
    if (adapter / _GENERATION).is_file():  # it ends answers with what was learnt
        found[_GENERATION] = adapter / _GENERATION
    return found


def config_text(base: Path, dtype: str | None, adapter: Path | None = None) -> str:
    """The base's config.json, unchanged, or with another dtype and the longer context that an adapter needs."""
    path = base / "config.json"
    try:
        text = read_text(path)
        config = read_config(path)
    except (OSError, ValueError) as error:
        raise ModelError(f"base: {path} can't be read: {error}") from error
    change = None if adapter is None else read_beside(adapter)
    if dtype is None and change is None:
        return text
    if dtype is not None:
        config.pop("torch_dtype", None)  # transformers 4's name
        config["dtype"] = dtype
    if change is not None:
        inner = config["text_config"] if isinstance(config.get("text_config"), dict) else config
        for old in ("rope_scaling", "rope_theta"):  # transformers 4's names; rope_parameters has both
            inner.pop(old, None)
        inner |= change.in_config()
    return json.dumps(config, indent=2) + "\n"
