"""What a job saved, loaded again in a fresh process: does it say what the trained model said?

    $ moe-train export check JOBFOLDER

Two comparisons, for two questions. *As trained*: base and adapter from disk, with the job's dtype, quantisation and
experts implementation. Nothing but the files could differ, so what is said must be equal but for the last bits: this
tells whether they hold what was trained. *Plain*: transformers and PEFT alone, as others load it. In bf16 that rounds
elsewhere (PEFT folds W + B A into 16 bits), so it is judged by how far it is, and beside that what the adapter does:
an adapter that is not applied is as far from the recorded logits as the adapter moves them.

A job with a 4-bit base trained against that base's rounding, which the 16-bit base does not have. There the plain
model is compared with the 16-bit adapter model in the job's experts implementation; how far that is from what was
trained is told (`rounding_of_base`), not judged.
"""

import argparse
import json
import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging

from llama_stack_provider_moe.errors import AdapterError, MoeError
from llama_stack_provider_moe.experts.backend import ALL_OURS, OURS, OURS_PARTIAL, TRITON, TRITON_PARTIAL
from llama_stack_provider_moe.experts.layout import ExpertLayout, find_layout
from llama_stack_provider_moe.experts.quantize import quantize
from llama_stack_provider_moe.experts.settings import ExpertsImplementation, apply_moe, resolve_moe
from llama_stack_provider_moe.experts.split_lora import split_lora
from llama_stack_provider_moe.experts.steering import ROUTER_BIAS, restore_biases
from llama_stack_provider_moe.export.card import Source, find_source
from llama_stack_provider_moe.export.load_figures import LoadCheck, MergedCheck, gap
from llama_stack_provider_moe.export.probe import Arithmetic, Probe, ask, digest, read_probe
from llama_stack_provider_moe.export.servers import family_of, read_kind, statements
from llama_stack_provider_moe.spec import DType, Moe
from llama_stack_provider_moe.training.loader import load_plain

# Mean distance of two models' logits, as a share of the spread of logits (`Gap.share`). Measured over all families,
# recipes and 4-bit bases, on a CPU: as trained 0, bit by bit; 8e-7 in fp32 with another number of threads. On a GPU
# it was not measured: a tenth of what may be on another kind of device.
AS_TRAINED: dict[DType, float] = {"fp32": 1e-5, "bf16": 1e-3, "fp16": 1e-3}
AS_TRAINED_CUDA: dict[DType, float] = {"fp32": 1e-5, "bf16": 5e-3, "fp16": 1e-3}
# At most 3e-7 in fp32. In bf16 7e-3, and 1.6e-2 where one token went to another expert; fp16, which no CPU trains, was
# not measured: it rounds an eighth of what bf16 does.
PLAIN: dict[DType, float] = {"fp32": 1e-5, "bf16": 5e-2, "fp16": 1e-2}
# The plain model's distance by what the adapter does to the logits: 1 is no adapter; measured at most 0.13 in tiny
# models. Or else what bf16 rounds in deep ones, of which SmolLM2-4x135M (30 layers) has 2.1e-2.
OF_EFFECT = 1 / 3
ROUNDING: dict[DType, float] = {"fp32": 1e-5, "bf16": 3e-2, "fp16": 5e-3}


class NotRecorded(AdapterError):
    """Nothing to compare with: the folder is of a job that recorded no logits."""


def check(given: str | Path, base: str | None = None) -> LoadCheck:
    """`check_adapter` or `check_model` of a job's folder, or of an artifact's own.

    Raises:
        AdapterError: as they do.
    """
    folder = Path(given)
    if (folder / "artifacts" / "model").is_dir():
        return check_model(folder / "artifacts" / "model")
    if (folder / "config.json").is_file() and not (folder / CONFIG_NAME).is_file():
        return check_model(folder)
    return check_adapter(folder, base)


