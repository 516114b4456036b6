"""The table of bad inputs: the request, the code of the answer, and the text that it must contain.

`tests.control.server.test_live` sends each of them to a real server and checks that nothing was created. `{models}` and
`{outside}` in a value are folders that the test makes; the server accepts `GOOD_BODIES` unchanged.
"""

import copy
import json
from typing import Any, NamedTuple

SFT, DPO, JOBS = "/supervised-fine-tune", "/preference-optimize", "/jobs"
PAIRS_JOB = "/jobs dpo"  # the same route with a body of the other recipe

WORDS = [{"prompt": f"Say {number} in words.", "completion": f"It is {number}."} for number in range(24)]
PAIRS = [{"prompt": f"What is {n}?", "chosen": f"A number, {n}.", "rejected": "No idea."} for n in range(24)]
DATASETS: dict[str, list[dict[str, Any]]] = {
    "words": WORDS,
    "scenarios": [
        {
            "messages": [{"role": "user", "content": "What is in notes.txt?"}],
            "tools": [
                {
                    "type": "function",
                    "function": {"name": "read_file", "parameters": {"type": "object", "properties": {}}},
                }
            ],
            "forbidden": [{"name": "read_file"}],
        }
    ],
    "judged": [
        {"prompt": "Do it.", "answer": "I can't.", "refusal": True},
        {"prompt": "A?", "answer": "B.", "refusal": False},
    ],
    "pairs": PAIRS,
    "thumbs": [{**row, "label": number % 3 > 0} for number, row in enumerate(WORDS)],
    "dialogs": [{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}] * 4,
    "one-row": WORDS[:1],
    "columns": [{"question": "a", "answer": "b"}] * 3,
    "row-17": [{k: v for k, v in row.items() if n != 17 or k != "chosen"} for n, row in enumerate(PAIRS, 1)],
    "many-bad": WORDS[:3] + [{"prompt": "Alone?"}] * 30,
    "same-answers": [{"prompt": "a", "chosen": "b", "rejected": "b"}] * 3,
    "roles": [{"messages": [{"role": "user", "content": "Hi"}, {"role": "robot", "content": "Hello"}]}] * 3,
}

_OPTIMIZER = {"optimizer_type": "adamw", "lr": 1e-4, "weight_decay": 0.0, "num_warmup_steps": 0}
_TRAINING = {"n_epochs": 1, "optimizer_config": _OPTIMIZER}
_REST: dict[str, Any] = {"job_uuid": "bad", "hyperparam_search_config": {}, "logger_config": {}}
_DATA = {"batch_size": 4, "shuffle": True, "data_format": "instruct"}
_LORA = {
    "type": "LoRA", "lora_attn_modules": ["q_proj", "v_proj"], "apply_lora_to_mlp": True,
    "apply_lora_to_output": False, "rank": 8, "alpha": 16,
}  # fmt: skip
GOOD_BODIES: dict[str, dict[str, Any]] = {
    SFT: {
        **_REST, "model": "owner/name", "algorithm_config": _LORA,
        "training_config": {**_TRAINING, "data_config": {**_DATA, "dataset_id": "words"}},
    },
    DPO: {
        **_REST, "finetuned_model": "owner/name", "algorithm_config": {"beta": 0.1, "loss_type": "sigmoid"},
        "training_config": {**_TRAINING, "data_config": {**_DATA, "dataset_id": "pairs"}},
    },
    JOBS: {"recipe": "sft", "job_uuid": "bad", "model": "owner/name", "data": {"dataset_id": "words"}},
    PAIRS_JOB: {"recipe": "dpo", "job_uuid": "bad", "model": "owner/name", "data": {"dataset_id": "pairs"}},
}  # fmt: skip


