"""What lies beside the weights of a merged model: config, tokenizer, chat template, generation config, model card."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from llama_stack_provider_moe.errors import AdapterError, ModelError
from llama_stack_provider_moe.experts.upcycle import SIDE_FILES
from llama_stack_provider_moe.jobs.folder import Artifact, JobFolder
from llama_stack_provider_moe.spec import JobSpec

_TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
# Of a base's tokenizer, what stays beside the adapter's own: the model file that it was converted from.
_BESIDE = "tokenizer.model"


@dataclass(frozen=True)
class Source:
    """An adapter, and the job that left it, where it was given as one or lies in one.

    Attributes:
        adapter: its folder.
        spec: of the job.
        artifact: the adapter's or checkpoint's entry of the job's manifest.
        summary: of the job's manifest.
    """

    adapter: Path
    spec: JobSpec | None = None
    artifact: Artifact | None = None
    summary: Mapping[str, float] | None = None


def find_source(given: Path) -> Source:
    """The adapter at `given`: its folder, one inside of a job's, or that of a job.

    Raises:
        AdapterError: there is none, or the job's files can't be read.
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
        raise AdapterError(f"adapter: the job in {str(given)!r} left no adapter")
    try:
        spec, manifest = job.read_spec(), job.read_manifest()
    except (OSError, ValidationError) as error:
        raise AdapterError(f"adapter: the job's files in {job.root} can't be read: {error}") from error
    listed = [] if manifest is None else manifest.artifacts
    artifact = next((each for each in listed if Path(each.path).resolve() == adapter.resolve()), None)
    return Source(adapter, spec, artifact, None if manifest is None else manifest.summary)


def side_files(base: Path, adapter: Path) -> dict[str, Path]:
    """Name in the merged folder -> the file to copy; the tokenizer is the adapter's, where it brings one."""
    found = {file.name: file for pattern in SIDE_FILES for file in sorted(base.glob(pattern)) if file.is_file()}
    if (adapter / "tokenizer_config.json").is_file():
        found = {name: file for name, file in found.items() if name not in _TOKENIZER or name == _BESIDE}
        found |= {name: adapter / name for name in _TOKENIZER if (adapter / name).is_file()}
    return found


def config_text(base: Path, dtype: str | None) -> str:
    """The base's config.json as it is, or with another dtype in it."""
    path = base / "config.json"
    try:
        text = path.read_text(encoding="utf-8")
        config: dict[str, Any] = json.loads(text)
    except (OSError, ValueError) as error:
        raise ModelError(f"base: {path} can't be read: {error}") from error
    if dtype is None:
        return text
    config.pop("torch_dtype", None)  # transformers 4's name
    return json.dumps({**config, "dtype": dtype}, indent=2) + "\n"


def model_card(base: str, source: Source, adapted: Mapping[str, int], config: Any) -> str:
    """README.md: base, recipe, data sets, metrics. The licence is the user's to say.

    Args:
        base: folder or hub id; of a folder its name alone is told.
        source: the adapter.
        adapted: path of each target below a layer -> how many there are.
        config: the adapter's, as PEFT has it.
    """
    is_folder = Path(base).is_dir()
    name = Path(base).resolve().name if is_folder else base
    front = ["---", "library_name: transformers"]
    if not is_folder:
        front.append(f"base_model: {json.dumps(base)}")
    lines = [
        *front, "---", "", f"# {_plain(name)}, fine-tuned", "",
        f"`{_plain(name)}` with a LoRA adapter merged into its weights. Fill in the licence: the base's terms apply.",
        "", "| | |", "|---|---|", f"| Base | {_plain(name)} |",
        f"| Adapter | LoRA, rank {config.r}, alpha {config.lora_alpha:g} |",
        f"| Adapted | {', '.join(f'{_plain(path)} x{count}' for path, count in adapted.items())} |",
    ]  # fmt: skip
    if source.spec is not None:
        sets = dict.fromkeys(row.dataset_id for row in source.spec.row_sources())
        lines += [
            f"| Recipe | {source.spec.recipe} |",
            f"| Data sets | {', '.join(map(_plain, sets))} |",
        ]
    if (artifact := source.artifact) is not None:
        lines.append(f"| Trained | {artifact.epoch} epoch(s), {artifact.step} steps |")
        if artifact.metrics is not None:
            lines.append(
                f"| Held-out loss, perplexity | {artifact.metrics.validation_loss:.4f}, "
                f"{artifact.metrics.perplexity:.4f} |"
            )
    lines += [f"| {_plain(key)} | {value:.6g} |" for key, value in sorted((source.summary or {}).items())]
    return "\n".join(lines) + "\n"


def _plain(text: str) -> str:
    """A name that may come from anybody, without what Markdown or HTML would make something of."""
    return "".join(each if each.isalnum() or each in " ._-/:{},@" else "?" for each in text)
