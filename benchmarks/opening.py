"""From a file to the first token: seconds and memory of a fresh process, beside llama.cpp on the same weights and bits.

    python benchmarks/opening.py [--python PYTHON] [--folder FOLDER] [--shape m1b] [--rounds 3] [--threads 2]

Writes random weights (a shape of generate_speed.py) with a tokenizer of 32,000 tokens into FOLDER, where they are not there yet: bf16,
int8 and int4 as `ownlm quantize --method rtn` makes them, and GGUF files in BF16, Q8_0, Q4_0 and, made by llama.cpp, Q4_K_M. Then
each side opens its file in a process of its own, in turn, `--rounds` times, and answers a prompt of a few tokens with one; the files
are in the page cache. Seconds count from the beginning of the process and from the call that opens the file; memory is the largest
resident set, what of it is anonymous (not mapped from files), and how much the process grew after its imports, over weights and
keys and values of one context. `--python` names a Python with llama-cpp-python, compiled for this processor; without it there is
no Q4_K_M.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

from generate_speed import MIXTURES, SHAPES, TYPES, mix
from ownlm import gguf
from ownlm.checkpoints.gguf.write import Quantization, describe
from ownlm.checkpoints.weights import load_model, save_codes, save_model
from ownlm.models.blank import blank
from ownlm.models.decoder import Decoder
from ownlm.models.families import from_hf
from ownlm.quantization.calibrate import quantize_decoder
from ownlm.tokens.codec import Tokenizer
from ownlm.tokens.gguf_write import to_gguf

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MIXED = "Q4_K_M.gguf"
REPORT = """
import json, sys, time
from pathlib import Path
def kilobytes(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name + ":"))
def report(imported, opened, weights, cache):
    now = time.time()
    told = {"start": now - float(sys.argv[1]), "open": now - opened, "peak": kilobytes("VmHWM") / 1e3,
            "anonymous": kilobytes("RssAnon") / 1e3, "grown": (kilobytes("VmHWM") - imported) / 1e3,
            "needed": (weights + cache) / 1e6}
    print(json.dumps(told), flush=True)
