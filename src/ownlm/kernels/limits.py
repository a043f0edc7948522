"""What this machine can do at most, measured on the spot: how fast its memory is read, and how fast matrices are multiplied.

A step of a decoder reads all its weights once, so one stream is bound by the first; a prompt by the second.
"""

import mmap
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ownlm.kernels import library as lib

READ_BYTES = 512 << 20  # more than any cache holds
SHAPE = (512, 2048, 2048)  # rows, inputs, outputs: a prompt through a layer of a model of a billion weights
TRIES, SECONDS = 5, 1.0  # of each measurement: so often, or so long


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Bytes a second, and operations a second (a product and a sum are two) by the type of what is multiplied."""

    threads: int
    memory: float
    products: dict[str, float]

    def best(self, other: "Limits") -> "Limits":
        """The higher of two measurements of one machine."""
        products = {kind: max(speed, other.products[kind]) for kind, speed in self.products.items()}
        return Limits(threads=self.threads, memory=max(self.memory, other.memory), products=products)


def limits(threads: int) -> Limits:
    """Measured now, in a few seconds, with so many threads (PyTorch's own are set by the caller)."""
    return Limits(
        threads=threads,
        memory=memory_speed(threads),
        products={"int8": product_speed(torch.int8), "bf16": product_speed(torch.bfloat16), "f32": product_speed()},
    )


def memory_speed(threads: int) -> float:
    """Bytes a second of reading from end to end, in huge pages where the system has them."""
    room = mmap.mmap(-1, READ_BYTES)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        room.madvise(mmap.MADV_HUGEPAGE)
    words = np.frombuffer(room, np.uint64)
    words[:] = 1  # pages that were never written are not memory
    return READ_BYTES / _fastest(lambda: _read(words, threads))


def _read(words: NDArray[np.uint64], threads: int) -> None:
    found = lib.library()
    if found is not None:
        found.ownlm_read(threads, words.ctypes.data, len(words))
        return
    parts = np.array_split(words, threads)
    workers = [threading.Thread(target=np.sum, args=(part,)) for part in parts]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


def product_speed(dtype: torch.dtype = torch.float32) -> float:
    """Operations a second of PyTorch's matrix product, on its threads."""
    rows, inputs, outputs = SHAPE
    a, b = _numbers((rows, inputs), dtype), _numbers((inputs, outputs), dtype)
    multiply: Callable[[], Tensor] = (lambda: torch._int_mm(a, b)) if dtype == torch.int8 else (lambda: a @ b)
    return 2 * rows * inputs * outputs / _fastest(multiply)


def _numbers(shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    if dtype == torch.int8:
        return torch.randint(-127, 127, shape, generator=generator, dtype=dtype)
    return torch.randn(shape, generator=generator).to(dtype)


def _fastest(work: Callable[[], object]) -> float:
    """Seconds of the fastest of some runs, of which the first doesn't count."""
    work()
    best, begun = float("inf"), time.perf_counter()
    for _ in range(TRIES):
        began = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - began)
        if time.perf_counter() - begun > SECONDS:
            break
    return best
