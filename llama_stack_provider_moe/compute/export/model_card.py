"""README.md of an adapter, a whole model or GGUF files: how it was made and how to load it, from recorded facts only.

The facts are in the job's folder: its spec, `resolved.json`, the versions in its events, and the manifest's figures.
What is not recorded is left out. A person adds the licence, the intended use and the limits.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from peft.utils import CONFIG_NAME

from llama_stack_provider_moe.compute.moe.model_types import loads_with_images
from llama_stack_provider_moe.compute.moe.resolve_settings import ResolvedMoe
from llama_stack_provider_moe.compute.moe.steering import ROUTER_BIAS
from llama_stack_provider_moe.errors import InvalidFile
from llama_stack_provider_moe.ground.counting import number_of
from llama_stack_provider_moe.ground.small_files import read_object
from llama_stack_provider_moe.jobdir.events import Started, parse
from llama_stack_provider_moe.jobdir.folder import Artifact, JobFolder
from llama_stack_provider_moe.spec import JobSpec
from llama_stack_provider_moe.spec.options import ROPE_FILE
from llama_stack_provider_moe.spec.recipes import RECIPES

CARD = "README.md"
Kind = Literal["adapter", "model", "merged", "gguf"]
_FRONT: dict[Kind, str] = {  # the hub itself recognises GGUF files
    "adapter": "library_name: peft", "model": "library_name: transformers", "merged": "library_name: transformers",
    "gguf": "tags: [gguf]",
}  # fmt: skip
_IS: dict[Kind, str] = {
    "adapter": "A LoRA adapter for {base}.",
    "model": "{base} with all its weights trained.",
    "merged": "{base} with a LoRA adapter merged into its weights.",
    "gguf": "GGUF files of {base}, fine-tuned.",
}
PROJECTOR_FILE = "mmproj-"  # what the name of a projector file begins with


_NO_FILES: Mapping[str, int] = MappingProxyType({})


@dataclass(frozen=True)
class Source:
    """An adapter or model, and its job if the given folder is a job's or inside one.

    Attributes:
        adapter: the folder of the adapter, or of the whole model.
        spec: the job's spec.
        artifact: the entry of the adapter or checkpoint in the job's manifest.
        summary: the summary in the job's manifest.
        plan: what the job decided at its start (`resolved.json`).
        versions: of the libraries at the job's last start, by name, and the device.
    """

    adapter: Path
    spec: JobSpec | None = None
    artifact: Artifact | None = None
    summary: Mapping[str, float] | None = None
    plan: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)


def recorded(job: JobFolder) -> tuple[dict[str, Any], dict[str, str]]:
    """The plan and the versions in a job's folder; each is empty if the job has not recorded it."""
    try:
        plan = read_object(job.resolved)
    except (FileNotFoundError, InvalidFile):
        plan = {}
    versions: dict[str, str] = {}
    try:
        with job.events.open("rb") as file:
            for line in file:
                if b'"started"' in line and isinstance(event := parse(line), Started):
                    versions = event.versions
    except (OSError, ValueError):
        return plan, versions
    return plan, versions


def model_card(
    kind: Kind,
    base: str,
    source: Source,
    adapted: Mapping[str, int] | None = None,
    files: Mapping[str, int] = _NO_FILES,
) -> str:
    """The text of README.md.

    Args:
        kind: what the folder holds.
        base: folder or hub id of the base model; of a folder only the name is shown.
        source: the adapter or model and its job.
        adapted: path of each target below a layer -> number of targets; None: as the plan says.
        files: name of each GGUF file -> its bytes.
    """
    is_folder = Path(base).is_absolute() or Path(base).is_dir()
    job = getattr(source.spec, "model_from", None)  # its folder's name is only `merged` or `model`
    name = plain((job or Path(base).resolve().name) if is_folder else base)
    front = ["---", _FRONT[kind]]
    if not is_folder:
        front.append(f"base_model: {json.dumps(base)}")
    rows = [("Base", name), *_adapter(source, adapted), *_training(source), *_figures(source)]
    versions = ", ".join(f"{plain(each)} {plain(version, '()+')}" for each, version in source.versions.items())
    loading = _with_llama_cpp(files) if files else _loading(kind, f"path/to/{name}" if is_folder else name, source)
    return "\n".join([
        *front, "---", "", f"# {name}, fine-tuned", "",
        f"{_IS[kind].format(base=f'`{name}`')} Fill in the licence: the base's terms apply.", "",
        "| | |", "|---|---|", *(f"| {label} | {value} |" for label, value in rows),
        *([f"| Versions | {versions} |"] if versions else []),
        *(f"| {plain(file)} | {_size(size)} |" for file, size in files.items()),
        "", *loading, "",
    ])  # fmt: skip


def plain(text: object, also: str = "") -> str:
    """A name from an untrusted source, without characters that have a meaning in Markdown, HTML or a shell.

    Args:
        text: the name.
        also: characters that are allowed as well, in a text that nobody pastes into a command.
    """
    return "".join(each if each.isalnum() or each in " ._-/:{},@" or each in also else "?" for each in str(text))


def _adapter(source: Source, adapted: Mapping[str, int] | None) -> Iterator[tuple[str, str]]:
    report = source.plan.get("adapter")
    report = report if isinstance(report, dict) else {}
    was_adapter = (source.adapter / CONFIG_NAME).is_file()
    if was_adapter:
        config = read_object(source.adapter / CONFIG_NAME)
        names = {"use_dora": "DoRA", "use_rslora": "rank-stabilised LoRA"}
        method = " and ".join(word for key, word in names.items() if config.get(key)) or "LoRA"
        several = ", other ranks for some targets" if config.get("rank_pattern") else ""
        alpha = config.get("lora_alpha")
        shown = f"{alpha:g}" if isinstance(alpha, int | float) else plain(alpha)
        yield "Adapter", f"{method}, rank {plain(config.get('r'))}, alpha {shown}{several}"
    targets = report.get("targets") if adapted is None and was_adapter else adapted
    if targets:
        yield "Adapted", ", ".join(f"{plain(path)} x{count}" for path, count in targets.items())
    if isinstance(total := report.get("total_parameters"), int):
        yield "Trained parameters", f"{report.get('trainable_parameters', 0):,} of {total:,}"


