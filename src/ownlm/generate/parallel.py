"""A model split over processes of this machine: one for each GPU, or for each part of a CPU.

    this process (rank 0): Engine ─► ParallelRunner ── the lines of a step ──► followers (follower.py)
                                          │                                        │
                                          └── its shard ◄── sums, torch.distributed ──┘

Rank 0 schedules and samples; the others hear through a pipe what is computed and compute it too. When one of them ends, the sums can't
be had: the step fails with one error, and nothing runs here any more. When this process ends, their pipes do, and so do they.
"""

import json
import select
import shutil
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ownlm import device as machine
from ownlm.checkpoints.shards import Shard, join
from ownlm.errors import UserError
from ownlm.generate import follower
from ownlm.generate.follower import Part
from ownlm.generate.sequence import Row
from ownlm.generate.torch_runner import TorchRunner, torch_runner
from ownlm.models.decoder import Decoder, count_parameters
from ownlm.models.families import from_hf
from ownlm.sandbox import ROOT

START_S = 1800  # for reading a large checkpoint from a slow disk
ANSWER_S = 60  # for the others in a sum; one that has ended is noticed at once
END_S = 10
BOOT = "import sys; sys.path.insert(0, sys.argv[1]); from ownlm.generate.follower import main; main()"


class RankLost(UserError):
    """A process of a split model has ended, and with it the model."""