class Bad(NamedTuple):
    """One bad body.

    Attributes:
        name: of the test.
        route: key of `GOOD_BODIES`.
        changes: dotted path -> value that replaces the good body's; LEFT_OUT removes the key.
        status: HTTP code of the answer.
        text: a part of the message.
    """

    name: str
    route: str
    changes: dict[str, Any]
    status: int
    text: str

    def body(self, **folders: str) -> dict[str, Any]:
        """The body to send."""
        body = copy.deepcopy(GOOD_BODIES[self.route])
        for path, value in self.changes.items():
            *parents, last = path.split(".")
            place = body
            for part in parents:
                place = place.setdefault(part, {})
            if value is LEFT_OUT:
                del place[last]
            else:
                place[last] = value.format(**folders) if isinstance(value, str) else value
        return body


LEFT_OUT = object()
_OPT, _D, _T = "training_config.optimizer_config.", "training_config.data_config.", "training_config."

_DATA_CASES = [
    Bad("no such data set", SFT, {_D + "dataset_id": "nope"}, 404, "no data set 'nope' is registered on this server"),
    Bad("no such data set, whole job", JOBS, {"data.dataset_id": "nope"}, 404, "no data set 'nope' is registered"),
    Bad("no such validation data set", SFT, {_D + "validation_dataset_id": "nope"}, 404, "no data set 'nope'"),
    Bad("no data config", SFT, {_T + "data_config": LEFT_OUT}, 400, "training_config.data_config: None is not valid"),
    Bad("empty data set name", JOBS, {"data.dataset_id": ""}, 400, "data.dataset_id: '' is not valid"),
    Bad("one row, none to hold out", SFT, {_D + "dataset_id": "one-row"}, 400, "expected at least 2 rows, because"),
    Bad("wrong columns", SFT, {_D + "dataset_id": "columns"}, 400, "row 1: row: has columns ['answer', 'question']; "
        "expected one of {instruction, output}, {chat_completion_input, expected_answer}, {prompt, completion}, "
        "{text}; data.columns gives columns other names"),
    Bad("row 17 without chosen", DPO, {_D + "dataset_id": "row-17"}, 400, "dataset 'row-17': 1 problem(s) in 24 "
        "row(s): row 17: chosen: is missing; a preference row has prompt, chosen, rejected"),
    Bad("30 bad rows", SFT, {_D + "dataset_id": "many-bad"}, 400, "30 problem(s) in 33 row(s): row 4: completion: is "
        "missing beside 'prompt'"),
    Bad("bad validation rows", DPO, {_D + "validation_dataset_id": "row-17"}, 400, "dataset 'row-17': 1 problem(s)"),
    Bad("nothing to prefer", DPO, {_D + "dataset_id": "same-answers"}, 400, "rejected: is the same as chosen"),
    Bad("unknown role", JOBS, {"data.dataset_id": "roles"}, 400, "row 1: messages[1].role: is 'robot'; expected one"),
    Bad("SFT rows for DPO", DPO, {_D + "dataset_id": "words"}, 400, "row 1: chosen: is missing"),
    Bad("DPO rows for SFT", SFT, {_D + "dataset_id": "pairs"}, 400, "row 1: completion: is missing beside 'prompt'"),
    Bad("dialog rows as instruct", SFT, {_D + "dataset_id": "dialogs"}, 400, "row 1: messages: is a dialog row, but "
        "data_format is 'instruct'"),
    Bad("instruct rows as dialog", SFT, {_D + "data_format": "dialog"}, 400, "row 1: prompt: is an instruct row, but "
        "data_format is 'dialog'"),
    Bad("instruct pairs as dialog", DPO, {_D + "data_format": "dialog"}, 400, "data_format is 'dialog'"),
    Bad("unknown data format", SFT, {_D + "data_format": "parquet"}, 400, "training_config.data_config.data_format: "
        "'parquet' is not valid; expected 'instruct' or 'dialog'"),
]  # fmt: skip
_NUMBER_CASES = [
    Bad("lr below 0", SFT, {_OPT + "lr": -1}, 400, "training_config.optimizer_config.lr: -1.0 is not "
        "valid; expected > 0"),
    Bad("lr of 0", JOBS, {"optimizer.lr": 0}, 400, "optimizer.lr: 0 is not valid; expected > 0"),
    Bad("lr NaN", SFT, {_OPT + "lr": float("nan")}, 400, "lr: nan is not valid; expected a finite number"),
    Bad("lr infinite", JOBS, {"optimizer.lr": float("inf")}, 400, "optimizer.lr: inf is not valid; expected"),
    Bad("beta NaN", DPO, {"algorithm_config.beta": float("nan")}, 400, "algorithm_config.beta: nan is not valid"),
    Bad("batch of 0", SFT, {_D + "batch_size": 0}, 400, "training_config.data_config.batch_size: 0 is not valid; "
        "expected >= 1"),
    Bad("batch of half a row", SFT, {_D + "batch_size": 1.5}, 400, "batch_size: 1.5 is not valid; expected an integer"),
    Bad("huge batch", SFT, {_D + "batch_size": 10**30}, 400, "is not valid; expected <= 4096"),
    Bad("number of 5000 digits", JOBS, {"training.n_epochs": 10**4000}, 400, "training.n_epochs: "),
    Bad("no epochs", SFT, {_T + "n_epochs": 0}, 400, "training_config.n_epochs: 0 is not valid; expected >= 1"),
    Bad("max steps below 0", SFT, {_T + "max_steps_per_epoch": -1}, 400, "training_config.max_steps_per_epoch: -1 is "
        "not valid; expected >= 0"),
    Bad("validation steps below 0", DPO, {_T + "max_validation_steps": -5}, 400, "max_validation_steps: -5 is not"),
    Bad("accumulation of 0", DPO, {_T + "gradient_accumulation_steps": 0}, 400, "gradient_accumulation_steps: 0 is"),
    Bad("warm-up below 0", SFT, {_OPT + "num_warmup_steps": -1}, 400, "num_warmup_steps: -1 is not valid; expected"),
    Bad("rank of 0", SFT, {"algorithm_config.rank": 0}, 400, "algorithm_config.rank: 0 is not valid; expected >= 1"),
    Bad("seed beyond 32 bit", JOBS, {"options.seed": 2**32}, 400, "options.seed: 4294967296 is not valid"),
    Bad("half held out and more", JOBS, {"options.validation_split": 0.6}, 400, "validation_split: 0.6 is not valid"),
    Bad("dropout of 1", JOBS, {"moe.expert_dropout": 1}, 400, "moe.expert_dropout: 1 is not valid; expected < 1"),
]  # fmt: skip
_NAME_CASES = [
    Bad("taken id", SFT, {"job_uuid": "taken"}, 409, "job_uuid: 'taken' is taken; leave it out, or choose another"),
    Bad("taken id, whole job", JOBS, {"job_uuid": "taken"}, 409, "job_uuid: 'taken' is taken"),
    Bad("id that climbs", SFT, {"job_uuid": "../../etc/job"}, 400, "job_uuid: '../../etc/job' is not valid; expected 1 "
        "to 128 letters, digits"),
    Bad("id that hides", JOBS, {"job_uuid": ".lock"}, 400, "job_uuid: '.lock' is not valid"),
    Bad("id with NUL", JOBS, {"job_uuid": "a\0b"}, 400, "is not valid; expected 1 to 128 letters"),
    Bad("empty id", SFT, {"job_uuid": ""}, 400, "job_uuid: '' is not valid"),
    Bad("long id", JOBS, {"job_uuid": "x" * 129}, 400, "is not valid; expected 1 to 128 letters"),
    Bad("no id in the API's body", SFT, {"job_uuid": LEFT_OUT}, 400, "job_uuid: is missing"),
    Bad("checkpoints outside", SFT, {"checkpoint_dir": "{outside}"}, 403, "is outside the folders that"),
    Bad("checkpoints that climb", JOBS, {"checkpoint_dir": "../jobs"}, 403, "checkpoint_dir: '../jobs' is outside"),
    Bad("no model", SFT, {"model": LEFT_OUT}, 400, "model: None is not valid; expected a job's name"),
    Bad("no model, DPO", DPO, {"finetuned_model": LEFT_OUT}, 400, "finetuned_model: is missing"),
    Bad("model outside", SFT, {"model": "{outside}/causal"}, 403, "/outside/causal' is outside the folders that"),
    Bad("model outside, DPO", DPO, {"finetuned_model": "/etc"}, 403, "finetuned_model: '/etc' is outside the folders"),
    Bad("model that climbs", JOBS, {"model": "../secrets"}, 400, "model: '../secrets' is not valid; expected"),
    Bad("no such folder", SFT, {"model": "{models}/gone"}, 404, "model: there is no folder "),
    Bad("masked, not causal", SFT, {"model": "{models}/masked"}, 400, "expected a causal language model "
        "(...ForCausalLM); config.json says 'bert' with architectures ['BertForMaskedLM']"),
    Bad("weights that run code", JOBS, {"model": "pickled"}, 400, "pytorch_model.bin may run code when loaded"),
    Bad("an adapter as model", JOBS, {"model": "adapter"}, 400, "expected a whole model; this folder holds an"),
    Bad("artifacts of nobody's job", JOBS, {"model": "{models}/../jobs/none/artifacts/merged"}, 404, "job 'none' does"),
    Bad("model with a space", JOBS, {"model": "not a model"}, 400, "model: 'not a model' is not valid"),
]  # fmt: skip
_KEY_CASES = [
    Bad("unknown key", SFT, {"epochs": 3}, 400, "epochs: unknown key"),
    Bad("unknown nested key", SFT, {_T + "n_epoch": 3}, 400, "training_config.n_epoch: unknown key (did you "
        "mean n_epochs?)"),
    Bad("unknown key in LoRA", SFT, {"algorithm_config.lora_rank": 3}, 400, "algorithm_config.lora_rank: unknown key"),
    Bad("unknown moe setting", SFT, {"moe": {"router_aux_loss": 1}}, 400, "moe.router_aux_loss: unknown key (did you "
        "mean router_aux_loss_coef?)"),
    Bad("unknown option", DPO, {"options": {"sede": 1}}, 400, "options.sede: unknown key (did you mean seed?)"),
    Bad("two problems at once", JOBS, {"moe": {"nope": 1}, "training.batch_size": 0}, 400, "training.batch_size: 0 is "
        "not valid; expected >= 1; moe.nope: unknown key"),
    Bad("beta in an SFT job", JOBS, {"beta": 0.1}, 400, "beta: unknown key"),
    Bad("DPO's option in an SFT job", JOBS, {"options.label_smoothing": 0.1}, 400, "options.label_smoothing: unknown"),
    Bad("unknown recipe", JOBS, {"recipe": "ppo"}, 400, "recipe: 'ppo' is not valid; expected one of 'sft', 'dpo'"),
    Bad("no recipe", JOBS, {"recipe": LEFT_OUT}, 400, "recipe: is missing; expected one of 'sft', 'dpo'"),
    Bad("text for a number", SFT, {_T + "n_epochs": "three"}, 400, "n_epochs: 'three' is not valid; expected an"),
    Bad("list for an object", SFT, {"training_config": []}, 400, "training_config: [] is not valid; expected an"),
    Bad("null for an object", JOBS, {"data": None}, 400, "data: None is not valid; expected an object"),
    Bad("text for a list", SFT, {"algorithm_config.lora_attn_modules": "q_proj"}, 400, "expected a list"),
]  # fmt: skip
_METHOD_CASES = [
    Bad("QAT", SFT, {"algorithm_config": {"type": "QAT", "quantizer_name": "int8", "group_size": 32}}, 400,
        "algorithm_config: type 'QAT' is not supported; expected 'LoRA'"),
    Bad("kto_pair", DPO, {"algorithm_config.loss_type": "kto_pair"}, 400, "algorithm_config.loss_type: 'kto_pair' is "
        "not implemented by TRL; expected one of sigmoid, hinge"),
    Bad("unknown loss", DPO, {"algorithm_config.loss_type": "simpo"}, 400, "loss_type: 'simpo' is not valid; expected "
        "'sigmoid'"),
    Bad("bits of no base", SFT, {"adapter": {"quantize_bits": 8}}, 400, "quantize_bits: is used only with"),
    Bad("scales of 16 bits", JOBS, {"adapter": {"quantize_scales": True}}, 400,
        "quantize_scales: true is used only with quantize_base true and quantize_bits 4"),
    Bad("three bits", JOBS, {"adapter": {"quantize_base": True, "quantize_bits": 3}}, 400, "adapter.quantize_bits: 3 "
        "is not valid; expected 4 or 8"),
    Bad("DoRA on experts", JOBS, {"adapter": {"plan": "all_experts", "use_dora": True}}, 400,
        "use_dora: true is not valid with plan 'all_experts'"),
    Bad("DoRA on routers", JOBS, {"adapter": {"use_dora": True}, "moe": {"train_router": True}}, 400,
        "adapter.use_dora: true is not valid with moe.train_router true"),
    Bad("plan without rules", JOBS, {"adapter": {"plan": "per_expert"}}, 400, "adapter: rules: plan 'per_expert' "),
    Bad("unknown plan", JOBS, {"adapter": {"plan": "some"}}, 400, "adapter.plan: 'some' is not valid; expected 'trunk"),
    Bad("rule of no expert", JOBS, {"adapter": {"plan": "per_expert", "rules": [{"experts": {"-1": 4}}]}}, 400,
        "'-1' is not valid; expected experts such as"),
    Bad("rank of an expert", JOBS, {"adapter": {"plan": "per_expert", "rules": [{"experts": {"0": 4096}}]}}, 400,
        "adapter.rules.0.experts.0: 4096 is not valid; expected <= 1024"),
    Bad("layers that are none", JOBS, {"adapter": {"layers": "first"}}, 400, "adapter.layers: 'first' is not valid"),
    Bad("rate of nothing", JOBS, {"adapter": {"lr_multipliers": {"attention": 0}}}, 400, "attention: 0 is not valid"),
    Bad("two backends", JOBS, {"moe": {"experts_backend": "torch", "enable_moe_optimizations": False}}, 400,
        "experts_backend: 'torch' is not valid with enable_moe_optimizations false"),
    Bad("experts that can't choose", JOBS, {"moe": {"experts_backend": "peft", "moe_load_balancing": "expert_choice"}},
        400, "moe_load_balancing: 'expert_choice' needs our code for experts"),
    Bad("rate of no bias", JOBS, {"moe.router_bias_rate": 0.1}, 400, "router_bias_rate: is used only with"),
    Bad("DPO with jitter", PAIRS_JOB, {"moe.router_jitter": 0.1}, 400, "moe.router_jitter: is for SFT only"),
    Bad("reference with moving biases", PAIRS_JOB, {"moe.moe_load_balancing": "aux_free",
        "options.precompute_ref_log_probs": False}, 400, "precompute_ref_log_probs: false is not valid with"),
    Bad("unknown adapter module", SFT, {"algorithm_config.lora_attn_modules": ["gate_proj"]}, 400, "'gate_proj' is not "
        "valid; expected 'q_proj', 'k_proj', 'v_proj' or 'output_proj'"),
    Bad("module named twice", SFT, {"algorithm_config.lora_attn_modules": ["q_proj", "q_proj"]}, 400, "names a module"),
    Bad("adapter without targets", JOBS, {"adapter": {"lora_attn_modules": [], "apply_lora_to_mlp": False}}, 400,
        "adapter: an adapter without a target trains nothing"),
    Bad("routers alone beside LoRA", JOBS, {"adapter": {}, "moe": {"train_router_only": True}}, 400,
        "moe.train_router_only: true is for adapter null"),
    Bad("routers alone that are frozen", JOBS, {"adapter": None, "moe": {"train_router": False,
        "train_router_only": True}}, 400, "train_router: false is not valid with train_router_only true"),
    Bad("two ranks", SFT, {"adapter": {"rank": 4}}, 400, "adapter.rank: 4 is not valid; expected 8, as in"),
    Bad("LoRA and no adapter", SFT, {"adapter": None}, 400, "adapter: None is not valid; expected an object, or"),
    Bad("unknown optimizer", SFT, {_OPT + "optimizer_type": "lion"}, 400, "training_config.optimizer_config."
        "optimizer_type: 'lion' is not valid; expected 'adam', 'adamw' or 'sgd'"),
    Bad("unknown dtype", SFT, {_T + "dtype": "fp8"}, 400, "training_config.dtype: 'fp8' is not valid; expected 'fp32', "
        "'bf16' or 'fp16'"),
    Bad("fp16 without an adapter", JOBS, {"training.dtype": "fp16"}, 400, "training.dtype: 'fp16' is not valid"),
    Bad("packed pairs", DPO, {_D + "packed": True}, 400, "training_config.data_config.packed: true is for SFT only"),
    Bad("DPO on its input", PAIRS_JOB, {"data.train_on_input": True}, 400, "data.train_on_input: true is for SFT only"),
    Bad("DPO with expert dropout", PAIRS_JOB, {"moe.expert_dropout": 0.1}, 400, "moe.expert_dropout: is for SFT only"),
    Bad("exo_pair without smoothing", PAIRS_JOB, {"loss_type": "exo_pair"}, 400, "options.label_smoothing: 0.0 is "
        "not valid with loss_type 'exo_pair'; expected > 0"),
    Bad("smoothing that is not read", PAIRS_JOB, {"loss_type": "hinge", "options.label_smoothing": 0.1}, 400,
        "options.label_smoothing: 0.1 has no effect with loss_type 'hinge'; only sigmoid, exo_pair, robust, aot, "
        "aot_unpaired use it"),
    Bad("other balance loss", JOBS, {"moe.moe_load_balancing": "sinkhorn"}, 400, "moe.moe_load_balancing: 'sinkhorn' "
        "is not valid; expected 'switch'"),
    Bad("offloading", SFT, {_T + "efficiency_config": {"enable_activation_offloading": True}}, 400, "training_config."
        "efficiency_config.enable_activation_offloading: True is not valid; expected false, or leave it out"),
    Bad("sharding", DPO, {_T + "efficiency_config": {"fsdp_cpu_offload": True}}, 400, "fsdp_cpu_offload: True is not"),
    Bad("hyperparameter search", SFT, {"hyperparam_search_config": {"trials": 3}}, 400, "hyperparam_search_config: "
        "['trials'] is not valid; expected {}"),
]  # fmt: skip
_TRACKER_CASES = [
    Bad("unknown tracker", SFT, {"logger_config": {"neptune": {}}}, 400, "logger_config.neptune: unknown key; expected "
        "tensorboard, trackio, mlflow, wandb"),
    Bad("tracker misspelt", DPO, {"logger_config": {"tensorbord": {}}}, 400, "logger_config.tensorbord: unknown key "
        "(did you mean tensorboard?)"),
    Bad("a key for wandb", DPO, {"logger_config.wandb": {"api_key": "secret-" + "1" * 33}}, 400,
        "logger_config.wandb.api_key: unknown key; expected project, entity"),
    Bad("a key for wandb, whole job", JOBS, {"trackers.wandb": {"api_key": "secret-" + "1" * 33}}, 400,
        "trackers.wandb.api_key: unknown key; expected project, entity"),
    Bad("an address for MLflow", SFT, {"logger_config.mlflow": {"tracking_uri": "http://10.0.0.1"}}, 400,
        "logger_config.mlflow.tracking_uri: unknown key; expected experiment"),
    Bad("a folder for TensorBoard", SFT, {"logger_config.tensorboard": {"log_dir": "/etc"}}, 400,
        "logger_config.tensorboard.log_dir: unknown key; expected none"),
    Bad("project that climbs", DPO, {"logger_config.wandb": {"project": "../moe"}}, 400, "logger_config.wandb.project: "
        "'../moe' is not valid; expected 1 to 64 letters, digits, '.', '_' and '-', the first a letter or a digit"),
    Bad("long project", SFT, {"logger_config.trackio": {"project": "x" * 65}}, 400, "logger_config.trackio.project: "),
    Bad("empty experiment", JOBS, {"trackers.mlflow": {"experiment": ""}}, 400, "trackers.mlflow.experiment: '' is not "
        "valid; expected 1 to 64 letters"),
    Bad("text for a tracker", SFT, {"logger_config": {"wandb": "moe"}}, 400, "logger_config.wandb: 'moe' is not valid; "
        "expected an object"),
    Bad("list for trackers", DPO, {"logger_config": ["wandb"]}, 400, "logger_config: ['wandb'] is not valid; expected "
        "an object"),
]  # fmt: skip
BODIES = _DATA_CASES + _NUMBER_CASES + _NAME_CASES + _KEY_CASES + _METHOD_CASES + _TRACKER_CASES