"""
OURS = """
import torch
import ownlm.generate.opening
torch.set_num_threads(int(sys.argv[3]))
imported, opened = kilobytes("VmRSS"), time.time()
model = ownlm.generate.opening.load(sys.argv[2], device="cpu", dtype=getattr(torch, sys.argv[4]))
next(model.stream("ab", max_tokens=1, temperature=0, stop_ids=frozenset()))
native = model._native
report(imported, opened, native.memory_bytes, native.page_bytes() * model.context // 32)
"""
# 2 bytes a number, keys and values: its cache is in half precision.
THEIRS = """
import ctypes, os
import llama_cpp
@llama_cpp.llama_log_callback
def silent(level, text, data):
    pass
llama_cpp.llama_log_set(silent, ctypes.c_void_p(0))
llama_cpp.llama_backend_init()
imported, opened = kilobytes("VmRSS"), time.time()
settings = llama_cpp.llama_model_default_params()
settings.n_gpu_layers = 0
model = llama_cpp.llama_model_load_from_file(sys.argv[2].encode(), settings)
settings = llama_cpp.llama_context_default_params()
settings.n_ctx = int(sys.argv[5])
settings.n_threads = settings.n_threads_batch = int(sys.argv[3])
context = llama_cpp.llama_init_from_model(model, settings)
batch = llama_cpp.llama_batch_init(8, 0, 1)
batch.n_tokens = 2
for at in range(2):
    batch.token[at], batch.pos[at], batch.n_seq_id[at], batch.seq_id[at][0], batch.logits[at] = 65 + at, at, 1, 0, at == 1
assert llama_cpp.llama_decode(context, batch) == 0
count = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
row = llama_cpp.llama_get_logits_ith(context, 1)
max(range(count), key=lambda token: row[token])
report(imported, opened, os.path.getsize(sys.argv[2]), int(sys.argv[6]))
"""


def tokenizer(size: int) -> Tokenizer:
    """Byte-level BPE of so many tokens; its merges mean nothing."""
    alphabet = sorted(ByteLevel.alphabet())
    merges = list(itertools.islice(itertools.product(alphabet, alphabet), size - len(alphabet) - len(SPECIAL)))
    tokens = [*alphabet, *(first + second for first, second in merges)]
    backend = Backend(BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges))
    backend.pre_tokenizer = ByteLevel(add_prefix_space=False)
    backend.decoder = ByteLevelDecoder()
    backend.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    return Tokenizer(backend, {"eos_token": SPECIAL[0], "pad_token": SPECIAL[0]})


def random_weights(hf: dict[str, Any]) -> Decoder:
    config, family = from_hf(hf)
    with blank():
        model = family.build(config, hf)
    assert isinstance(model, Decoder)
    model = model.bfloat16().to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.02, generator=generator)
            else:
                parameter.fill_(1.0)
    return model


def write(shape: str, folder: Path, python: str | None) -> None:
    """The files that are not there yet."""
    hf, done = SHAPES[shape], folder / "done"
    if not done.exists():
        write_ours(shape, hf, folder)
        done.touch()
    if python and not (folder / MIXED).exists():
        mix(python, folder / "BF16.gguf", folder / MIXED, MIXTURES["Q4_K_M"])


def write_ours(shape: str, hf: dict[str, Any], folder: Path) -> None:
    words = tokenizer(hf["vocab_size"])
    model = random_weights(hf)
    save_model(model, folder / "bf16")
    for type, code in TYPES.values():
        described = describe(model, Quantization(code=code, matrices=type, finer=type, head=type))
        metadata: dict[str, gguf.Value] = {
            "general.architecture": described.architecture,
            "general.type": "model",
            "general.name": shape,
            "general.file_type": np.uint32(code),
            "general.quantization_version": np.uint32(2),
            **to_gguf(words, hf["vocab_size"]),
        }
        gguf.write(folder / f"{type}.gguf", metadata | described.metadata, described.tensors)
    del model
    for kind in ("int8", "int4"):
        coded = load_model(folder / "bf16")
        quantize_decoder(coded, kind)  # type: ignore[arg-type]
        save_codes(coded, folder / kind)
    for kind in ("bf16", "int8", "int4"):
        words.save(folder / kind)


def child(python: str, code: str, threads: int, *arguments: str) -> dict[str, float]:
    command = [python, "-c", REPORT + code, str(time.time()), arguments[0], str(threads), *arguments[1:]]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def command_line(path: Path, threads: int) -> dict[str, float]:
    """`ownlm generate` until it has ended."""
    began = time.time()
    command = [sys.executable, "-m", "ownlm", "generate", str(path), "ab", "max_tokens=1"]
    subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": str(threads)}, stdout=subprocess.DEVNULL, check=True)
    return {"start": time.time() - began}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", help="one that has llama-cpp-python")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--shape", default="m1b", choices=list(SHAPES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.folder or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        write(args.shape, folder, args.python)
        compare(folder, SHAPES[args.shape], args)


def compare(folder: Path, hf: dict[str, Any], args: argparse.Namespace) -> None:
    head_dim = hf.get("head_dim", hf["hidden_size"] // hf["num_attention_heads"])
    cache = 2 * 2 * hf["num_hidden_layers"] * hf["num_key_value_heads"] * head_dim * hf["max_position_embeddings"]
    sides: dict[str, Any] = {}
    for name in ("int8", "int4", "Q8_0.gguf", "Q4_0.gguf", *([MIXED] if (folder / MIXED).exists() else []), "bf16"):
        dtype = "bfloat16" if name == "bf16" else "float32"
        sides[f"ownlm, {name}"] = lambda name=name, dtype=dtype: child(
            sys.executable, OURS, args.threads, str(folder / name), dtype
        )
        if args.python and name.endswith("gguf"):
            sides[f"llama.cpp, {name}"] = lambda name=name: child(
                args.python,
                THEIRS,
                args.threads,
                str(folder / name),
                "",
                str(hf["max_position_embeddings"]),
                str(cache),
            )
    for name in ("int8", "int4"):
        sides[f"`ownlm generate`, {name}"] = lambda name=name: command_line(folder / name, args.threads)
    for path in folder.rglob("*"):
        if path.is_file():
            path.read_bytes()
    found: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    for _ in range(args.rounds):
        for name, run in sides.items():
            found[name].append(run())
    load = f"load average {os.getloadavg()[0]:.1f}"
    print(
        f"{args.shape}, {args.threads} threads, median of {args.rounds} (least to most), files in the page cache, {load}.\n"
    )
    print("| | s from the start | s from opening | peak MB | anonymous MB | grown, of weights and cache |")
    print("|---|---|---|---|---|---|")
    for name, rows in found.items():
        grown = statistics.median(row["grown"] / row["needed"] for row in rows) if "grown" in rows[0] else None
        cells = [told(rows, "start", 2), told(rows, "open", 2), told(rows, "peak", 0), told(rows, "anonymous", 0)]
        print(f"| {name} | {' | '.join(cells)} | {'' if grown is None else f'{grown:.2f}'} |")


def told(rows: list[dict[str, float]], key: str, digits: int) -> str:
    values = [row[key] for row in rows if key in row]
    if not values:
        return ""
    spread = f" ({min(values):.{digits}f}-{max(values):.{digits}f})" if digits else ""
    return f"{statistics.median(values):.{digits}f}{spread}"


if __name__ == "__main__":
    main()
