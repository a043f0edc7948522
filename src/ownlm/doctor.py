"""Whether this machine is ready, and what ownlm will use of it."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ownlm import __version__, device
from ownlm.artifact import packages
from ownlm.report import size
from ownlm.storage import free_bytes

if TYPE_CHECKING:
    import torch

State = Literal["ok", "warning", "fault"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing looked at; `cure` is empty when there is nothing to do."""

    what: str
    found: str
    state: State = "ok"
    cure: str = ""


def doctor(home: Path) -> list[Finding]:
    """What was found, each with its cure; takes about two seconds, most of them for the matrix products."""
    return [_python(), _torch(), _compute(), _memory(), _disk(home), _workspace(home)]


def _python() -> Finding:
    machine = device.machine()
    return Finding(
        what="ownlm", found=f"{__version__}, Python {machine['python']}, {machine['processor']}, {device.cores()} cores"
    )


def _torch() -> Finding:
    import torch

    cuda = torch.version.cuda
    found = f"{packages()['torch']}, {'CUDA ' + cuda if cuda else 'CPU build'}"
    if cuda and not torch.cuda.is_available():
        cure = "This is the CUDA build on a machine without a usable GPU: the CPU build of the same version saves gigabytes."
        return Finding(what="torch", found=found, state="warning", cure=cure)
    return Finding(what="torch", found=found)


def _compute() -> Finding:
    import torch

    where = device.torch_device()
    threads = device.threads()
    dtype = device.compute_dtype(where)
    speeds = {kind: gemm_flops(where, kind) / 1e9 for kind in {torch.float32, dtype}}
    name = torch.cuda.get_device_name(where) if where.type == "cuda" else f"cpu, {threads} threads"
    text = ", ".join(f"{str(kind).removeprefix('torch.')} {speed:,.0f} GFLOP/s" for kind, speed in speeds.items())
    return Finding(what="compute", found=f"{name}: {text}; training uses {str(dtype).removeprefix('torch.')}")


def gemm_flops(where: "torch.device", dtype: "torch.dtype", side: int = 1024) -> float:
    """Floating-point operations per second of a square matrix product, the best of several."""
    import torch

    a = torch.randn(side, side, device=where).to(dtype)
    best = float("inf")
    for _ in range(8):
        begin = time.perf_counter()
        product = a @ a
        if where.type == "cuda":
            torch.cuda.synchronize(where)
        best = min(best, time.perf_counter() - begin)
    assert product.shape == a.shape
    return 2 * side**3 / best


def _memory() -> Finding:
    free, total = device.free_memory_bytes(), device.total_memory_bytes()
    found = f"{size(free)} free of {size(total)}"
    if free < 2e9:
        return Finding(
            what="memory", found=found, state="warning", cure="The demo needs up to 2 GB: close something first."
        )
    return Finding(what="memory", found=found)


def _disk(home: Path) -> Finding:
    free = free_bytes(home)
    if free < 1e9:
        cure = "Free some space, or set OWNLM_HOME to a folder elsewhere."
        return Finding(what="disk", found=f"{size(free)} free", state="fault" if free < 1e8 else "warning", cure=cure)
    return Finding(what="disk", found=f"{size(free)} free")


def _workspace(home: Path) -> Finding:
    try:
        home.mkdir(parents=True, exist_ok=True)
        probe = home / ".probe"
        probe.write_text("")
        probe.unlink()
    except OSError as fault:
        cure = "Set OWNLM_HOME to a folder you may write to."
        return Finding(what="workspace", found=f"{home} can't be written ({fault.strerror})", state="fault", cure=cure)
    return Finding(what="workspace", found=str(home))
