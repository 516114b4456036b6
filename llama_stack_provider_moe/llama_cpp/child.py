"""Run llama.cpp in a separate process, because it aborts on invalid input: quantise a GGUF file, or run one.

    $ python child.py REQUEST.json      # {"library": ..., "do": "tokenize", ...}

The results are written beside the request: `answer.json` and `logits.f32`, floats [positions, vocabulary]. The script
is run by its path, with only the standard library. It uses llama.cpp's C API through ctypes, with the structures of
version 0.5 (include/llama.h). It checks the version and compares the defaults before it uses them.
"""

import ctypes
import json
import signal
import sys
import time
from array import array
from ctypes import (
    CFUNCTYPE,
    POINTER,
    Structure,
    byref,
    c_bool,
    c_char_p,
    c_float,
    c_int8,
    c_int32,
    c_size_t,
    c_uint32,
    c_void_p,
)
from pathlib import Path
from typing import TypedDict

VERSION = "0.5."  # the structures below are of this version
_F16, _F32 = 1, 0  # enum ggml_type
_FLASH_ATTENTION_OFF, _FLASH_ATTENTION_AUTO = 0, -1


_REPORT_EVERY_S = 5.0
_reported_s = 0.0  # time.monotonic()


class LlamaRequest(TypedDict, total=False):
    """A request file. `library`, `threads` and `do` are always there, the others depend on `do`."""

    library: str
    threads: int
    do: str
    source: str
    out: str
    ftype: int
    buffer_bytes: int
    gguf: str
    texts: list[str]
    ids: list[int]
    prompt_ids: list[int]
    most_tokens: int
    ends: list[int]


Answer = dict[str, object]


def _report_work() -> None:
    """Print a sign of life. llama.cpp calls it while it works, so a process that hangs is silent."""
    global _reported_s
    if time.monotonic() - _reported_s >= _REPORT_EVERY_S:
        _reported_s = time.monotonic()
        print("llama.cpp is working", flush=True)


def _on_progress(_share: float, _: object) -> bool:
    """llama_progress_callback: false would stop the loading."""
    _report_work()
    return True


def _on_node(_: object) -> bool:
    """ggml_abort_callback, called before each node of the graph: true would stop the computation."""
    _report_work()
    return False


# These references keep the callbacks alive for as long as llama.cpp may call them.
_progress_callback = CFUNCTYPE(c_bool, c_float, c_void_p)(_on_progress)
_abort_callback = CFUNCTYPE(c_bool, c_void_p)(_on_node)


class _ModelParams(Structure):
    _fields_ = (
        ("devices", c_void_p), ("tensor_buft_overrides", c_void_p), ("n_gpu_layers", c_int32), ("split_mode", c_int32),
        ("load_mode", c_int32), ("lazy_mode", c_int32), ("main_gpu", c_int32), ("tensor_split", c_void_p),
        ("progress_callback", c_void_p), ("progress_callback_user_data", c_void_p), ("kv_overrides", c_void_p),
        ("vocab_only", c_bool), ("check_tensors", c_bool), ("use_extra_bufts", c_bool), ("no_host", c_bool),
        ("no_alloc", c_bool), ("load_mtp", c_bool),
    )  # fmt: skip


