"""Tokens per second of training: ownlm's loop against the Hugging Face Trainer, on the same weights and batch.

    python benchmarks/train_speed.py [--steps 20] [--rounds 3] [--family gpt2|qwen3]

A decoder of 6 layers x 384, vocabulary 8,192, rows of 256 tokens, 2,048 tokens a step, AdamW on both sides, bf16 on both
sides (Trainer: bf16=True), no torch.compile. Each side runs in a process of its own, in turn; medians over the rounds, and
the peak resident memory of each process.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from ownlm import device
from ownlm.checkpoints.weights import load_model, save_model
from ownlm.models.decoder import Decoder, DecoderConfig, uniform
from ownlm.models.specs import Attention, FeedForward, Norm, Rotary
from ownlm.train.fresh import init_weights

VOCAB, WIDTH, LAYERS, HEADS, CONTEXT, ROWS = 8_192, 384, 6, 6, 256, 8
WARMUP = 4


def config(family: str) -> DecoderConfig:
    gpt2 = family == "gpt2"
    return uniform(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        num_layers=LAYERS,
        max_tokens=CONTEXT,
        attention=Attention(
            num_heads=HEADS, num_kv_heads=HEADS, head_dim=64, bias=gpt2, output_bias=gpt2, qk_norm=not gpt2
        ),
        mlp=FeedForward(size=4 * WIDTH, activation="gelu_tanh", gated=False, bias=True)
        if gpt2
        else FeedForward(size=1024),
        norm=Norm(kind="layer", eps=1e-5) if gpt2 else Norm(),
        rotary=None if gpt2 else Rotary(),
        tie_embeddings=True,
    )


def tokens(step: int) -> torch.Tensor:
    """(ROWS, CONTEXT + 1) token ids, the same on both sides."""
    return torch.randint(VOCAB, (ROWS, CONTEXT + 1), generator=torch.Generator().manual_seed(step))


def ours(folder: Path, steps: int) -> list[float]:
    """Seconds of each step of ownlm's loop."""
    from ownlm.report import Reporter
    from ownlm.tokens.batches import Batch
    from ownlm.train.loop import Settings, Work, train
    from ownlm.train.objectives import causal_lm
    from ownlm.train.optimizers import Optimizer
    from ownlm.train.schedule import Schedule

    class Same:
        num_rows = ROWS

        def step(self, step: int) -> list[Batch]:
            marks.append(time.perf_counter())
            row = tokens(step)
            return [
                Batch(
                    tokens_BT=row[:, :-1].contiguous(),
                    targets_BT=row[:, 1:].contiguous(),
                    positions_BT=None,
                    documents_BT=None,
                    num_trained=ROWS * CONTEXT,
                )
            ]

    marks: list[float] = []
    adamw = Optimizer(
        kind="adamw", lr=5e-5, embedding_lr=5e-5, head_lr=5e-5, vector_lr=5e-5, eps=1e-8, weight_decay=0.0
    )
    settings = Settings(steps=steps, optimizer=adamw, schedule=Schedule(), dtype=torch.bfloat16)
    work = Work(name="speed", folder=folder / "run", batches=Same(), objective=causal_lm)  # type: ignore[arg-type]
    outcome = train(load_model(folder / "model", dtype=torch.float32), work, settings, Reporter.silent())
    print(f"ownlm: last loss {outcome.loss:.4f}", file=sys.stderr)
    marks.append(time.perf_counter())
    return [after - before for before, after in pairwise(marks)]


def trainer(folder: Path, steps: int) -> list[float]:
    """Seconds of each step of the Hugging Face Trainer."""
    from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

    class Rows(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
        def __len__(self) -> int:
            return steps * ROWS

        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            row = tokens(index // ROWS)[index % ROWS, :-1]
            return {"input_ids": row, "labels": row}

    class Clock(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            marks.append(time.perf_counter())

    marks: list[float] = []
    arguments = TrainingArguments(
        output_dir=str(folder / "trainer"),
        max_steps=steps,
        per_device_train_batch_size=ROWS,
        bf16=True,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    Trainer(model=model, args=arguments, train_dataset=Rows(), callbacks=[Clock()]).train()
    marks.append(time.perf_counter())
    return [after - before for before, after in pairwise(marks)]


SIDES = {"trainer": trainer, "ownlm": ours}


def measure(side: str, folder: Path, steps: int) -> dict[str, float]:
    """One side in a process of its own: the median tokens/s of its steps, and its peak memory."""
    command = [sys.executable, __file__, "--side", side, "--folder", str(folder), "--steps", str(steps)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    result: dict[str, float] = json.loads(output.splitlines()[-1])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--family", choices=["gpt2", "qwen3"], default="gpt2")
    parser.add_argument("--side", choices=list(SIDES), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        device.threads()
        seconds = SIDES[options.side](options.folder, options.steps + WARMUP)[WARMUP:]
        rate = ROWS * CONTEXT / statistics.median(seconds)
        print(json.dumps({"tokens_per_s": rate, "peak_memory_bytes": device.peak_memory_bytes()}))
        return
    found: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root)
        save_model(init_weights(Decoder(config(options.family))), folder / "model")
        for number in range(options.rounds):
            for side in SIDES:
                (folder / str(number) / side).mkdir(parents=True)
                (folder / str(number) / side / "model").symlink_to(folder / "model")
                found[side].append(measure(side, folder / str(number) / side, options.steps))
    print(
        f"{options.family} {LAYERS} x {WIDTH}, vocabulary {VOCAB}, {ROWS * CONTEXT} tokens a step, {device.cores()} cores"
    )
    rates = {side: [one["tokens_per_s"] for one in runs] for side, runs in found.items()}
    for side, runs in found.items():
        memory = max(one["peak_memory_bytes"] for one in runs) / 1e6
        each = ", ".join(f"{rate:.0f}" for rate in rates[side])
        print(
            f"  {side:8} {statistics.median(rates[side]):7.0f} tokens/s (rounds: {each}), peak memory {memory:.0f} MB"
        )
    ratio = statistics.median(rates["ownlm"]) / statistics.median(rates["trainer"])
    print(f"  ownlm / trainer: {ratio:.2f}x")


if __name__ == "__main__":
    main()
