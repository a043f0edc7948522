"""Kill a training run with SIGKILL at random moments, again and again, and compare it bit by bit with an unbroken one.

    python benchmarks/resume_kill9.py [--kills 25] [--steps 300] [--seed 0] [--lora]

With --lora an adapter is trained over a base in NF4. A state is written every second step, so that many kills fall into
the writing of one. Each attempt is a new process (forked from one that has imported torch but never used it, to save the
start-up). Prints the proof; exits with 1 if a bit differs.
"""

import argparse
import hashlib
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from ownlm import device
from ownlm.adapters.lora import LoRA, add_lora
from ownlm.models.decoder import Decoder
from ownlm.quantization.codes import quantize_linears
from ownlm.report import Reporter
from ownlm.tokens.batches import Batch, Batches, DocumentRows
from ownlm.tokens.shards import memory_shard
from ownlm.tokens.train import build
from ownlm.train import checkpoint
from ownlm.train.fresh import init_weights
from ownlm.train.loop import Settings, Work, train
from ownlm.train.objectives import Loss, causal_lm
from ownlm.train.optimizers import Optimizer
from ownlm.train.schedule import Schedule
from ownlm.train.stages import ModelShape

CHECKPOINT_EVERY = 2
NEVER_REAP = os.WEXITED | os.WNOHANG | os.WNOWAIT
SHAPE = ModelShape(hidden_size=32, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=16, intermediate_size=64)


def run(folder: Path, steps: int, lora: bool) -> None:
    """Train to the end in this process; every batch is noted with the step it was used in."""
    device.threads()
    texts = [f"Line {number}: {number * number} apples and {number % 7} pears.\n" * 3 for number in range(200)]
    tokenizer = build(texts, kind="byte", vocab_size=259)
    batches = Batches(DocumentRows(memory_shard(texts, tokenizer), 32, seed=1), rows=8, micro_rows=4)
    order = (folder / "order.txt").open("a") if folder.is_dir() or not folder.mkdir() else None
    assert order is not None

    def noted(model: Decoder, batch: Batch) -> Loss:
        order.write(hashlib.sha256(batch.tokens_BT.numpy().tobytes()).hexdigest() + "\n")
        order.flush()
        return causal_lm(model, batch)

    settings = Settings(
        steps=steps,
        optimizer=Optimizer(kind="adamw" if lora else "muon"),
        schedule=Schedule(),
        dtype=torch.bfloat16,
        checkpoint_every=CHECKPOINT_EVERY,
    )
    model = init_weights(Decoder(SHAPE.config(tokenizer.vocab_size, 32)), seed=3)
    if lora:
        quantize_linears(model, "nf4")
        add_lora(model, LoRA(targets="all-linear", train_also=("lm_head",)), seed=3)
    train(model, Work(name="run", folder=folder, batches=batches, objective=noted), settings, Reporter.silent())


def start(work: Callable[[], None]) -> int:
    """The process that does `work`; it exits with 0 when it is done."""
    process = os.fork()
    if process:
        return process
    status = 1
    try:
        work()
        status = 0
    finally:
        os._exit(status)


def newest(folder: Path) -> str:
    """The name of the newest state, "" when there is none."""
    return max((path.name for path in folder.glob("state-*")), default="")


def prove(kills: int, steps: int, seed: int, root: Path, lora: bool) -> bool:
    unbroken, killed = root / "unbroken", root / "killed"
    began = time.perf_counter()
    assert os.waitstatus_to_exitcode(os.waitpid(start(partial(run, unbroken, steps, lora)), 0)[1]) == 0, (
        "the unbroken run failed"
    )
    seconds = time.perf_counter() - began
    chance = random.Random(seed)
    done = while_writing = 0
    while done < kills:
        process, before = start(partial(run, killed, steps, lora)), newest(killed)
        # A third of the attempts die anywhere, a third after a new state, a third while one is being written.
        kind = done % 3
        while kind and os.waitid(os.P_PID, process, NEVER_REAP) is None:
            if newest(killed) != before and (kind == 1 or any(killed.glob(".state-*"))):
                break
        time.sleep(chance.random() * (0.002 if kind == 2 else 0.5 * seconds / kills))
        os.kill(process, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        if code != -signal.SIGKILL:
            break  # it was done before; half the unbroken time is left to spare, so this takes a very uneven machine
        done += 1
        while_writing += any(killed.glob(".state-*"))
    if done == kills:
        assert os.waitstatus_to_exitcode(os.waitpid(start(partial(run, killed, steps, lora)), 0)[1]) == 0, (
            "the last attempt failed"
        )
    states = [checkpoint.load(folder, Reporter.silent()) for folder in (unbroken, killed)]
    assert states[0] is not None
    assert states[1] is not None
    print(
        f"{done} kills with SIGKILL, {while_writing} of them while a state was being written; unbroken {seconds:.1f} s"
    )
    checks = {"steps": states[0].step == states[1].step == steps, "kills": done == kills}
    for name, tensor in states[0].tensors.items():
        other = states[1].tensors[name]
        checks[f"{name} {tuple(tensor.shape)} {tensor.dtype}"] = bool(
            torch.equal(tensor.view(torch.uint8), other.view(torch.uint8))
        )
    first, second = ([json.loads(line) for line in (folder / "metrics.jsonl").open()] for folder in (unbroken, killed))
    for row in first + second:
        del row["tokens_per_s"]
    checks[f"metrics, {len(first)} rows"] = first == second
    orders = [(folder / "order.txt").read_text().split() for folder in (unbroken, killed)]
    checks[f"data order, {len(orders[0])} batches, {len(orders[1])} with those done again"] = replay(*orders)
    for name, equal in checks.items():
        print(f"  {'equal' if equal else 'DIFFERENT'}  {name}")
    return all(checks.values())


def replay(wanted: list[str], seen: list[str]) -> bool:
    """Whether `seen` is `wanted` with jumps back only: every batch comes after the one before it, or repeats an old one.

    Two micro-batches a step; batches of an epoch differ from each other, so a batch tells its place.
    """
    place = {batch: at for at, batch in enumerate(wanted)}
    assert len(place) == len(wanted), "two batches are the same"
    reached = -1
    for batch in seen:
        at = place.get(batch)
        if at is None or at > reached + 1:
            return False
        reached = max(reached, at)
    return reached == len(wanted) - 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=25)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lora", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        return 0 if prove(options.kills, options.steps, options.seed, Path(root), options.lora) else 1


if __name__ == "__main__":
    sys.exit(main())
