"""What the processes of a split model say to each other, and the life of those that follow (parallel.py starts them).

    rank 0 ── a line of JSON: which part of which checkpoint ──► follower: loads it, says "loaded"
           ── "meet" ─────────────────────────────────────────►          joins the group of torch.distributed
           ── commands, frames of int64 ──────────────────────►          does the same arithmetic on its shard
           ── end of the pipe: rank 0 has ended, or wants no more ─────► says "done", ends

Commands are numbers only. Nothing of the arithmetic goes through the pipe: sums go through the group.
Shapes: B rows, T tokens, W wanted tokens, D hidden.
"""

import itertools
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import IO, Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ownlm import device as machine
from ownlm.checkpoints.shards import Shard, join
from ownlm.checkpoints.weights import load_model
from ownlm.errors import UserError
from ownlm.generate.torch_runner import Line, TorchRunner
from ownlm.models.decoder import Decoder

OPEN, CLOSE, STEP, COPY, FORWARD, LOGITS = range(6)


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """What a process is to compute: shard `rank` of `size` of the checkpoint in `path`; `store` is the file where they meet."""

    path: str
    rank: int
    size: int
    dtype: str
    device: str
    store: str
    threads: int
    timeout_s: int

    def load(self) -> Decoder:
        """This part of the model, which doesn't know of the others yet."""
        machine.threads(self.threads)
        shard = Shard(rank=self.rank, size=self.size)
        model: Decoder = load_model(self.path, dtype=getattr(torch, self.dtype), device=self.device, shard=shard)
        return model

    def meet(self) -> "Processes":
        """Wait until all are here."""
        machine.stay_on_loopback()
        if self.device != "cpu":
            torch.cuda.set_device(self.device)
        dist.init_process_group(
            "gloo" if self.device == "cpu" else "nccl",
            init_method=f"file://{self.store}",
            rank=self.rank,
            world_size=self.size,
            timeout=timedelta(seconds=self.timeout_s),
        )
        return Processes(self.size)


class Processes:
    """The group of shards that run in processes."""

    def __init__(self, size: int) -> None:
        self.size = size

    def sum(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        dist.all_reduce(x)
        return x

    def beside(self, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x) for _ in range(self.size)]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts, -1)


def pack_step(runner: int, lines: Sequence[Line]) -> list[int]:
    """The command for a runner's step."""
    numbers = [STEP, runner, len(lines)]
    for line in lines:
        assert line.embeds_TD is None, "a split model reads texts only"
        assert line.adapter is None, "a split model goes without adapters"
        numbers += [len(line.tokens), line.start, len(line.pages), line.wanted, line.long, *line.tokens, *line.pages]
    return numbers


def unpack_lines(numbers: Iterator[int]) -> Iterator[Line]:
    """The lines of a step's command, after the runner's number."""
    for _ in range(next(numbers)):
        tokens, start, pages, wanted, long = itertools.islice(numbers, 5)
        yield Line(
            tokens=list(itertools.islice(numbers, tokens)),
            start=start,
            pages=list(itertools.islice(numbers, pages)),
            wanted=wanted,
            long=bool(long),
        )


def pack_forward(tokens_BT: Tensor, positions_BT: Tensor | None) -> list[int]:
    """The command for a plain forward."""
    given = [] if positions_BT is None else positions_BT.expand_as(tokens_BT).flatten().tolist()
    return [FORWARD, *tokens_BT.shape, positions_BT is not None, *tokens_BT.flatten().tolist(), *given]


def write(pipe: IO[bytes], numbers: Iterable[int]) -> None:
    """One frame: how many, and the numbers."""
    frame = np.fromiter(numbers, np.int64)
    pipe.write(np.int64(len(frame)).tobytes() + frame.tobytes())
    pipe.flush()


def read(pipe: IO[bytes]) -> list[int] | None:
    """The numbers of a frame; None at the end of the pipe."""
    head = pipe.read(8)
    if len(head) < 8:
        return None
    body = pipe.read(8 * int(np.frombuffer(head, np.int64)[0]))
    numbers: list[int] = np.frombuffer(body, np.int64).tolist()
    return numbers


class Follower:
    """A shard that does what it is told."""

    def __init__(self, model: Decoder) -> None:
        self.model = model
        self.runners: dict[int, TorchRunner] = {}

    def do(self, numbers: list[int]) -> None:
        """One command."""
        kind, rest = numbers[0], iter(numbers[1:])
        if kind == OPEN:
            runner, pages, page = rest
            self.runners[runner] = TorchRunner(self.model, pages=pages, page=page, static=False)
        elif kind == CLOSE:
            del self.runners[next(rest)]
        elif kind == STEP:
            self.runners[next(rest)].compute(list(unpack_lines(rest)))
        elif kind == COPY:
            runner, page, onto = rest
            self.runners[runner].copy(page, onto)
        elif kind == FORWARD:
            rows, width, positioned, *values = rest
            both = torch.tensor(values, device=self.model.device).view(-1, rows, width)
            self.model(both[0], positions_BT=both[1] if positioned else None)
        elif kind == LOGITS:
            hidden = torch.empty(*rest, dtype=self.model.dtype, device=self.model.device)
            dist.broadcast(hidden, src=0)
            self.model.logits(hidden)


def main() -> None:
    """The whole life of a follower. What is wrong it says in a line of JSON, and ends."""
    pipe, out = sys.stdin.buffer, sys.stdout

    def say(**words: Any) -> None:
        print(json.dumps(words), file=out, flush=True)

    try:
        live(pipe, say)
    except UserError as fault:
        say(fault=str(fault))
        sys.exit(2)
    except Exception as fault:  # noqa: BLE001  (whatever it is, rank 0 has to tell it)
        say(fault=f"{type(fault).__name__}: {str(fault).splitlines()[0] if str(fault) else ''}")
        sys.exit(1)


def live(pipe: IO[bytes], say: Callable[..., None]) -> None:
    """Load, meet, and follow until the pipe ends."""
    part = Part(**json.loads(pipe.readline()))
    model = part.load()
    say(loaded=part.rank)
    if not pipe.readline():
        return
    join(model, Shard(rank=part.rank, size=part.size), part.meet())
    follower = Follower(model)
    with torch.inference_mode():
        while (numbers := read(pipe)) is not None:
            follower.do(numbers)
    say(done=part.rank)
    dist.destroy_process_group()


def settings(part: Part) -> bytes:
    """The line that makes a follower that part."""
    return json.dumps(asdict(part)).encode() + b"\n"
