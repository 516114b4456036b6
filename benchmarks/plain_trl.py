"""The SFT job of `job_against_trl` as a plain script: transformers, PEFT and TRL's SFTTrainer, nothing of ours.

    python -m benchmarks.plain_trl JOB.json

It does what its user would write: load, train, write a checkpoint at the epoch's end, save the adapter. A line in the
file `marks` follows each step, as our job's event does.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import load_dataset
from peft import LoraConfig
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from trl import SFTConfig, SFTTrainer


class Marks(TrainerCallback):
    """Writes a line once a step's figures are there."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("w", encoding="utf-8", buffering=1)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: object,
    ) -> None:
        """Write the step's loss."""
        if logs is not None and "loss" in logs:
            self._file.write(f'"type":"step" {logs["loss"]}\n')


def main() -> None:
    """Train as the file says."""
    job: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
    rows = load_dataset("json", data_files=job["rows"], split="train", cache_dir=f"{job['out']}/cache")
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=job["out"],
            num_train_epochs=1,
            per_device_train_batch_size=job["batch_size"],
            learning_rate=job["lr"],
            max_length=job["max_length"],
            bf16=False,
            gradient_checkpointing=False,
            train_sampling_strategy="sequential",
            logging_steps=1,
            save_strategy="epoch",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        ),
        train_dataset=rows,
        processing_class=tokenizer,
        peft_config=LoraConfig(
            r=job["rank"], lora_alpha=2 * job["rank"], target_modules=job["modules"], target_parameters=job["experts"]
        ),
        callbacks=[Marks(Path(job["marks"]))],
    )
    trainer.train()
    trainer.save_model(f"{job['out']}/adapter")


if __name__ == "__main__":
    main()