class _ContextParams(Structure):
    _fields_ = (
        ("n_ctx", c_uint32), ("n_batch", c_uint32), ("n_ubatch", c_uint32), ("n_seq_max", c_uint32),
        ("n_rs_seq", c_uint32), ("n_outputs_max", c_uint32), ("n_outputs_max_per_seq", c_uint32),
        ("n_threads", c_int32), ("n_threads_batch", c_int32), ("ctx_type", c_int32), ("rope_scaling_type", c_int32),
        ("pooling_type", c_int32), ("attention_type", c_int32), ("flash_attn_type", c_int32),
        ("rope_freq_base", c_float), ("rope_freq_scale", c_float), ("yarn_ext_factor", c_float),
        ("yarn_attn_factor", c_float), ("yarn_beta_fast", c_float), ("yarn_beta_slow", c_float),
        ("yarn_orig_ctx", c_uint32), ("defrag_thold", c_float), ("cb_eval", c_void_p), ("cb_eval_user_data", c_void_p),
        ("type_k", c_int32), ("type_v", c_int32), ("abort_callback", c_void_p), ("abort_callback_data", c_void_p),
        ("embeddings", c_bool), ("offload_kqv", c_bool), ("no_perf", c_bool), ("op_offload", c_bool),
        ("swa_full", c_bool), ("kv_unified", c_bool), ("samplers", c_void_p), ("n_samplers", c_size_t),
        ("ctx_other", c_void_p),
    )  # fmt: skip


class _QuantizeParams(Structure):
    _fields_ = (
        ("nthread", c_int32), ("ftype", c_int32), ("output_tensor_type", c_int32), ("token_embedding_type", c_int32),
        ("allow_requantize", c_bool), ("quantize_output_tensor", c_bool), ("only_copy", c_bool), ("pure", c_bool),
        ("keep_split", c_bool), ("dry_run", c_bool), ("imatrix", c_void_p), ("kv_overrides", c_void_p),
        ("tt_overrides", c_void_p), ("prune_layers", c_void_p), ("max_buf_size", c_size_t),
    )  # fmt: skip


class _Batch(Structure):
    _fields_ = (
        ("n_tokens", c_int32), ("token", POINTER(c_int32)), ("embd", POINTER(c_float)), ("pos", POINTER(c_int32)),
        ("n_seq_id", POINTER(c_int32)), ("seq_id", POINTER(POINTER(c_int32))), ("logits", POINTER(c_int8)),
    )  # fmt: skip


# name -> type of the result, types of the arguments
_FUNCTIONS: dict[str, tuple[type | None, list[type]]] = {
    "llama_version": (c_char_p, []),
    "llama_backend_init": (None, []),
    "ggml_backend_load_all_from_path": (None, [c_char_p]),
    "llama_model_default_params": (_ModelParams, []),
    "llama_context_default_params": (_ContextParams, []),
    "llama_model_quantize_default_params": (_QuantizeParams, []),
    "llama_model_quantize": (c_uint32, [c_char_p, c_char_p, POINTER(_QuantizeParams)]),
    "llama_model_load_from_file": (c_void_p, [c_char_p, _ModelParams]),
    "llama_init_from_model": (c_void_p, [c_void_p, _ContextParams]),
    "llama_model_get_vocab": (c_void_p, [c_void_p]),
    "llama_model_n_ctx_train": (c_int32, [c_void_p]),
    "llama_model_desc": (c_int32, [c_void_p, c_char_p, c_size_t]),
    "llama_vocab_n_tokens": (c_int32, [c_void_p]),
    "llama_vocab_is_eog": (c_bool, [c_void_p, c_int32]),
    "llama_tokenize": (c_int32, [c_void_p, c_char_p, c_int32, POINTER(c_int32), c_int32, c_bool, c_bool]),
    "llama_token_to_piece": (c_int32, [c_void_p, c_int32, c_char_p, c_int32, c_int32, c_bool]),
    "llama_decode": (c_int32, [c_void_p, _Batch]),
    "llama_get_logits": (POINTER(c_float), [c_void_p]),
    "llama_get_memory": (c_void_p, [c_void_p]),
    "llama_memory_clear": (None, [c_void_p, c_bool]),
}


