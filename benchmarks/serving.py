"""What the engine does for people who wait: shared beginnings, and long prompts beside those who write.

    python benchmarks/serving.py [--kind int8] [--rounds 5]

A random Llama of 134 M parameters (768 x 12, vocabulary 32,000), on two threads, through the whole engine with greedy sampling:

  prefix   time to the first token of a prompt of 2,000 + 32 tokens, once where nothing of it stands in the cache and once where
           another request has read its first 2,000 (bar: at least 10 times lower)
  stalls   time between tokens of 8 running answers, 99th percentile, while a prompt of 4,000 tokens is read, and over as many
           steps of answers as long without it (bar: at most twice)

Medians over the rounds; everything in one process, in turn.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any, cast

import torch

from ownlm import device
from ownlm.generate.engine import Engine
from ownlm.generate.runners import NativeRunner
from ownlm.generate.sampling import Sampling
from ownlm.kernels.native import PAGE, Kind, NativeDecoder
from ownlm.models.decoder import Decoder
from ownlm.models.families import from_hf
from ownlm.tokens.codec import Tokenizer

CONTEXT, PREFIX, LONG, WRITERS = 8_192, 2_000, 4_000, 8
SHAPE: dict[str, Any] = {
    "model_type": "llama", "vocab_size": 32_000, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
    "num_key_value_heads": 12, "intermediate_size": 2_048, "max_position_embeddings": CONTEXT, "rms_norm_eps": 1e-6,
}  # fmt: skip


class NoText:
    """Stands in for a tokenizer: what tokens spell is no part of these measurements."""

    stop_ids: frozenset[int] = frozenset()

    def decode_stream(self) -> "NoText":
        return self

    def push(self, id: int) -> str:
        return ""

    def finish(self) -> str:
        return ""


def random_decoder() -> Decoder:
    config, family = from_hf(SHAPE)
    model = cast(Decoder, family.build(config, SHAPE))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.02)
    return model.to(torch.bfloat16).eval()


def prompt(seed: int, length: int) -> list[int]:
    return torch.randint(32_000, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def until(engine: Engine, done: Callable[[], bool]) -> None:
    while not done():
        engine.step()


def first_token_seconds(engine: Engine, tokens: list[int]) -> float:
    began = time.perf_counter()
    engine.add(tokens, Sampling(max_tokens=1))
    until(engine, lambda: engine.idle)
    return time.perf_counter() - began


def prefix(make: Callable[[], Engine], rounds: int) -> None:
    cold, warm = [], []
    for round in range(rounds):
        engine = make()
        shared = prompt(round, PREFIX)
        cold.append(first_token_seconds(engine, shared + prompt(100 + round, 32)))
        warm.append(first_token_seconds(engine, shared + prompt(200 + round, 32)))
    ratio = statistics.median(cold) / statistics.median(warm)
    print(
        f"prefix of {PREFIX:,} tokens: first token after {1e3 * statistics.median(cold):.0f} ms, "
        f"{1e3 * statistics.median(warm):.0f} ms where it stands in the cache: {ratio:.1f}x lower"
    )


def gaps(make: Callable[[], Engine], seed: int, steps: int | None) -> list[float]:
    """Seconds between tokens of those who write, while the long prompt is read or, without it, over so many steps."""
    engine = make()
    for writer in range(WRITERS):
        engine.add(prompt(seed + writer, 64), Sampling(max_tokens=CONTEXT - 64))
    until(engine, lambda: all(each.writing for each in engine.running) and not engine.waiting)
    for _ in range(32):
        engine.step()  # it learns its pace
    reader = engine.add(prompt(7, LONG), Sampling(max_tokens=1)) if steps is None else None
    times = [time.perf_counter()]
    while len(times) <= (steps or CONTEXT // 2):
        events = engine.step()
        times.append(time.perf_counter())
        if reader is not None and any(event.request == reader for event in events):
            break
    return [after - before for before, after in pairwise(times)]


def stalls(make: Callable[[], Engine], rounds: int) -> None:
    alone, beside, reading = [], [], []
    for round in range(rounds):
        loud = gaps(make, round * 100, None)
        quiet = gaps(make, round * 100, len(loud))
        reading.append(sum(loud))
        alone.append(percentile(quiet))
        beside.append(percentile(loud))
    ratio = statistics.median(beside) / statistics.median(alone)
    print(
        f"{WRITERS} answers, 99th percentile between tokens: {1e3 * statistics.median(alone):.1f} ms alone, "
        f"{1e3 * statistics.median(beside):.1f} ms while a prompt of {LONG:,} is read ({statistics.median(reading):.1f} s): {ratio:.2f}x"
    )


def percentile(values: list[float]) -> float:
    return sorted(values)[int(0.99 * (len(values) - 1))]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kind", default="int8", choices=("f32", "bf16", "int8", "int4"))
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    device.threads()
    decoder = random_decoder()
    native = NativeDecoder(decoder, cast(Kind, arguments.kind))

    def make() -> Engine:
        runner = NativeRunner(native, decoder, pages=(WRITERS + 2) * CONTEXT // PAGE)
        # Without drafts: random weights repeat themselves, and a step would be many tokens.
        return Engine(decoder, cast(Tokenizer, NoText()), slots=WRITERS + 2, runner=runner, speculate=False)

    prefix(make, arguments.rounds)
    stalls(make, arguments.rounds)


if __name__ == "__main__":
    main()
