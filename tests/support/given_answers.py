"""Jobs whose answers are given, not sampled: `python -m tests.support.given_answers JOB_FOLDER ...`.

Sampling differs between one process and two. Given answers depend on the prompt, the step and the place in the group,
so that the rest of a job is comparable. Each job runs in forks of this process, which imports the libraries once.
"""

import os
import random
import sys
from pathlib import Path
from typing import Any

from llama_stack_provider_moe.compute.worker.main import be_quiet, train_together
from llama_stack_provider_moe.jobdir.folder import JobFolder


def given(trainer: Any, prompts: list[list[int]], *_: object, **__: object) -> tuple[list[list[int]], None]:
    """Answers of 1 to 6 tokens; those that are shorter end."""
    training, size = trainer.model.training, trainer.generations.answers
    first = trainer.peers.rank * len(prompts)
    answers = []
    for at, prompt in enumerate(prompts, start=first):
        chosen = random.Random(f"{prompt} {trainer.state.global_step} {at % size if training else 0}")
        answer = chosen.choices(range(10, 100), k=chosen.randint(1, 6))
        answers.append(answer if len(answer) == 6 else [*answer, trainer.eos_token_ids[0]])
    return answers, None


if __name__ == "__main__":
    folders = [JobFolder(Path(each)) for each in sys.argv[1:]]
    be_quiet(folders[0])
    from llama_stack_provider_moe.compute.recipes import distill, grpo

    grpo.GRPO._generate_single_turn = given  # type: ignore[method-assign, assignment]
    distill.OnPolicyDistillation._generate_single_turn = lambda *asked: given(*asked)[0]  # type: ignore[method-assign]
    for folder in folders:
        pid = os.fork()
        if pid == 0:
            with folder.output.open("wb", buffering=0) as output:
                os.dup2(output.fileno(), 1)
                os.dup2(output.fileno(), 2)
            code = train_together(folder, folder.read_spec().resources.ranks)
            folder.root.joinpath("exit-code").write_text(str(code))
            os._exit(0)
        os.waitpid(pid, 0)