def _training(source: Source) -> Iterator[tuple[str, str]]:
    spec, plan = source.spec, source.plan
    if spec is not None:
        yield "Recipe", spec.recipe
        sources = spec.row_sources()
        for label, is_ours in (("Data sets", True), ("Evaluated on", False)):
            named = dict.fromkeys(row.dataset_id for row in sources if (row.kind == "recipe") is is_ours)
            if named:
                yield label, ", ".join(map(plain, named))
    if isinstance(train := plan.get("train_rows"), int):
        cut = f", {plan['truncated_rows']:,} of them cut" if plan.get("truncated_rows") else ""
        yield "Rows", f"{train:,} trained on{cut}; {plan.get('validation_rows') or 0:,} held out"
    if (artifact := source.artifact) is not None:
        yield "Trained", f"{number_of(artifact.epoch, 'epoch')}, {number_of(artifact.step, 'step')}"
    if spec is not None and RECIPES[spec.recipe].trains:
        settings = spec.model_dump()
        optimizer, adapter = settings["optimizer"], settings["adapter"]
        yield "Optimiser", f"{optimizer['optimizer_type']}, learning rate {optimizer['lr']:g}"
        yield (
            "Precision",
            settings["training"]["dtype"]
            + (", LoRA in bf16" if adapter and adapter["dtype"] == "bf16" else "")
            + (f", base quantised to {_coding(adapter)}" if adapter and adapter["quantize_base"] else ""),
        )
    moe = plan.get("moe")
    names = {each.name for each in fields(ResolvedMoe)} - {"notes"}
    if isinstance(moe, dict) and names <= set(moe):  # else another version's
        yield "Routing in training", plain(ResolvedMoe(**{name: moe[name] for name in names}).text(), ";()'")


def _coding(adapter: Mapping[str, object]) -> str:
    scales = ", its scales to 8" if adapter["quantize_scales"] else ""
    return f"{adapter['quantize_bits']} bits{scales}"


def _figures(source: Source) -> Iterator[tuple[str, str]]:
    if source.artifact is not None and (metrics := source.artifact.metrics) is not None:
        yield "Held-out loss, perplexity", f"{metrics.validation_loss:.4f}, {metrics.perplexity:.4f}"
    for key, value in sorted((source.summary or {}).items()):
        yield plain(key), f"{value:.6g}"


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB"


def _with_llama_cpp(files: Mapping[str, int]) -> list[str]:
    projector = next((name for name in files if name.startswith(PROJECTOR_FILE)), None)
    option = "" if projector is None else f" --mmproj {plain(projector)}"
    models = [name for name in files if not name.startswith(PROJECTOR_FILE)]
    return [
        "## Load it", "", "With llama.cpp:", "", "```sh",
        *(f"llama-server -m {plain(name)}{option}" for name in models), "```",
    ]  # fmt: skip


def _loading(kind: Kind, base: str, source: Source) -> list[str]:
    here = "path/to/this"  # a folder or a repository
    adapter = source.adapter
    sees = loads_with_images(str(source.plan.get("architecture")))
    is_reward = str(source.plan.get("architecture")).endswith("ForSequenceClassification")
    model = "AutoModelForImageTextToText" if sees else "AutoModelForCausalLM"
    if is_reward:
        model = "AutoModelForSequenceClassification"
    has_processor = any((adapter / name).is_file() for name in ("processor_config.json", "preprocessor_config.json"))
    reader, reads = ("AutoProcessor", "processor") if has_processor else ("AutoTokenizer", "tokenizer")
    if kind != "adapter":
        code = [
            f"from transformers import {model}, {reader}", "",
            f'model = {model}.from_pretrained("{here}", dtype="auto")',
            f'{reads} = {reader}.from_pretrained("{here}")',
        ]  # fmt: skip
        commands = [f"moe-train eval {here} --retain rows.jsonl"]
        library = "transformers"
    else:
        code = [
            "from peft import PeftModel", f"from transformers import {model}, {reader}", "",
            f'base = {model}.from_pretrained("{base}", dtype="auto"{", num_labels=1" * is_reward})',
            f'model = PeftModel.from_pretrained(base, "{here}")',
            f'{reads} = {reader}.from_pretrained("{here}")',
        ]  # fmt: skip
        commands = [
            f"moe-train eval {base} --adapter {here} --retain rows.jsonl", f"moe-train export merge {base} {here} OUT"
        ]  # fmt: skip
        library = "PEFT"
    if is_reward:
        commands = [
            "moe-train grade FILE --data rows.jsonl  # FILE: a grader of type reward_model with the whole model"
        ]
    unread = {
        ROUTER_BIAS: "the router biases that training moved",
        ROPE_FILE: "the longer context that the base needs: merge first, or change its config",
    }
    biases = [
        line for name, what in unread.items() if (adapter / name).is_file()
        for line in (f"PEFT does not read `{name}`, {what}; llama-stack-provider-moe does.", "")
    ]  # fmt: skip
    return [
        "## Load it", "", f"With {library}:", "", "```python", *code, "```", "",
        *(biases if kind == "adapter" else []),
        "With llama-stack-provider-moe:", "", "```sh", *commands, "```",
    ]  # fmt: skip