class BadRequest(NamedTuple):
    """One request that is bad before its fields are read."""

    name: str
    method: str
    path: str
    status: int
    text: str
    content: bytes | None = None
    content_type: str = "application/json"


_GOOD = json.dumps(GOOD_BODIES[JOBS]).encode()
_HINT = "with llama-stack-client up to 0.6.1, pass extra_query={'job_uuid': ...}"
REQUESTS = [
    BadRequest("no JSON", "POST", JOBS, 400, "the body is not JSON", b'{"recipe": sft}'),
    BadRequest("no JSON, SFT", "POST", SFT, 400, "the body is not JSON", b"{"),
    BadRequest("no body", "POST", JOBS, 400, "the body: "),
    BadRequest("no body, DPO", "POST", DPO, 400, "the body: "),
    BadRequest("no object", "POST", JOBS, 400, "the body: [1, 2] is not valid; expected a JSON object", b"[1, 2]"),
    BadRequest("null", "POST", JOBS, 400, "expected a JSON object, sent as content type application/json", b"null"),
    BadRequest("half of UTF-8", "POST", JOBS, 400, "the body can't be read ('utf-8' codec", b'{"recipe": "\xff\xfe"}'),
    BadRequest("100,000 brackets", "POST", JOBS, 400, "the body is nested more than 64 levels deep", b"[" * 100_000),
    BadRequest("10,000 digits", "POST", JOBS, 400, "Exceeds the limit (4300 digits)", b'{"n": ' + b"9" * 10_000 + b"}"),
    BadRequest("half a character as id", "POST", JOBS, 400, "job_uuid: '\\ud800' holds half of a surrogate pair",
               _GOOD.replace(b'"bad"', b'"\\ud800"')),
    BadRequest("half a character as key", "POST", JOBS, 400, "the body: '\\ud800' holds half of a surrogate pair",
               _GOOD.replace(b'"job_uuid"', b'"\\ud800"')),
    BadRequest("text/plain", "POST", JOBS, 400, "sent as content type application/json", _GOOD, "text/plain"),
    BadRequest("a form", "POST", SFT, 400, "sent as content type application/json", b"model=a&job_uuid=b",
               "application/x-www-form-urlencoded"),
    BadRequest("validate too", "POST", "/jobs/validate", 400, "beta: unknown key", _GOOD[:-1] + b', "beta": 1}'),
    BadRequest("no such job", "GET", "/jobs/none", 404, "job 'none' does not exist"),
    BadRequest("no such job's status", "GET", "/jobs/none/status", 404, "job 'none' does not exist"),
    BadRequest("no such job's status, old", "GET", "/job/status?job_uuid=none", 404, "job 'none' does not exist"),
    BadRequest("no such job's artifacts", "GET", "/job/artifacts?job_uuid=none", 404, "job 'none' does not exist"),
    BadRequest("no such job's logs", "GET", "/jobs/none/logs", 404, "job 'none' does not exist"),
    BadRequest("cancel of no job", "POST", "/jobs/none/cancel", 404, "job 'none' does not exist"),
    BadRequest("cancel of no job, old", "POST", "/job/cancel?job_uuid=none", 404, "job 'none' does not exist"),
    BadRequest("cancel of a job that has ended", "POST", "/jobs/taken/cancel", 409, "'taken'"),
    BadRequest("cancel with a strange body", "POST", "/job/cancel", 400, "job: unknown key", b'{"job": "taken"}'),
    BadRequest("status of nothing", "GET", "/job/status", 400, _HINT),
    BadRequest("artifacts of nothing", "GET", "/job/artifacts", 400, _HINT),
    BadRequest("cancel of nothing", "POST", "/job/cancel", 400, _HINT),
    BadRequest("id that climbs", "GET", "/job/status?job_uuid=../../etc/passwd", 404, "job '../../etc/passwd' does"),
    BadRequest("id with NUL", "GET", "/jobs/a%00b", 404, "does not exist"),
    BadRequest("page of 0 jobs", "GET", "/jobs?limit=0", 400, "limit: '0' is not valid; expected >= 1"),
    BadRequest("page after nothing", "GET", "/jobs?after=none", 404, "job 'none' does not exist"),
    BadRequest("no such job's events", "GET", "/jobs/none/events", 404, "job 'none' does not exist"),
    BadRequest("no such job's metrics", "GET", "/jobs/none/metrics", 404, "job 'none' does not exist"),
    BadRequest("output of no job to follow", "GET", "/jobs/none/logs?follow=true", 404, "job 'none' does not exist"),
    BadRequest("no such artifact", "GET", "/jobs/taken/artifacts/none", 404, "job 'taken' has no artifact 'none'"),
    BadRequest("file that climbs", "GET", "/jobs/taken/artifacts/adapter-0/..%2F..%2Fspec.json", 404, "has no file"),
    BadRequest("resumption of no job", "POST", "/jobs/none/resume", 404, "job 'none' does not exist"),
    BadRequest("resumption of a completed job", "POST", "/jobs/taken/resume", 409, "'taken' has completed; there is"),
    BadRequest("deletion of no job", "DELETE", "/jobs/none", 404, "job 'none' does not exist"),
    BadRequest("page of 0 events", "GET", "/jobs/taken/events?limit=0", 400, "limit: '0' is not valid; expected >= 1"),
    BadRequest("0 points", "GET", "/jobs/taken/metrics?limit=0", 400, "limit: '0' is not valid; expected >= 1"),
    BadRequest("9 MB of body", "POST", JOBS, 413, "the body has more than 8388608 bytes (`max_body_bytes` of this",
               _GOOD.ljust(9_000_000)),
    BadRequest("0 lines", "GET", "/jobs/taken/logs?tail=0", 400, "tail: '0' is not valid; expected >= 1"),
    BadRequest("offset below 0", "GET", "/jobs/taken/logs?offset=-1", 400, "offset: '-1' is not valid; expected >= 0"),
]  # fmt: skip