def check_adapter(given: str | Path, base: str | None = None) -> LoadCheck:
    """Load base and adapter from disk and compare with what was recorded at the end of training.

    Args:
        given: the adapter's folder, or its job's.
        base: folder or hub id; left out: the model that the job names, or else the adapter's own config.

    Raises:
        NotRecorded: an older job's adapter.
        AdapterError: it is not what was trained, with the figures.
        ModelError: the base can't be loaded.
    """
    source = find_source(Path(given))
    probe = _probe(source.adapter)
    dtype, bits = probe.arithmetic.dtype, probe.arithmetic.quantize_bits
    name = _base(source, base)
    model, layout, tensors = _load(name, source.adapter, dtype)
    biases = _restore(source.adapter, model, layout, probe)
    servers = statements(family_of(model), read_kind(source.adapter))
    plain = ask(model, probe)
    with model.disable_adapter():
        effect = gap(plain, ask(model, probe))
    here = _here(probe.arithmetic, bits=None)
    _as_trained(model, layout, here.experts_implementation)
    again = sixteen = ask(model, probe, dtype)
    if bits is not None:
        del model
        model, layout, _ = _load(name, source.adapter, dtype, bits)
        _restore(source.adapter, model, layout, probe)
        _as_trained(model, layout, here.experts_implementation)
        again, here = ask(model, probe, dtype), here.model_copy(update={"quantize_bits": bits})
    recorded = probe.values()
    found = LoadCheck(
        kind="adapter", positions=probe.positions, arithmetic=probe.arithmetic, here=here,
        as_trained=gap(again, recorded), as_trained_tolerance=_as_trained_tolerance(probe.arithmetic, here),
        plain=gap(plain, recorded if bits is None else sixteen), plain_tolerance=PLAIN[dtype],
        plain_against="recorded" if bits is None else "16-bit adapter model",
        rounding_of_base=None if bits is None else gap(sixteen, recorded),
        effect=effect, tensors=tensors, router_biases=biases, servers=servers,
    )  # fmt: skip
    return judged(found, str(source.adapter))


def check_model(folder: str | Path) -> LoadCheck:
    """The same of a job that trained all weights; its folder is loaded by plain transformers.

    Raises:
        NotRecorded, AdapterError: see `check_adapter`.
        ModelError: the folder can't be loaded.
    """
    probe = _probe(Path(folder))
    dtype = probe.arithmetic.dtype
    model = load_plain(str(folder), dtype, _device())
    layout = find_layout(model)
    plain = ask(model, probe)
    here = _here(probe.arithmetic, bits=None)
    _as_trained(model, layout, here.experts_implementation)
    recorded = probe.values()
    found = LoadCheck(
        kind="model", positions=probe.positions, arithmetic=probe.arithmetic, here=here,
        as_trained=gap(ask(model, probe, dtype), recorded),
        as_trained_tolerance=_as_trained_tolerance(probe.arithmetic, here),
        plain=gap(plain, recorded), plain_tolerance=PLAIN[dtype], plain_against="recorded",
        tensors=sum(1 for _ in model.state_dict()), router_biases=0,
    )  # fmt: skip
    return judged(found, str(folder))


def check_merged(merged: str | Path, given: str | Path, base: str | None = None) -> MergedCheck:
    """Compare a merged folder's logits with those of the adapter on its base, both by plain transformers and PEFT.

    The adapter's LoRA is added in the dtype that the merged folder has on disk and both run in.

    Args:
        merged: the merged folder.
        given, base: see `check_adapter`.

    Raises:
        NotRecorded: an older job's adapter.
        AdapterError: they differ by more than rounding, with the figures.
    """
    source = find_source(Path(given))
    probe = _probe(source.adapter)
    weights = _dtype_of(Path(merged))
    dtype: DType = "fp32" if probe.arithmetic.dtype == "fp32" else weights
    one = load_plain(str(merged), dtype, _device())
    mine = ask(one, probe)
    del one
    model, layout, _ = _load(_base(source, base), source.adapter, dtype)
    _restore(source.adapter, model, layout, probe)
    # In fp32 a merge into 16 bits shows its one rounding of the weights, as in 16 bits.
    tolerance = PLAIN[weights]
    found = MergedCheck(
        positions=probe.positions, dtype=dtype, weights=weights, gap=gap(mine, ask(model, probe)), tolerance=tolerance
    )
    if found.gap.share > tolerance:
        raise AdapterError(f"merged: {merged} does not say what the adapter on its base says: {found.text()}")
    return found


