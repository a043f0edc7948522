"""Runs inside an environment that has llama-cpp-python, and imports nothing of ours: tokens in, tokens and logits out.

    {"model": path, "prompt": [ids], "tokens": 100}  ─►  {"tokens": [ids], "logits": [[…] of each place of the prompt]}
    … and "source": [ids], of an encoder-decoder     ─►  and {"hidden": [[…] of each token of the source]}
    {"model": path, "hidden": [ids]}                 ─►  {"hidden": [[…] of each token]}, of an encoder
    {"model": path, "texts": ["…"]}                  ─►  {"ids": [[…]]}; "framed": with what stands around a text
    {"quantize": [type, row], "numbers": path, "out": path}  ─►  {"seconds": …}, by ggml's own quantiser, on one core
    {"mixture": number, "model": path, "out": path}          ─►  {"failed": 0}: the file in a mixture of types, 15 is Q4_K_M

One request a line on standard input, one answer a line on standard output; llama.cpp's own log goes nowhere.
"""

import ctypes
import json
import sys
import time
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np


@llama_cpp.llama_log_callback
def silent(level: int, text: bytes, data: Any) -> None:
    if level >= 4:  # errors: the reason why a file is refused
        sys.stderr.write(text.decode(errors="replace"))


def answer(request: dict[str, Any]) -> dict[str, Any]:
    if "quantize" in request:
        return {"seconds": ggml_quantize(*request["quantize"], request["numbers"], request["out"])}
    if "mixture" in request:
        wanted = llama_cpp.llama_model_quantize_default_params()
        wanted.ftype = request["mixture"]
        paths = (request[name].encode() for name in ("model", "out"))
        return {"failed": llama_cpp.llama_model_quantize(*paths, ctypes.byref(wanted))}
    settings = llama_cpp.llama_model_default_params()
    settings.vocab_only = "texts" in request
    settings.n_gpu_layers = 0
    model = llama_cpp.llama_model_load_from_file(request["model"].encode(), settings)
    if not model:
        return {"error": "llama.cpp can't load the file"}
    vocabulary = llama_cpp.llama_model_get_vocab(model)
    try:
        if "texts" in request:
            return {"ids": [tokenize(vocabulary, text, request.get("framed", False)) for text in request["texts"]]}
        if "hidden" in request:
            return {"hidden": hidden(model, request["hidden"])}
        return complete(model, vocabulary, request["prompt"], request["tokens"], request.get("source", []))
    finally:
        llama_cpp.llama_model_free(model)


def ggml_quantize(type: int, row: int, numbers: str, out: str) -> float:
    """`numbers` is a file of float32, `out` gets the blocks."""
    folder = Path(llama_cpp.__file__).parent / "lib"
    ggml = ctypes.CDLL(str(next(folder.glob("libggml-base*"))))
    ggml.ggml_row_size.restype = ggml.ggml_quantize_chunk.restype = ctypes.c_size_t
    given = np.fromfile(numbers, np.float32)
    rows = len(given) // row
    found = np.empty(rows * ggml.ggml_row_size(type, ctypes.c_int64(row)), np.uint8)
    size = ctypes.c_int64
    began = time.process_time()
    ggml.ggml_quantize_chunk(
        type,
        given.ctypes.data_as(ctypes.c_void_p),
        found.ctypes.data_as(ctypes.c_void_p),
        size(0),
        size(rows),
        size(row),
        None,
    )
    seconds = time.process_time() - began
    found.tofile(out)
    return seconds


def tokenize(vocabulary: Any, text: str, framed: bool) -> list[int]:
    raw = text.encode()
    ids = (ctypes.c_int32 * (len(raw) + 8))()
    count = llama_cpp.llama_tokenize(vocabulary, raw, len(raw), ids, len(ids), framed, False)
    assert count >= 0, count
    return list(ids[:count])


def hidden(model: Any, ids: list[int]) -> list[list[float]]:
    """What an encoder makes of each token, before any pooling."""
    settings = llama_cpp.llama_context_default_params()
    settings.n_ctx = settings.n_batch = settings.n_ubatch = max(256, len(ids))
    settings.n_threads = settings.n_threads_batch = 1
    settings.embeddings, settings.pooling_type = True, llama_cpp.LLAMA_POOLING_TYPE_NONE
    settings.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
    context = llama_cpp.llama_init_from_model(model, settings)
    batch = llama_cpp.llama_batch_init(len(ids), 0, 1)
    fill(batch, ids, 0)
    assert llama_cpp.llama_encode(context, batch) == 0
    found = embeddings(model, context, len(ids))
    llama_cpp.llama_batch_free(batch)
    llama_cpp.llama_free(context)
    return found


def embeddings(model: Any, context: Any, count: int) -> list[list[float]]:
    size = llama_cpp.llama_model_n_embd(model)
    rows = [llama_cpp.llama_get_embeddings_ith(context, at) for at in range(count)]
    return [np.ctypeslib.as_array(row, (size,)).tolist() for row in rows]


def fill(batch: Any, ids: list[int], first: int) -> None:
    batch.n_tokens = len(ids)
    for at, token in enumerate(ids):
        batch.token[at], batch.pos[at], batch.n_seq_id[at] = token, first + at, 1
        batch.seq_id[at][0], batch.logits[at] = 0, 1


def complete(model: Any, vocabulary: Any, prompt: list[int], tokens: int, source: list[int]) -> dict[str, Any]:
    """Greedy: the source through the encoder where there is one, the prompt in one batch, then token by token; keys and values in
    F32, as ours are."""
    settings = llama_cpp.llama_context_default_params()
    length = max(len(prompt) + tokens, len(source))
    settings.n_ctx = settings.n_batch = settings.n_ubatch = -(-length // 256) * 256
    settings.n_threads = settings.n_threads_batch = 1
    settings.type_k = settings.type_v = llama_cpp.GGML_TYPE_F32
    settings.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
    context = llama_cpp.llama_init_from_model(model, settings)
    assert context
    size = llama_cpp.llama_vocab_n_tokens(vocabulary)
    batch = llama_cpp.llama_batch_init(length, 0, 1)

    def run(ids: list[int], first: int) -> np.ndarray:
        fill(batch, ids, first)
        assert llama_cpp.llama_decode(context, batch) == 0
        rows = [llama_cpp.llama_get_logits_ith(context, at) for at in range(len(ids))]
        return np.stack([np.ctypeslib.as_array(row, (size,)).copy() for row in rows])

    encoded = {}
    if source:
        fill(batch, source, 0)
        assert llama_cpp.llama_encode(context, batch) == 0
        encoded = {"hidden": embeddings(model, context, len(source))}
    logits = run(prompt, 0)
    found, last = [], logits[-1]
    for _ in range(tokens):
        found.append(int(last.argmax()))
        last = run(found[-1:], len(prompt) + len(found) - 1)[-1]
    llama_cpp.llama_batch_free(batch)
    llama_cpp.llama_free(context)
    return {"tokens": found, "logits": logits.tolist(), **encoded}


if __name__ == "__main__":
    llama_cpp.llama_log_set(silent, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), flush=True)
