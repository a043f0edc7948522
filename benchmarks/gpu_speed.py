"""Tokens per second of generation on a GPU: ownlm's engine beside transformers, the same random weights, in turn.

    python benchmarks/gpu_speed.py [--device cuda] [--shape m1b] [--streams 1 64] [--tokens 128] [--rounds 5] [--dtype bfloat16]

Each round writes `tokens` tokens after prompts of 64 at every number of streams, first ownlm, then transformers (greedy, a static
cache, no compilation), in one process; told are medians. At one stream also: how much of the memory's speed, measured by copying
in every round, reading the weights once per token takes. "ready" is the time from the files to the first token, in a fresh
engine. With --device cpu and --shape tiny the script runs anywhere, and its numbers say nothing.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers

from ownlm.checkpoints.weights import load_model, save_model
from ownlm.generate.engine import Engine
from ownlm.generate.sampling import Sampling
from ownlm.generate.torch_runner import torch_runner
from ownlm.models.decoder import Decoder
from ownlm.models.families import from_hf
from ownlm.train.fresh import init_weights

PROMPT = 64
LLAMA: dict[str, Any] = {
    "model_type": "llama", "vocab_size": 32_000, "max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
    "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 128},
    "m1b": {
        "hidden_size": 2048, "num_hidden_layers": 22, "num_attention_heads": 32, "num_key_value_heads": 4, "intermediate_size": 5632,
    },
    "m8b": {
        "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 14336,
        "vocab_size": 128_256,
    },
}  # fmt: skip


class NoText:
    """What the engine needs of a tokenizer."""

    stop_ids: frozenset[int] = frozenset()

    def decode_stream(self) -> "NoText":
        return self

    def push(self, token: int) -> str:
        return ""

    def finish(self) -> str:
        return ""


def prompts(streams: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(streams)
    return torch.randint(0, 32_000, (streams, PROMPT), generator=generator).tolist()


def ours(model: Decoder, streams: int, tokens: int) -> Callable[[], None]:
    """Generate with one engine, as a server does: its graphs are captured in the first rounds."""
    context = PROMPT + tokens
    engine = Engine(
        model,
        NoText(),  # type: ignore[arg-type]
        slots=streams,
        context=context,
        runner=torch_runner(model, slots=streams, context=context),
    )

    def run() -> None:
        for prompt in prompts(streams):
            engine.add(prompt, Sampling(max_tokens=tokens, stop_ids=frozenset()))
        while not engine.idle:
            engine.step()

    return run


def theirs(model: Any, streams: int, tokens: int) -> Callable[[], None]:
    def run() -> None:
        ids = torch.tensor(prompts(streams), device=model.device)
        settings = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
        model.generate(
            ids, attention_mask=torch.ones_like(ids), cache_implementation="static", disable_compile=True, **settings
        )

    return run


def seconds(run: Callable[[], None], device: torch.device) -> float:
    began = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def memory_speed(device: torch.device) -> float:
    """Bytes read per second, by copying a gigabyte (on a CPU less)."""
    source = torch.empty(2**30 if device.type == "cuda" else 2**26, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = [seconds(lambda: target.copy_(source), device) for _ in range(5)]
    return 2 * source.nbytes / min(times)


def measure(args: argparse.Namespace, folder: Path) -> Iterator[dict[str, Any]]:
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    hf = LLAMA | SHAPES[args.shape]
    save_model(init_weights(Decoder(from_hf(hf)[0], hf), zero_output=False), folder, dtype=dtype)
    with torch.inference_mode():
        began = time.perf_counter()
        model = load_model(folder, dtype=dtype, device=device)
        ours(model, 1, 1)()
        yield {"ready_s": time.perf_counter() - began}
        peer = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()
        weights = sum(p.nbytes for p in model.parameters()) - model.embed_tokens.weight.nbytes
        for streams in args.streams:
            sides = {"ownlm": ours(model, streams, args.tokens), "transformers": theirs(peer, streams, args.tokens)}
            times: dict[str, list[float]] = {name: [] for name in sides}
            speeds = []
            for _ in range(args.rounds + 1):
                speeds.append(memory_speed(device))
                for name, run in sides.items():
                    times[name].append(seconds(run, device))
            medians = {name: statistics.median(each[1:]) for name, each in times.items()}
            found: dict[str, Any] = {"streams": streams}
            found |= {f"{name}_tokens_per_s": streams * args.tokens / median for name, median in medians.items()}
            found["ratio"] = medians["transformers"] / medians["ownlm"]
            if streams == 1:
                found["of_memory_speed"] = weights * args.tokens / medians["ownlm"] / statistics.median(speeds)
            yield found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shape", default="m1b", choices=SHAPES)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as folder:
        for found in measure(args, Path(folder)):
            print(json.dumps({key: round(value, 3) for key, value in found.items()}), flush=True)


if __name__ == "__main__":
    main()
