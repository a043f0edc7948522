"""Tokens per second of generation: ownlm beside llama.cpp, transformers and CTranslate2, the same random weights, in turn.

    python benchmarks/generate_speed.py [--python PYTHON] [--shapes m125 m1b qwen3 gemma3 mixtral] [--kinds int4 int8 bf16 Q4_K_M]
                                        [--rounds 5] [--threads 2] [--ctranslate2 PYTHON]

Makes an environment with llama-cpp-python compiled for this processor (about ten minutes), or uses the Python that is named. Its
files are written by ownlm's own export, every matrix in the same type; the mixtures Q4_K_M, Q5_K_M and Q6_K are made by llama.cpp, and
both sides read the same file. CTranslate2 (int8; m125 and m1b) takes part where a Python is
named that has it, transformers and torch. Each side is a process of its own that stays for
all rounds; only one works at a time. Measured: a prompt of 512 tokens, and steps of 1, 8 and 16 streams that each hold 64 tokens
when they begin. "step" is the bare step of the model, on all sides; "engine" is all of ownlm: scheduling, the step, greedy choice,
stops, events. The limits of the machine are taken in every round: reading memory in huge pages, products of int8.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from ownlm import device, gguf
from ownlm.checkpoints.gguf.write import Quantization, describe
from ownlm.checkpoints.unread import open_unread
from ownlm.checkpoints.weights import load_model, save_model
from ownlm.generate.measure import STEPS, NativeStep, Whole, work
from ownlm.generate.runners import NativeRunner
from ownlm.kernels.limits import memory_speed, product_speed
from ownlm.kernels.native import PAGE, NativeDecoder
from ownlm.kernels.sources import Kind
from ownlm.models.decoder import Decoder
from ownlm.models.families import from_hf

PACKAGE = "llama-cpp-python==0.3.36"
PROMPT, CONTEXT = 512, 64
STREAMS = (1, 8, 16)
TYPES = {"int4": ("Q4_0", 2), "int8": ("Q8_0", 7), "bf16": ("BF16", 32)}
MIXTURES = {"Q4_K_M": 15, "Q5_K_M": 17, "Q6_K": 18}  # llama.cpp's numbers
LLAMA: dict[str, Any] = {
    "model_type": "llama", "vocab_size": 32_000, "max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
    "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {
    "m125": LLAMA | {
        "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "num_key_value_heads": 12, "intermediate_size": 2048,
    },
    "m1b": LLAMA | {
        "hidden_size": 2048, "num_hidden_layers": 22, "num_attention_heads": 32, "num_key_value_heads": 4, "intermediate_size": 5632,
    },
    "qwen3": LLAMA | {
        "model_type": "qwen3", "hidden_size": 1024, "num_hidden_layers": 12, "num_attention_heads": 16, "num_key_value_heads": 8,
        "head_dim": 128, "intermediate_size": 3072, "tie_word_embeddings": True,
    },
    "gemma3": LLAMA | {
        "model_type": "gemma3_text", "hidden_size": 640, "num_hidden_layers": 18, "num_attention_heads": 4, "num_key_value_heads": 1,
        "head_dim": 256, "intermediate_size": 2048, "sliding_window": 512, "query_pre_attn_scalar": 256, "tie_word_embeddings": True,
        "pad_token_id": None,
    },
    "mixtral": LLAMA | {
        "model_type": "mixtral", "hidden_size": 768, "num_hidden_layers": 8, "num_attention_heads": 12, "num_key_value_heads": 4,
        "intermediate_size": 1536, "num_local_experts": 8, "num_experts_per_tok": 2,
    },
}  # fmt: skip


# ---- the sides: each answers with tokens a second


class Words:
    """What the engine needs of a tokenizer."""

    stop_ids = frozenset[int]()

    def decode_stream(self) -> "Words":
        return self

    def push(self, id: int) -> str:
        return f"{id} "

    def finish(self) -> str:
        return ""


class Transformers:
    """transformers' forward with its cache, bf16."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        self.vocabulary = self.model.config.vocab_size

    def forward(self, rows: int, tokens: int, cache: Any = None) -> Any:
        ids = torch.randint(self.vocabulary, (rows, tokens))
        return self.model(input_ids=ids, cache=cache, use_cache=True, logits_to_keep=1).past_key_values

    def prompt(self, length: int) -> float:
        began = time.perf_counter()
        self.forward(1, length)
        return length / (time.perf_counter() - began)

    def streams(self, count: int) -> float:
        cache, seconds = self.forward(count, CONTEXT), []
        for _ in range(STEPS // 2):  # it is slow and even
            began = time.perf_counter()
            cache = self.forward(count, 1, cache)
            seconds.append(time.perf_counter() - began)
        return count / statistics.median(seconds)


def serve(folder: Path, kind: str, threads: int) -> None:
    """A side in a process of its own: requests of this script on standard input."""
    torch.set_num_threads(threads)
    sides: dict[str, Any] = {}
    if kind == "transformers":
        sides["step"] = Transformers(folder)
        told = {}
    else:
        words = cast(Any, Words())
        if kind in MIXTURES:
            unread = open_unread(folder.with_name(f"{kind}.gguf"), torch.float32)
            assert unread is not None
            model, native = unread.model, NativeDecoder(unread.model, lend=unread.lend)
        else:
            read = load_model(folder)
            assert isinstance(read, Decoder)
            model, native = read, NativeDecoder(read, cast(Kind, kind))
        sides["step"] = NativeStep(native, longest=PROMPT, streams=max(STREAMS), context=CONTEXT)
        runner = NativeRunner(native, model, pages=2048 // PAGE)
        sides["engine"] = Whole(model, words, runner, context=CONTEXT)
        # Of experts a step reads only some; mixtures have no one size of a weight.
        untold = kind in MIXTURES or any(layer.mlp.experts for layer in model.config.layers)
        told = {"bytes": 0 if untold else work(model, cast(Kind, kind)).bytes(1, 1, 0)}
    print(json.dumps(told), flush=True)
    with torch.inference_mode():
        for line in sys.stdin:
            request = json.loads(line)
            side = sides[request["side"]]
            tokens = request.get("prompt") or request["streams"]
            speed = side.prompt(tokens) if "prompt" in request else side.streams(tokens)
            print(json.dumps({"seconds": tokens / speed}), flush=True)


class Child:
    """A process that answers a line with a line. Its first line tells of itself."""

    def __init__(self, command: list[str], threads: int) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.told = self.read()

    def read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.process.args}: ended")
        found: dict[str, Any] = json.loads(line)
        return found

    def seconds(self, **request: Any) -> float:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return float(self.read()["seconds"])

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


# ---- the comparison


def environment(folder: Path) -> str:
    """A Python that has llama-cpp-python, made in `folder` if it isn't there."""
    python = folder / "bin" / "python"
    if subprocess.run([python, "-c", "import llama_cpp"], capture_output=True).returncode if python.exists() else True:
        print(f"Making {folder}; llama.cpp compiles …", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        install = [str(python), "-m", "pip", "install", "--quiet", "--no-binary", "llama-cpp-python", PACKAGE]
        subprocess.run(install, check=True, env=os.environ | {"CMAKE_ARGS": "-DGGML_NATIVE=ON"})
    return str(python)


def file_of(kind: str) -> str:
    return f"{kind if kind in MIXTURES else TYPES[kind][0]}.gguf"


def random_model(shape: str) -> Decoder:
    """Random weights in bf16."""
    hf = SHAPES[shape]
    torch.set_default_dtype(torch.bfloat16)
    config, family = from_hf(hf)
    model = family.build(config, hf)
    torch.set_default_dtype(torch.float32)
    assert isinstance(model, Decoder)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.02, generator=generator)
    return model


def write(shape: str, folder: Path, kinds: list[str], python: str) -> None:
    """Random weights as a Hugging Face folder and as a GGUF file of each type, the head in the same type as all else, or mixture."""
    model = random_model(shape)
    save_model(model, folder / "hf")
    mixtures = [kind for kind in kinds if kind in MIXTURES]
    for kind in dict.fromkeys([kind for kind in kinds if kind in TYPES] + ["bf16"] * bool(mixtures)):
        type, code = TYPES[kind]
        described = describe(model, Quantization(code=code, matrices=type, finer=type, head=type))
        metadata: dict[str, gguf.Value] = {
            "general.architecture": described.architecture,
            "general.type": "model",
            "general.name": shape,
            "general.file_type": np.uint32(code),
            "general.quantization_version": np.uint32(2),
            "tokenizer.ggml.model": "none",
        }
        gguf.write(folder / file_of(kind), metadata | described.metadata, described.tensors)
    for kind in mixtures:
        mix(python, folder / file_of("bf16"), folder / file_of(kind), MIXTURES[kind])


def mix(python: str, path: Path, out: Path, mixture: int) -> None:
    """A GGUF file in another mixture of types."""
    side = Path(__file__).with_name("llama_cpp_quantize.py")
    subprocess.run([python, str(side), str(path), str(out), str(mixture)], check=True, stdout=subprocess.DEVNULL)


def compare(shape: str, args: argparse.Namespace, python: str) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write(shape, folder, args.kinds, python)
        own = [sys.executable, __file__, "--threads", str(args.threads), "--serve", str(folder / "hf")]
        theirs = [python, str(Path(__file__).with_name("llama_cpp_speed.py"))]
        children: dict[str, Child] = {}
        try:
            for kind in args.kinds:
                children[f"ownlm {kind}"] = Child([*own, kind], args.threads)
                name = file_of(kind)
                children[f"llama.cpp {name.removesuffix('.gguf')}"] = Child(
                    [*theirs, str(folder / name), str(args.threads)], args.threads
                )
            if not args.without_transformers:
                children["transformers bf16"] = Child([*own, "transformers"], args.threads)
            if args.ctranslate2 and SHAPES[shape]["model_type"] == "llama":
                side = Path(__file__).with_name("ctranslate2_speed.py")
                children["CTranslate2 int8"] = Child(
                    [args.ctranslate2, str(side), str(folder / "hf"), str(args.threads)], args.threads
                )
            table(shape, children, args)
        finally:
            for child in children.values():
                child.close()


def table(shape: str, children: dict[str, Child], args: argparse.Namespace) -> None:
    asked: list[tuple[str, Callable[[Child, str], float]]] = [
        (f"prompt {PROMPT}", lambda child, side: PROMPT / child.seconds(side=side, prompt=PROMPT)),
        *(
            (f"{count} stream{'s' * (count > 1)}", partial(_streams, count))
            for count in STREAMS
        ),
    ]  # fmt: skip
    rows = [(name, side) for name in children for side in (("step", "engine") if "ownlm" in name else ("step",))]
    found: dict[tuple[str, str, str], list[float]] = {}
    limits: dict[str, list[float]] = {"memory": [], "products": []}
    for name, side in rows:  # nobody's first time counts
        children[name].seconds(side=side, prompt=PROMPT)
    for _ in range(args.rounds):
        limits["memory"].append(memory_speed(args.threads) / 1e9)
        limits["products"].append(product_speed(torch.int8) / 1e9)
        for what, ask in asked:
            for name, side in rows:
                found.setdefault((name, side, what), []).append(ask(children[name], side))
    gbs, gops = (max(limits[name]) for name in ("memory", "products"))
    system = next(child.told["system"] for child in children.values() if "system" in child.told)
    print(f"\n{shape}, {args.threads} threads, median of {args.rounds} (smallest to largest). {system.strip()}")
    print(f"Limits, the best of all rounds: memory {gbs:.1f} GB/s, int8 products {gops:.0f} GOP/s.\n")
    print("| tokens/s | " + " | ".join(what for what, _ in asked) + " | of the memory's speed, 1 stream |")
    print("|---|" + "---|" * (len(asked) + 1))
    for name, side in rows:
        numbers = [found[name, side, what] for what, _ in asked]
        told = [f"{statistics.median(each):.0f} ({min(each):.0f}-{max(each):.0f})" for each in numbers]
        share = children[name].told.get("bytes", 0) * statistics.median(numbers[1]) / 1e9 / gbs
        print(f"| {name}, {side} | " + " | ".join(told) + f" | {f'{share:.0%}' if share else ''} |")
    print("\n| ownlm's step over | " + " | ".join(what for what, _ in asked) + " |\n|---|" + "---|" * len(asked))
    for kind in args.kinds:
        peer = f"llama.cpp {file_of(kind).removesuffix('.gguf')}"
        ratios = [median(found[f"ownlm {kind}", "step", what]) / median(found[peer, "step", what]) for what, _ in asked]
        print(f"| {peer} | " + " | ".join(f"{ratio:.2f}x" for ratio in ratios) + " |", flush=True)
    fastest = max(median(found[name, "step", asked[0][0]]) for name in children if "llama.cpp" in name)
    ours = ", ".join(
        f"{kind} {median(found[f'ownlm {kind}', 'step', asked[0][0]]) / fastest:.2f}x" for kind in args.kinds
    )
    print(f"\nThe prompt over llama.cpp's fastest type: {ours}.", flush=True)


def median(values: list[float]) -> float:
    return statistics.median(values)


def _streams(count: int, child: Child, side: str) -> float:
    return count / child.seconds(side=side, streams=count, context=CONTEXT, steps=STEPS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--environment", type=Path, default=Path("build/llama-cpp"))
    parser.add_argument("--python", help="one that has llama-cpp-python already, compiled for this processor")
    parser.add_argument("--shapes", nargs="*", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--kinds", nargs="*", default=[*TYPES, "Q4_K_M"], choices=[*TYPES, *MIXTURES])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--ctranslate2", metavar="PYTHON", help="one that has ctranslate2, transformers and torch")
    parser.add_argument("--without-transformers", action="store_true")
    parser.add_argument("--serve", nargs=2, metavar=("FOLDER", "KIND"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        folder, kind = args.serve
        serve(Path(folder), kind, args.threads)
        return
    python = args.python or environment(args.environment)
    device.threads(args.threads)
    for shape in args.shapes:
        compare(shape, args, python)


if __name__ == "__main__":
    main()