class Ranks:
    """The followers of a split model, and this process's part in it. `decoder` is the shard of rank 0; its hidden states and logits are
    the whole model's, for the others compute with it whenever it is called."""

    def __init__(self, path: Path, size: int, *, dtype: torch.dtype, device: torch.device) -> None:
        """Raises UserError for a model or a number that doesn't go together, RankLost when a process ends on the way."""
        if dist.is_initialized():
            raise UserError("this process takes part in torch.distributed already.", where="tensor_parallel")
        if device.type == "cuda" and torch.cuda.device_count() < size:
            raise UserError(
                f"{size} processes need as many GPUs; there are {torch.cuda.device_count()}.", where="tensor_parallel"
            )
        folder = tempfile.mkdtemp(prefix="ownlm-")
        part = Part(
            path=str(path.resolve()),
            rank=0,
            size=size,
            dtype=str(dtype).removeprefix("torch."),
            device="cpu" if device.type == "cpu" else "cuda:0",
            store=str(Path(folder) / "meet"),
            threads=max(1, machine.threads() // size) if device.type == "cpu" else machine.threads(),
            timeout_s=ANSWER_S,
        )
        self.size, self.num_parameters = size, 0
        self.unfinished = False
        self.runners, self.closed = 0, list[int]()
        self.processes: list[subprocess.Popen[bytes]] = []
        self.close = weakref.finalize(self, _end, self.processes, folder)
        try:
            for rank in range(1, size):
                self._start(replace(part, rank=rank, device=part.device.replace("0", str(rank))))
            decoder = part.load()
            for rank in range(1, size):
                self._hear(rank)
            self._pipes(b"meet\n")
            self.num_parameters = count_parameters(from_hf(decoder.hf or {})[0])
            self.decoder = self._join(decoder, part)
        except BaseException:
            self._kill()
            raise

    def _start(self, part: Part) -> None:
        process = subprocess.Popen(
            [sys.executable, "-c", BOOT, str(ROOT)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # what is wrong comes as a line
            start_new_session=True,  # Ctrl-C in the terminal is for rank 0
        )
        self.processes.append(process)
        assert process.stdin is not None
        process.stdin.write(follower.settings(part))
        process.stdin.flush()

    def _hear(self, rank: int) -> None:
        """Wait for a follower to have loaded its part."""
        process = self.processes[rank - 1]
        assert process.stdout is not None
        if not select.select([process.stdout], [], [], START_S)[0]:
            raise RankLost(f"process {rank} of {self.size} isn't ready after {START_S} s.", where="tensor_parallel")
        if "loaded" not in _words(process.stdout.readline()):
            raise self.lost()

    def _join(self, decoder: Decoder, part: Part) -> Decoder:
        """Meet the others, and let a call of this shard be a call of all."""
        try:
            group = part.meet()
        except (RuntimeError, OSError):
            raise self.lost() from None
        join(decoder, Shard(rank=0, size=self.size), Guarded(group, self.lost))
        decoder.register_forward_pre_hook(self._before_forward, with_kwargs=True)
        decoder.register_forward_hook(self._after_forward, with_kwargs=True)
        inside = decoder.around_logits
        assert inside is not None

        def around(hidden: Tensor, own: Callable[[Tensor], Tensor]) -> Tensor:
            if self.unfinished:  # a runner's step, which all compute to its end
                return inside(hidden, own)
            with Together(self, [follower.LOGITS, *hidden.shape]):
                dist.broadcast(hidden.contiguous(), src=0)
                return inside(hidden, own)

        decoder.around_logits = around
        return decoder

    def _before_forward(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if kwargs.get("place") is None:
            positions_BT = kwargs.get("positions_BT")
            assert set(kwargs) <= {"positions_BT"}, f"of a split model: {sorted(kwargs)}"
            self.tell(follower.pack_forward(args[0], positions_BT))
            self.unfinished = True

    def _after_forward(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
        if kwargs.get("place") is None:
            self.unfinished = False

    def runner(self, *, slots: int, context: int, room: int) -> "ParallelRunner":
        """What computes an engine's steps, on all ranks. `room`: bytes for the cache on this device; on a CPU all ranks share it."""
        room = room // self.size if self.decoder.device.type == "cpu" else room
        return ParallelRunner(self, torch_runner(self.decoder, slots=slots, context=context, room=room, static=False))

    def tell(self, numbers: list[int]) -> None:
        """Send a command to all followers. Raises RankLost when one has ended, or when the last command was never finished here."""
        if self.unfinished or not self.close.alive:
            raise self.lost("its processes are out of step, for one step broke off")
        for runner in (self.closed.pop() for _ in range(len(self.closed))):
            self._command([follower.CLOSE, runner])
        self._command(numbers)

    def _command(self, numbers: list[int]) -> None:
        for process in self.processes:
            assert process.stdin is not None
            try:
                follower.write(process.stdin, numbers)
            except OSError:
                raise self.lost() from None

    def _pipes(self, line: bytes) -> None:
        for process in self.processes:
            assert process.stdin is not None
            try:
                process.stdin.write(line)
                process.stdin.flush()
            except OSError:
                raise self.lost() from None

    def lost(self, why: str = "") -> UserError:
        """End what is left, and the error that says what happened: which process has ended, else `why`."""
        ended = why or f"its processes got no answer from each other within {ANSWER_S} s"
        for rank, process in enumerate(self.processes, 1):
            try:
                code = process.wait(timeout=1)
            except subprocess.TimeoutExpired:
                continue
            assert process.stdout is not None
            fault = "" if process.stdout.closed else _words(process.stdout.readline()).get("fault", "")
            if code == 2 and fault:  # about the input: to be told as it is
                self._kill()
                return UserError(fault)
            # One that failed in a sum tells only that another has gone.
            told = fault or (f"it was killed by signal {-code}" if code < 0 else f"it ended with code {code}")
            ended = f"process {rank} of {self.size} has ended: {told}"
            if code < 0:
                break
        self._kill()
        return RankLost(f"{ended}.", where="tensor_parallel", cure="Load the model again.")

    def _kill(self) -> None:
        for process in self.processes:
            process.kill()
        self.close()


class Together:
    """What all ranks compute: told to them, and noted as unfinished where this one breaks off, for it would be out of step."""

    def __init__(self, ranks: Ranks, numbers: list[int]) -> None:
        self.ranks, self.numbers = ranks, numbers

    def __enter__(self) -> None:
        self.ranks.tell(self.numbers)
        self.ranks.unfinished = True

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        self.ranks.unfinished = kind is not None


class Guarded:
    """A group whose failures are told as what they mean."""

    def __init__(self, group: follower.Processes, lost: Callable[[], UserError]) -> None:
        self.group, self.lost = group, lost

    def sum(self, x: Tensor) -> Tensor:
        try:
            return self.group.sum(x)
        except RuntimeError:
            raise self.lost() from None

    def beside(self, x: Tensor) -> Tensor:
        try:
            return self.group.beside(x)
        except RuntimeError:
            raise self.lost() from None


class ParallelRunner:
    """A TorchRunner on every rank: the same pages, of each a part of the heads."""

    exact = False
    layers = 1
    adapter_form = type(None)

    def __init__(self, ranks: Ranks, local: TorchRunner) -> None:
        self.ranks, self.local = ranks, local
        self.pages, self.page_tokens, self.prefill_tokens = local.pages, local.page_tokens, local.prefill_tokens
        ranks.runners += 1
        self.number = ranks.runners
        ranks.tell([follower.OPEN, self.number, local.pages, local.page_tokens])
        # Told with the next command: this may be called in the middle of one.
        weakref.finalize(self, ranks.closed.append, self.number)

    def run(self, rows: Sequence[Row]) -> Tensor:
        lines = [self.local.line(row) for row in rows]
        with Together(self.ranks, follower.pack_step(self.number, lines)):
            return self.local.compute(lines)

    def copy(self, page: int, onto: int) -> None:
        with Together(self.ranks, [follower.COPY, self.number, page, onto]):
            self.local.copy(page, onto)


def _words(line: bytes) -> dict[str, Any]:
    try:
        words = json.loads(line)
    except ValueError:
        return {}
    return words if isinstance(words, dict) else {}


def _end(processes: list[subprocess.Popen[bytes]], folder: str) -> None:
    """Let every follower end, or end it."""
    for process in processes:
        if process.stdin is not None:
            with suppress(OSError):
                process.stdin.close()
    for process in processes:
        # One may still be in a sum that is complete here; it would lose what is on the way to it.
        if process.stdout is not None and select.select([process.stdout], [], [], END_S)[0]:
            process.stdout.readline()
    if dist.is_initialized():
        dist.destroy_process_group()
    for process in processes:
        try:
            process.wait(timeout=END_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.stdout is not None:
            process.stdout.close()
    shutil.rmtree(folder, ignore_errors=True)