def load(library: Path) -> ctypes.CDLL:
    """Load llama.cpp and set the types of its functions; exit with a message if it is another version."""
    llama = ctypes.CDLL(str(library))
    try:
        for name, (returns, takes) in _FUNCTIONS.items():
            function = getattr(llama, name)
            function.restype, function.argtypes = returns, takes
    except AttributeError as error:
        sys.exit(f"{library}: another version of llama.cpp than {VERSION}x: {error}")
    version = llama.llama_version().decode()
    context, quantize = llama.llama_context_default_params(), llama.llama_model_quantize_default_params()
    defaults = (
        context.n_ctx, context.n_batch, context.n_seq_max, context.flash_attn_type, context.type_k, context.type_v,
        context.offload_kqv, context.n_samplers, llama.llama_model_default_params().use_extra_bufts,
        quantize.nthread, quantize.quantize_output_tensor, quantize.only_copy, quantize.max_buf_size,
    )  # fmt: skip
    expected = (512, 2048, 1, _FLASH_ATTENTION_AUTO, _F16, _F16, True, 0, True, 0, True, False, 8 << 30)
    if not version.startswith(VERSION) or defaults != expected:
        sys.exit(
            f"{library}: llama.cpp {version} has other structures than version {VERSION}x: its defaults are "
            f"{defaults}, expected {expected}"
        )
    # A prebuilt library has variants for several processors beside it; a library built here has none to load.
    # Looked up through libllama, because it must be that library's ggml: a wheel contains several copies.
    llama.ggml_backend_load_all_from_path(str(library.parent).encode())
    llama.llama_backend_init()
    return llama


def quantize(llama: ctypes.CDLL, request: LlamaRequest) -> Answer:
    """Quantise `source` to `out` in the file type with the number `ftype`."""
    params = llama.llama_model_quantize_default_params()
    params.ftype = request["ftype"]
    params.nthread = request["threads"]
    params.max_buf_size = request["buffer_bytes"]
    code = llama.llama_model_quantize(request["source"].encode(), request["out"].encode(), byref(params))
    if code != 0:
        sys.exit(f"llama_model_quantize returned {code}")
    return {}


def tokenize(llama: ctypes.CDLL, request: LlamaRequest) -> Answer:
    """Load only the vocabulary of `gguf`, and tokenise `texts` with it."""
    params = llama.llama_model_default_params()
    params.vocab_only = True
    vocab = llama.llama_model_get_vocab(_loaded(llama, request, params))
    return {"version": llama.llama_version().decode(), "tokens": _tokens(llama, vocab, request["texts"], False)}


def run(llama: ctypes.CDLL, request: LlamaRequest, folder: Path) -> Answer:
    """Load `gguf`, tokenise `texts`, write the logits of `ids` to logits.f32, and continue `prompt_ids` greedily.

    The answer also names those of `ends` at which llama.cpp would not stop.
    """
    params = llama.llama_model_default_params()
    params.n_gpu_layers = 0
    params.check_tensors = True
    params.use_extra_bufts = False  # weights as they are in the file, not repacked
    model = _loaded(llama, request, params)
    vocab = llama.llama_model_get_vocab(model)
    size = llama.llama_vocab_n_tokens(vocab)
    answer: Answer = {
        "version": llama.llama_version().decode(), "vocabulary": size, "described": _described(llama, model),
        "context": llama.llama_model_n_ctx_train(model), "tokens": _tokens(llama, vocab, request["texts"], False),
        "tokens_with_special": _tokens(llama, vocab, request["texts"], True),
    }  # fmt: skip
    no_ends = [end for end in request["ends"] if end >= size or not llama.llama_vocab_is_eog(vocab, end)]
    answer["no_ends"] = [_text(llama, vocab, [end]) if end < size else str(end) for end in no_ends]
    ids, prompt, most = request["ids"], request["prompt_ids"], request["most_tokens"]
    context = llama.llama_init_from_model(model, _context_params(llama, request, max(len(ids), len(prompt) + most)))
    if not context:
        sys.exit("llama_init_from_model returned NULL")
    with (folder / "logits.f32").open("wb") as file:
        _decode(llama, context, ids, 0, size, every=True).tofile(file)
    if prompt:
        llama.llama_memory_clear(llama.llama_get_memory(context), True)
        made: list[int] = []
        row = _decode(llama, context, prompt, 0, size, every=False)
        while len(made) < most and not llama.llama_vocab_is_eog(vocab, best := row.index(max(row))):
            made.append(best)
            row = _decode(llama, context, [best], len(prompt) + len(made) - 1, size, every=False)
        answer["continuation"] = _text(llama, vocab, made)
        answer["continuation_ids"] = made
    return answer