def judged(found: LoadCheck, what: str) -> LoadCheck:
    """`found` itself, or `AdapterError` where it shows that what was loaded is not what was trained.

    Args:
        found: the figures.
        what: the folder, for the error.
    """
    if found.as_trained.share > found.as_trained_tolerance:
        raise AdapterError(f"load check: {what} does not hold what was trained:\n{found.text()}")
    allowed = found.plain_tolerance
    if found.effect is not None and found.tells:
        allowed = min(allowed, max(OF_EFFECT * found.effect.share, ROUNDING[found.arithmetic.dtype]))
    if found.plain.share > allowed:
        raise AdapterError(
            f"load check: loaded plainly, {what} does not say what was trained: its logits are {found.plain.share:.2g} "
            f"of their spread off, at most {allowed:.2g} is rounding beside what the adapter does:\n{found.text()}"
        )
    return found


def _probe(folder: Path) -> Probe:
    probe = read_probe(folder)
    if probe is None:
        raise NotRecorded(
            f"{folder} holds no logits of the trained model: it is of a job of an earlier version, of one with loader "
            "unsloth, or no job's"
        )
    return probe


def _base(source: Source, base: str | None) -> str:
    if base is not None:
        return base
    if source.spec is not None and source.spec.recipe != "routing_analysis":
        return source.spec.model
    try:
        told = json.loads((source.adapter / CONFIG_NAME).read_bytes())["base_model_name_or_path"]
    except (OSError, ValueError, KeyError) as error:
        raise AdapterError(f"adapter: {source.adapter / CONFIG_NAME} can't be read: {error}") from error
    if not isinstance(told, str) or not told:
        raise AdapterError(f"adapter: {source.adapter / CONFIG_NAME} does not say its base; name it with --base")
    return told


def _load(
    name: str, adapter: Path, dtype: DType, bits: int | None = None
) -> tuple[PeftModel, ExpertLayout | None, int]:
    """Base and adapter, and how many of its tensors are in the model as they are in the file: all.

    Raises:
        AdapterError: one has no place, or the adapter's config makes a place that the file has no tensor for.
    """
    device = _device()
    base: PreTrainedModel = load_plain(name, dtype, device if bits is None else torch.device("cpu"))
    layout = find_layout(base)
    if bits is not None:
        quantize(base, layout, 4 if bits == 4 else 8, device)
    with warnings.catch_warnings():
        # peft 0.21 looks for parameters' names among modules, and only warns of what is missing; both is checked here.
        warnings.simplefilter("ignore")
        try:
            model: PeftModel = PeftModel.from_pretrained(base, adapter).eval()
        except (ValueError, RuntimeError, OSError, SafetensorError) as error:
            raise AdapterError(f"adapter: PEFT can't load {adapter}: {' '.join(str(error).split())[:600]}") from error
    written = load_file(adapter / SAFETENSORS_WEIGHTS_NAME)
    there: dict[str, Tensor] = get_peft_model_state_dict(model, save_embedding_layers=False)
    if lost := sorted(written.keys() - there.keys()):
        raise AdapterError(f"adapter: PEFT finds no place for {len(lost)} of its tensors: {', '.join(lost[:3])}")
    if missing := sorted(there.keys() - written.keys()):
        raise AdapterError(f"adapter: {adapter} lacks {len(missing)} tensor(s): {', '.join(missing[:3])}")
    if other := [key for key, tensor in written.items() if not torch.equal(there[key].cpu(), tensor)]:
        raise AdapterError(f"adapter: {len(other)} tensor(s) are others once loaded: {', '.join(sorted(other)[:3])}")
    return model, layout, len(written)


