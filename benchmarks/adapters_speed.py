"""Tokens per second of 16 streams with several LoRA adapters in one batch: ownlm's step beside PEFT's mixed batches, same shape and ranks.

    python benchmarks/adapters_speed.py [--peft PYTHON] [--kinds int4 int8 bf16] [--rank 16] [--rounds 5] [--threads 2]

The shape is the 134 M Llama of generate_speed.py with random weights; each adapter stands beside every linear layer of the blocks.
Streams hold 64 tokens. Counted: a step of 16 streams that share 1, 4 or 16 adapters among them, over the step without any. PEFT takes
part (transformers' bf16 forward with a cache, `adapter_names`) where a Python is named that has it.
"""

import argparse
import json
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from generate_speed import random_model
from ownlm import device
from ownlm.adapters.lora import Learned, Pair, base_of, matching
from ownlm.checkpoints.weights import save_model
from ownlm.kernels.adapters import NativeAdapter
from ownlm.kernels.native import PAGE, Batch, NativeDecoder
from ownlm.models.decoder import Decoder

STREAMS, CONTEXT, STEPS = 16, 64, 16
COUNTS = (0, 1, 4, 16)


def learned(model: Decoder, rank: int, seed: int) -> Learned:
    """An adapter of random numbers beside every linear layer of the blocks."""
    generator = torch.Generator().manual_seed(seed)

    def pair(name: str) -> Pair:
        layer = base_of(model, name)
        A_rI, B_Or = torch.randn(rank, layer.in_features, generator=generator), torch.randn(layer.out_features, rank)
        return Pair(A_rI, B_Or, alpha=rank, rslora=False)

    return Learned(pairs={name: pair(name) for name in matching(model, "all-linear")}, whole={})


class Ours:
    """The native step."""

    def __init__(self, model: Decoder, kind: Any, adapters: list[Learned]) -> None:
        self.native = NativeDecoder(model, kind)
        self.adapters = [NativeAdapter(self.native, each) for each in adapters]
        each = -(-(CONTEXT + STEPS) // PAGE)
        self.pages_SP = np.arange(STREAMS * each, dtype=np.int32).reshape(STREAMS, each)
        self.cache = self.native.cache(self.pages_SP.size)
        for stream in range(STREAMS):
            self.step(np.full(CONTEXT, stream), np.arange(CONTEXT), 0)

    def step(self, sequence: Any, position: Any, count: int) -> float:
        number = np.arange(len(sequence), dtype=np.int32) % max(1, count)
        began = time.perf_counter()
        self.native.step(
            self.cache,
            Batch(
                token_R=number + 3, sequence_R=sequence.astype(np.int32), position_R=position.astype(np.int32),
                wanted_R=np.ones_like(number), long_R=np.zeros_like(number), pages_SP=self.pages_SP,
                adapter_R=number if count else None, adapters=self.adapters[:count],
            ),
        )  # fmt: skip
        return time.perf_counter() - began

    def speed(self, count: int) -> float:
        every = np.arange(STREAMS)
        return STREAMS / statistics.median(
            self.step(every, np.full(STREAMS, CONTEXT + at), count) for at in range(STEPS)
        )


class Peft:
    """This script in PEFT's Python, which answers a number of adapters with tokens a second."""

    def __init__(self, python: str, folder: Path, rank: int, threads: int) -> None:
        command = [python, "-c", PEFT, str(folder), str(rank), str(threads), str(STREAMS), str(CONTEXT)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def speed(self, count: int) -> float:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(count, file=self.process.stdin, flush=True)
        return float(json.loads(self.process.stdout.readline()))


PEFT = """
import statistics, sys, time
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
folder, rank, threads, streams, context = sys.argv[1], *map(int, sys.argv[2:])
torch.set_num_threads(threads)
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
config = LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
model = get_peft_model(model, config, "0", autocast_adapter_dtype=False)
for number in range(1, streams):
    model.add_adapter(str(number), config)
model.eval()
ids = torch.randint(model.config.vocab_size, (streams, context))
with torch.inference_mode():
    for line in sys.stdin:
        count, cache, seconds = int(line), None, []
        given = {"adapter_names": [str(row % count) for row in range(streams)] if count else ["__base__"] * streams}
        if not count:
            model.disable_adapter_layers()
            given = {}
        cache = model(input_ids=ids, use_cache=True, **given).past_key_values
        for _ in range(8):
            began = time.perf_counter()
            cache = model(input_ids=ids[:, :1], past_key_values=cache, use_cache=True, **given).past_key_values
            seconds.append(time.perf_counter() - began)
        if not count:
            model.enable_adapter_layers()
        print(streams / statistics.median(seconds), flush=True)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peft", metavar="PYTHON", default=None)
    parser.add_argument("--kinds", nargs="+", choices=("int4", "int8", "bf16"), default=["int4", "int8", "bf16"])
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    device.threads(args.threads)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model = random_model("m125")
        save_model(model, folder / "hf")
        adapters = [learned(model, args.rank, seed) for seed in range(STREAMS)]
        sides: dict[str, Any] = {f"ownlm {kind}": Ours(model, kind, adapters) for kind in args.kinds}
        if args.peft:
            sides["PEFT bf16"] = Peft(args.peft, folder / "hf", args.rank, args.threads)
        found: dict[tuple[str, int], list[float]] = {}
        for _ in range(args.rounds):
            for count in COUNTS:
                for name, side in sides.items():
                    found.setdefault((name, count), []).append(side.speed(count))
    print(f"\n{STREAMS} streams, rank {args.rank}, {args.threads} threads, median of {args.rounds};", end=" ")
    print("in brackets the time of a step over one without\n")
    print("| tokens/s | no adapter |", " | ".join(f"{n} adapter{'s' * (n > 1)}" for n in COUNTS[1:]), "|")
    print("|---|" + "---|" * len(COUNTS))
    for name in sides:
        speeds = [statistics.median(found[name, count]) for count in COUNTS]
        cells = [f"{speed:.0f} ({speeds[0] / speed:.2f})" for speed in speeds[1:]]
        print(f"| {name} | {speeds[0]:.0f} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
