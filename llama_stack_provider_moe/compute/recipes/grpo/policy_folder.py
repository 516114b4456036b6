"""The policy's weights in a folder that vLLM reads: a Hugging Face checkpoint with the names of the family's files.

With an adapter the weights are merged by `compute.export.merge`: in fp32, rounded once, fused or one tensor for each
expert as on the base's disk. Tensors that no adapter changes are written once; with all weights, all are written each
time. The bytes are those of the base on disk, so a change of the model in memory alone would be missed: `require_same`
of the recipe compares what vLLM says with what the policy says.
"""

import fcntl
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from peft import PeftModel
from torch import nn

from llama_stack_provider_moe.compute.export.card import config_text, side_files
from llama_stack_provider_moe.compute.export.merge import write_tensor
from llama_stack_provider_moe.compute.export.plan import MergePlan, make_plan
from llama_stack_provider_moe.compute.export.shard_files import SHARD_BYTES
from llama_stack_provider_moe.compute.export.tensors import INDEX, TensorEntry, file_name, header, index_text, shards
from llama_stack_provider_moe.compute.models.loader import DTYPES
from llama_stack_provider_moe.compute.models.prepare import Base
from llama_stack_provider_moe.compute.models.upcycle import model_folder
from llama_stack_provider_moe.compute.train import checkpoints
from llama_stack_provider_moe.errors import EngineFailed
from llama_stack_provider_moe.ground import liveness
from llama_stack_provider_moe.spec import GRPOSpec

_LOCK = ".lock"
_WAIT_S = 0.5


class PolicyFolder:
    """A folder with the newest weights.

    Args:
        folder: made anew; what is in it is deleted.
        spec: the job.
        base: its loaded model.
        model: with its adapter.
    """

    def __init__(self, folder: Path, spec: GRPOSpec, base: Base, model: nn.Module) -> None:
        self.folder = folder
        self._model, self._base = model, base
        self._source, self._dtype = spec.model, DTYPES[spec.training.dtype]
        self._adapter = folder / "adapter"
        self._plan: MergePlan | None = None
        self._parts: list[list[TensorEntry]] = []
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()

    def write(self) -> None:
        """Write the weights as they are.

        Raises:
            AdapterError, ModelError: the adapter can't be merged exactly.
        """
        if not isinstance(self._model, PeftModel):
            for path in self.folder.iterdir():
                path.unlink()
            checkpoints.write(self._model, self._base.tokenizer, self.folder, self._base.shipped.restored())
            return
        checkpoints.write(self._model, self._base.tokenizer, self._adapter, self._base.shipped.restored())
        if self._plan is not None:
            self._plan.updates.read_again()
            self._write(self._plan, self._anew(self._plan))
            return
        base = model_folder(self._source, "model")
        plan = self._plan = make_plan(base, self._adapter, self._dtype)
        groups = ([each for each in plan.entries if (each.name in plan.places) is changes] for changes in (False, True))
        self._parts = [part for group in groups if group for part in shards(group, SHARD_BYTES)]
        self._write(plan, self._parts)
        texts = {"config.json": config_text(base, str(self._dtype).removeprefix("torch."), self._adapter)}
        if len(self._parts) > 1:
            texts[INDEX] = index_text([[plan.written(each) for each in part] for part in self._parts])
        for name, text in texts.items():
            (self.folder / name).write_text(text, encoding="utf-8")
        for name, file in side_files(base, self._adapter).items():
            shutil.copyfile(file, self.folder / name)

    def _write(self, plan: MergePlan, parts: list[list[TensorEntry]]) -> None:
        """Write some of the files, each under another name first: vLLM may still map the old one."""
        with liveness.stage("merging the policy", sum(map(len, parts)), "tensors") as counter:
            for part in parts:
                target = self.folder / file_name(self._parts.index(part), len(self._parts))
                entries = [plan.written(entry) for entry in part]
                new = target.with_suffix(".writing")
                with new.open("wb") as out:
                    out.write(header(entries))
                    for entry, made in zip(part, entries, strict=True):
                        write_tensor(plan, entry, made.dtype, out)
                        counter.advance()
                os.replace(new, target)

    @property
    def sizes(self) -> tuple[int, int]:
        """Bytes of all weights, and of those that are written anew each time."""
        whole = sum(path.stat().st_size for path in self.folder.glob("*.safetensors"))
        if self._plan is None:
            return whole, whole
        return whole, sum(self._plan.written(each).nbytes for part in self._anew(self._plan) for each in part)

    def _anew(self, plan: MergePlan) -> list[list[TensorEntry]]:
        return [part for part in self._parts if part[0].name in plan.places]


@contextmanager
def alone_in(folder: Path, name: str, deadline_s: float) -> Iterator[Path]:
    """The folder inside `folder` for this job's weights, while no other job uses the server.

    Args:
        folder: `engines.NAME.weights_dir`.
        name: of the server.
        deadline_s: longest wait for another job to end.

    Raises:
        EngineFailed: it is not there, or another job still uses it.
    """
    setting = f"engines.{name}.weights_dir"
    try:
        lock = (folder / _LOCK).open("a")
    except OSError as error:
        raise EngineFailed(f"{setting}: {folder} can't be written: {error.strerror}") from error
    with lock:
        _lock(lock, name, deadline_s)
        policy = folder / "policy"
        try:
            yield policy
        finally:
            shutil.rmtree(policy, ignore_errors=True)


def _lock(file: IO[str], name: str, deadline_s: float) -> None:
    until_s = time.monotonic() + deadline_s
    with liveness.stage(f"waiting until no other job uses engine {name}", unit="tries") as counter:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                counter.advance()
                if time.monotonic() > until_s:
                    raise EngineFailed(f"rl.engine: another job uses the server {name!r}, and did not end within "
                                       f"{deadline_s:g} s (rl.engine.deadline_s)") from None  # fmt: skip
                time.sleep(_WAIT_S)