def _restore(adapter: Path, model: PeftModel, layout: ExpertLayout | None, probe: Probe) -> int:
    """Put the routers' biases that training moved into the base; how many."""
    if probe.router_biases is None:
        return 0
    if layout is None or not (adapter / ROUTER_BIAS).is_file():
        raise AdapterError(f"adapter: {adapter} lacks {ROUTER_BIAS}, the routers' biases that it was trained with")
    restore_biases(adapter, model, layout)
    biases = layout.biases(model)
    if digest(biases) != probe.router_biases:
        raise AdapterError(
            f"adapter: {adapter / ROUTER_BIAS} does not hold the routers' biases that it was trained with"
        )
    return len(biases)


def _as_trained(model: Any, layout: ExpertLayout | None, implementation: ExpertsImplementation | None) -> None:
    """Have the experts run as in the job."""
    if layout is None or implementation is None:
        return
    resolved = resolve_moe(Moe(output_router_logits=False), layout, full=False)
    apply_moe(model, layout, replace(resolved, experts_implementation=implementation))
    if implementation in ALL_OURS:
        split_lora(model)


def _device() -> torch.device:
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def _here(trained: Arithmetic, bits: int | None) -> Arithmetic:
    """What of a job's arithmetic this machine has; Triton's kernels need a GPU."""
    implementation, device = trained.experts_implementation, _device().type
    if device == "cpu" and implementation in (TRITON, TRITON_PARTIAL):
        implementation = OURS if implementation == TRITON else OURS_PARTIAL
    return trained.model_copy(
        update={"device": device, "experts_implementation": implementation, "quantize_bits": bits}
    )  # fmt: skip


def _as_trained_tolerance(trained: Arithmetic, here: Arithmetic) -> float:
    """On another kind of device, or with other kernels, sums are rounded elsewhere."""
    if trained != here:
        return PLAIN[trained.dtype]
    return (AS_TRAINED if here.device == "cpu" else AS_TRAINED_CUDA)[trained.dtype]


def _dtype_of(folder: Path) -> DType:
    try:
        told = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError) as error:
        raise AdapterError(f"merged: {folder / 'config.json'} can't be read: {error}") from error
    names: dict[str, DType] = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
    stored = told.get("dtype", told.get("torch_dtype", "float32"))
    if stored not in names:
        raise AdapterError(f"merged: {folder} is stored in {stored!r}, expected one of {', '.join(names)}")
    return names[stored]


def main(argv: Sequence[str] | None = None) -> int:
    """`moe-train export check`; the exit code is 0 when all is equal, 1 when not, 2 for a mistake in the command."""
    parser = argparse.ArgumentParser(
        prog="moe-train export check", description="Load what a job saved, and compare its logits with the recorded."
    )
    parser.add_argument("given", metavar="JOBFOLDER|ADAPTER", help="folder of a job, or of an adapter or model it left")
    parser.add_argument("--base", help="folder or hub id (default: the model that the job names)")
    parser.add_argument("--merged", help="compare this merged folder with the adapter on its base as well")
    parser.add_argument("--json", action="store_true", help="the figures as JSON")
    given = parser.parse_args(argv)
    logging.disable_progress_bar()
    found: dict[str, LoadCheck | MergedCheck] = {}
    try:
        found["loaded"] = check(given.given, given.base)
        if given.merged is not None:
            found["merged"] = check_merged(given.merged, given.given, given.base)
    except MoeError as error:
        print(f"export check: {error}", file=sys.stderr)
        return 1
    if given.json:
        print(json.dumps({name: each.model_dump(mode="json") for name, each in found.items()}))
    else:
        print("\n".join(each.text() for each in found.values()))
    return 0


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main())
