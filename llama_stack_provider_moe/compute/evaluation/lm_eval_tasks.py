"""Tasks of lm-eval (EleutherAI's lm-evaluation-harness), if it is installed and has the tasks' data."""

import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llama_stack_provider_moe.compute.evaluation.report import TaskScore
from llama_stack_provider_moe.ground import liveness

PREFERRED = ("acc_norm,none", "acc,none", "exact_match,none")


def run_tasks(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    names: Sequence[str],
    batch_size: int,
    skip: Callable[[str], None],
) -> dict[str, TaskScore]:
    """Scores by task.

    Args:
        model: with or without adapters, in evaluation mode.
        tokenizer: of the model.
        names: of the tasks.
        batch_size: rows in one pass.
        skip: called with the reason for each task that can't run here.
    """
    if not names:
        return {}
    if importlib.util.find_spec("lm_eval") is None:
        skip(f"tasks {', '.join(names)}: lm-eval is not installed (pip install 'llama-stack-provider-moe[eval]')")
        return {}
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    class Counted(HFLM):  # type: ignore[misc]
        """Counts each call of the model as a sign of life."""

        def _model_call(self, *arguments: object, **keywords: object) -> object:
            counter.advance()
            return super()._model_call(*arguments, **keywords)

        def _model_generate(self, *arguments: object, **keywords: object) -> object:
            counter.advance()
            return super()._model_generate(*arguments, **keywords)

    wrapped = Counted(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    found = {}
    for name in names:
        try:
            with liveness.stage(f"lm-eval {name}", unit="calls of the model") as counter:
                results = lm_eval.simple_evaluate(model=wrapped, tasks=[name], log_samples=False)
        except (OSError, ValueError, KeyError) as error:  # no such task, or its data is not available
            skip(f"task {name}: {type(error).__name__}: {error}")
            continue
        score = _score(results["results"].get(name, {}), results["n-samples"].get(name, {}))
        if score is None:
            skip(f"task {name}: it has none of the metrics {', '.join(PREFERRED)} with a standard error")
        else:
            found[name] = score
    return found


def _score(results: dict[str, Any], samples: dict[str, Any]) -> TaskScore | None:
    for key in PREFERRED:
        metric, _, kind = key.partition(",")
        error = results.get(f"{metric}_stderr,{kind}")
        if key in results and isinstance(error, int | float):
            return TaskScore(metric=metric, value=results[key], standard_error=error, n=samples["effective"])
    return None