def _loaded(llama: ctypes.CDLL, request: LlamaRequest, params: _ModelParams) -> int:
    params.progress_callback = ctypes.cast(_progress_callback, c_void_p)
    model: int | None = llama.llama_model_load_from_file(request["gguf"].encode(), params)
    if not model:
        sys.exit("llama_model_load_from_file returned NULL")
    return model


def _context_params(llama: ctypes.CDLL, request: LlamaRequest, tokens: int) -> _ContextParams:
    params: _ContextParams = llama.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = max(tokens, 32)
    params.n_threads = params.n_threads_batch = request["threads"]
    params.flash_attn_type = _FLASH_ATTENTION_OFF
    params.type_k = params.type_v = _F32
    params.swa_full = True
    params.abort_callback = ctypes.cast(_abort_callback, c_void_p)
    return params


def _decode(llama: ctypes.CDLL, context: int, ids: list[int], first: int, size: int, every: bool) -> "array[float]":
    """Return the logits [tokens or 1, vocabulary] of `ids`, whose positions start at `first`."""
    count = len(ids)
    sequence = (c_int32 * 1)(0)
    batch = _Batch(
        count, (c_int32 * count)(*ids), None, (c_int32 * count)(*range(first, first + count)),
        (c_int32 * count)(*([1] * count)),
        (POINTER(c_int32) * count)(*([ctypes.cast(sequence, POINTER(c_int32))] * count)),
        (c_int8 * count)(*[int(every or i == count - 1) for i in range(count)]),
    )  # fmt: skip
    if code := llama.llama_decode(context, batch):
        sys.exit(f"llama_decode returned {code}")
    rows = count if every else 1
    found = array("f")
    found.frombytes(ctypes.string_at(llama.llama_get_logits(context), rows * size * 4))
    return found


def _tokens(llama: ctypes.CDLL, vocab: int, texts: list[str], add_special: bool) -> list[list[int]]:
    found = []
    for text in texts:
        raw = text.encode()
        room = len(raw) + 16
        tokens = (c_int32 * room)()
        count = llama.llama_tokenize(vocab, raw, len(raw), tokens, room, add_special, True)
        if count < 0:
            sys.exit(f"llama_tokenize returned {count} for {text!r}")
        found.append(list(tokens[:count]))
    return found


def _text(llama: ctypes.CDLL, vocab: int, tokens: list[int]) -> str:
    pieces = b""
    for token in tokens:
        buffer = ctypes.create_string_buffer(1024)
        count = llama.llama_token_to_piece(vocab, token, buffer, len(buffer), 0, False)
        pieces += buffer.raw[: max(count, 0)]
    return pieces.decode(errors="replace")


def _described(llama: ctypes.CDLL, model: int) -> str:
    buffer = ctypes.create_string_buffer(256)
    llama.llama_model_desc(model, buffer, len(buffer))
    return buffer.value.decode(errors="replace")


def main() -> None:
    """Answer the request."""
    if sys.platform == "linux":  # end with the parent process, since nobody else waits for the answer
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    path = Path(sys.argv[1])
    request: LlamaRequest = json.loads(path.read_text(encoding="utf-8"))
    llama = load(Path(request["library"]))
    match request["do"]:
        case "quantize":
            answer = quantize(llama, request)
        case "tokenize":
            answer = tokenize(llama, request)
        case "run":
            answer = run(llama, request, path.parent)
        case other:
            sys.exit(f"unknown request {other!r}")
    (path.parent / "answer.json").write_text(json.dumps(answer), encoding="utf-8")


if __name__ == "__main__":
    main()
