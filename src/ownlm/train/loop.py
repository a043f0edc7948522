"""The one training loop.

    step n:  micro-batches(n) -> objective -> loss / tokens of the step -> backward -> clip -> update -> row, state

A batch is a pure function of its step and all else is in the state, so a run that was stopped at any point ends in the
same bits as one that was not.
"""

import ctypes
import gc
import json
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from types import FrameType
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from ownlm.errors import Interrupted, UserError
from ownlm.report import Reporter, duration, quantity
from ownlm.storage import storage, write_atomic
from ownlm.tokens.batches import Micro
from ownlm.train import checkpoint
from ownlm.train.objectives import Objective
from ownlm.train.optimizers import Optimizer, Update
from ownlm.train.parameters import Parameters
from ownlm.train.schedule import Schedule, factor

STATUS_EVERY_S = 1.0
SAMPLE_EVERY_S = 20.0
LOGGED_ROWS = 500  # about so many rows in metrics.jsonl, whatever the number of steps
M = TypeVar("M", bound=Micro)


class Steps(Protocol):
    """The training data of a run: always the same micro-batches for a step, whose `num_trained` summed is its weight."""

    def step(self, step: int) -> Sequence[Micro]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How long, with what rule and how carefully to train. `validate_every` and `checkpoint_every` count steps; None: at
    the end only, and never."""

    steps: int
    optimizer: Optimizer
    schedule: Schedule
    dtype: torch.dtype
    validate_every: int | None = None
    checkpoint_every: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """One run: what to train on, and where to keep its states. `validation` yields the same batches each time it is called,
    which `judge` scores (None: the objective itself)."""

    name: str
    folder: Path
    batches: Steps
    objective: Objective
    validation: Callable[[], Iterable[Micro]] | None = None
    judge: Objective | None = None
    sample: Callable[[Any], str] | None = None
    how_to_continue: str = "Run the same command again to continue."


@dataclass(slots=True)
class Counters:
    """What is counted over the whole run; `seconds` is all training time so far. The last two belong to the current row."""

    tokens: int = 0
    seconds: float = 0.0
    validation_loss: float | None = None
    row_loss: float = 0.0
    row_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """A finished run. The model holds its fp32 weights. `losses` are nats per trained token."""

    steps: int
    tokens: int
    seconds: float
    loss: float
    validation_loss: float | None
    rows: list[dict[str, Any]] = field(default_factory=list)


def train(model: nn.Module, work: Work, settings: Settings, reporter: Reporter) -> Outcome:
    """Train `model` in place to the end of `settings.steps`, from the newest state in the folder if there is one.

    Raises Interrupted after SIGINT or SIGTERM once the state is saved, UserError when the loss is no longer a number,
    Busy when another process trains this run, and StorageFull.
    """
    keep_freed_memory()
    with checkpoint.locked(work.folder), _stop_signals() as stopped:
        return _Run(model, work, settings, reporter).run(stopped)


class _Run:
    """The loop's moving parts: parameters, moments, counters, rows."""

    def __init__(self, model: nn.Module, work: Work, settings: Settings, reporter: Reporter) -> None:
        self.model, self.work, self.settings, self.reporter = model, work, settings, reporter
        self.device = next(model.parameters()).device
        self.parameters = Parameters(model, settings.dtype)
        self.update = Update(settings.optimizer, self.parameters, settings.dtype)
        self.counters = Counters()
        self.rows: list[dict[str, Any]] = []
        self.log_every = max(1, settings.steps // LOGGED_ROWS)
        self.step = 0
        self.metrics = work.folder / "metrics.jsonl"
        self._restore()

    def run(self, stopped: threading.Event) -> Outcome:
        model, settings = self.model.train(), self.settings
        started, first = time.perf_counter(), self.step
        shown = sampled = marked = started
        before = self.counters.seconds
        with storage(self.work.folder), self.metrics.open("a", encoding="utf-8") as self.file:
            while self.step < settings.steps:
                loss, norm = self._step()
                now = time.perf_counter()
                self.counters.seconds = before + now - started
                if self.step % self.log_every == 0 or self.step == settings.steps:
                    rate = self.counters.row_tokens / max(1e-9, now - marked)
                    self._row(norm, rate)
                    marked = time.perf_counter()
                if now - shown > STATUS_EVERY_S:
                    left = (now - started) / (self.step - first) * (settings.steps - self.step)
                    rate = (self.counters.tokens - self.tokens_before) / (now - started)
                    self.reporter.status(
                        f"{self.work.name}: step {self.step}/{settings.steps}  loss {loss:.3f}  "
                        f"{quantity(rate)} tokens/s  {duration(left)} left"
                    )
                    shown = now
                if self.work.sample is not None and now - sampled > SAMPLE_EVERY_S:
                    self._sample(self.work.sample)
                    sampled = time.perf_counter()
                if stopped.is_set() and self.step < settings.steps:
                    self._save()
                    raise Interrupted(
                        f"Stopped at step {self.step} of {settings.steps}; its state is saved. {self.work.how_to_continue}"
                    )
                if settings.checkpoint_every and self.step % settings.checkpoint_every == 0:
                    self._save()
        self.parameters.release(model)
        return Outcome(
            steps=self.step,
            tokens=self.counters.tokens,
            seconds=self.counters.seconds,
            loss=self.rows[-1]["loss"],
            validation_loss=self.counters.validation_loss,
            rows=self.rows,
        )

    def _step(self) -> tuple[float, float]:
        """One update: the mean loss over the step's trained tokens, and the norm of its gradient before clipping."""
        micro_batches = self.work.batches.step(self.step)
        trained = sum(batch.num_trained for batch in micro_batches)
        total = 0.0
        for batch in micro_batches:
            loss = self.work.objective(self.model, to_device(batch, self.device))
            (loss.sum / trained).backward()  # type: ignore[no-untyped-call]
            self.parameters.collect()
            total += float(loss.sum.detach())
        norm = self.parameters.norm()
        if not math.isfinite(total) or not math.isfinite(norm):
            self.parameters.gradient.zero_()
            self._save()
            raise UserError(
                f"the loss became {total / trained} (gradient norm {norm}) at step {self.step + 1}; the state before it is kept.",
                where=self.work.name,
                cure="Lower optimizer.lr, or set precision=fp32.",
            )
        self.update.step(self.step, factor(self.settings.schedule, self.step, self.settings.steps), norm)
        self.step += 1
        self.counters.tokens += sum(batch.num_tokens for batch in micro_batches)
        self.counters.row_loss += total
        self.counters.row_tokens += trained
        return total / trained, norm

    def _row(self, norm: float, rate: float) -> None:
        """Write what happened since the last row; validate where it is due."""
        settings, counters = self.settings, self.counters
        lr = settings.optimizer.matrix_lr * factor(settings.schedule, self.step - 1, settings.steps)
        row: dict[str, Any] = {
            "step": self.step,
            "loss": counters.row_loss / counters.row_tokens,
            "lr": lr,
            "gradient_norm": norm,
            "tokens": counters.tokens,
            "tokens_per_s": round(rate, 1),
        }
        every = settings.validate_every
        due = every is not None and self.step // every > (self.step - self.log_every) // every
        if self.work.validation is not None and (due or self.step == settings.steps):
            row["validation_loss"] = counters.validation_loss = validate(
                self.model, self.work.judge or self.work.objective, self.work.validation()
            )
        counters.row_loss, counters.row_tokens = 0.0, 0
        self.rows.append(row)
        self.file.write(json.dumps(row) + "\n")
        self.reporter.event("step", name=self.work.name, **row)

    def _sample(self, sample: Callable[[Any], str]) -> None:
        """Show what the model says by now; the run's randomness and mode are left as they were."""
        with torch.random.fork_rng(), torch.no_grad():
            self.model.eval()
            self.reporter.line(f"  step {self.step}: {sample(self.model)}")
            self.model.train()

    def _save(self) -> None:
        self.file.flush()
        os.fsync(self.file.fileno())
        tensors = {"master": self.parameters.master, **self.update.moments, "rng": torch.get_rng_state()}
        counters = {name: getattr(self.counters, name) for name in Counters.__slots__}
        checkpoint.save(self.work.folder, self.step, tensors, counters)

    def _restore(self) -> None:
        state = checkpoint.load(self.work.folder, self.reporter)
        if state is not None:
            self.step = state.step
            self.parameters.master.copy_(state.tensors["master"])
            self.parameters.publish()
            for name, moment in self.update.moments.items():
                moment.copy_(state.tensors[name])
            torch.set_rng_state(state.tensors["rng"])
            self.counters = Counters(**state.record)
            self.rows = [row for row in _rows(self.metrics) if row["step"] <= self.step]
            self.reporter.line(f"{self.work.name}: continues after step {self.step} of {self.settings.steps}")
        # What was written after the state will be written again.
        write_atomic(self.metrics, "".join(json.dumps(row) + "\n" for row in self.rows))
        self.tokens_before = self.counters.tokens


def validate(model: nn.Module, objective: Objective, batches: Iterable[Micro]) -> float:
    """Mean loss over the trained tokens of the batches, in nats."""
    total, trained = 0.0, 0
    device = next(model.parameters()).device
    with torch.no_grad():
        for batch in batches:
            loss = objective(model, to_device(batch, device))
            total += float(loss.sum.detach())
            trained += loss.num_trained
    return total / max(1, trained)


def to_device(batch: M, target: torch.device) -> M:
    """The batch, a dataclass, with its tensors on `target`; itself where they are there."""
    if target.type == "cpu":
        return batch
    values = {field.name: getattr(batch, field.name) for field in fields(batch)}  # type: ignore[arg-type]
    moved = {name: value.to(target, non_blocking=True) for name, value in values.items() if isinstance(value, Tensor)}
    return replace(batch, **moved)  # type: ignore[type-var]


def keep_freed_memory() -> None:
    """Let glibc keep freed memory for the next tensor instead of giving it back to the system.

    By default every tensor of some MB is mapped, zeroed page by page and unmapped again: a log_softmax over 2,048 x 8,192
    took 39 ms with it and 6 ms without. Elsewhere than on Linux with glibc nothing happens.
    """
    if (libc := _glibc()) is not None:
        m_trim_threshold, m_mmap_threshold = -1, -3
        libc.mallopt(m_mmap_threshold, 1 << 30)
        libc.mallopt(m_trim_threshold, (1 << 31) - 1)


def return_freed_memory() -> None:
    """Undo `keep_freed_memory` and give back what was freed, so that the stages after training don't add to its peak."""
    gc.collect()
    if (libc := _glibc()) is not None:
        m_trim_threshold, m_mmap_threshold, default = -1, -3, 128 * 1024
        libc.mallopt(m_mmap_threshold, default)
        libc.mallopt(m_trim_threshold, default)
        libc.malloc_trim(0)


def _glibc() -> Any | None:
    """The C library, where it is glibc."""
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "malloc_trim") else None


@contextmanager
def _stop_signals() -> Iterator[threading.Event]:
    """An event that SIGINT and SIGTERM set, once; the second Ctrl-C stops at once. Only the main thread gets signals."""
    stopped = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stopped
        return
    kinds = (signal.SIGINT, signal.SIGTERM)
    before = {kind: signal.getsignal(kind) for kind in kinds}

    def stop(kind: int, frame: FrameType | None) -> None:
        stopped.set()
        signal.signal(kind, before[signal.Signals(kind)])

    for kind in kinds:
        signal.signal(kind, stop)
    try:
        yield stopped
    finally:
        for kind in kinds:
            signal.signal(kind, before[kind])


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    """The whole rows of a metrics file; a line that was cut off is left out."""
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            return
