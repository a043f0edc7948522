"""What this process asks of the machine and of the environment. No other module reads environment variables.

`torch` is imported inside the functions that need it, so that the light commands stay light.
"""

import os
import platform
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ownlm.errors import UserError

if TYPE_CHECKING:
    import torch


def home() -> Path:
    """The workspace folder: `$OWNLM_HOME`, or `.ownlm` in the current directory."""
    return Path(os.environ.get("OWNLM_HOME") or ".ownlm")


def api_keys() -> dict[str, int]:
    """The keys a server accepts and the least priority of each: `$OWNLM_API_KEYS`, as KEY or KEY;priority=-10, separated by
    commas. Never on the command line, where `ps` shows them."""
    keys: dict[str, int] = {}
    for place, entry in enumerate(os.environ.get("OWNLM_API_KEYS", "").split(","), start=1):
        key, _, setting = entry.partition(";")
        number = re.fullmatch(r"priority=(-?\d{1,4})", setting)
        if setting and not number:  # which may be a part of a key, so it isn't told
            raise UserError(
                f"what follows the semicolon of key {place} is no setting.",
                where="OWNLM_API_KEYS",
                cure="Write KEY or KEY;priority=-10.",
            )
        if key:
            keys[key] = int(number[1]) if number else 0
    return keys


def admin_keys() -> tuple[str, ...]:
    """The keys of who may change what a server serves: `$OWNLM_ADMIN_KEYS`, separated by commas."""
    return tuple(key for key in os.environ.get("OWNLM_ADMIN_KEYS", "").split(",") if key)


def hub() -> tuple[str, str | None]:
    """The address of the model hub (`$HF_ENDPOINT`) and the token for it (`$HF_TOKEN`), which never goes out in the clear."""
    endpoint = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
    token = os.environ.get("HF_TOKEN") or None
    if not re.fullmatch(r"https?://[^/@\s]+(/[^@\s]*)?", endpoint):
        raise UserError(f"HF_ENDPOINT is {endpoint[:100]!a}.", cure="Give an address that begins with https://.")
    if token and endpoint.startswith("http:") and not re.match(r"http://(localhost|127\.|\[::1\])", endpoint):
        raise UserError(
            "HF_TOKEN would go through the network unencrypted.", where=endpoint, cure="Use https, or unset HF_TOKEN."
        )
    return endpoint, token


def kernels() -> str:
    """Which native kernels to use: `$OWNLM_KERNELS`, one of their instruction sets or "off"; empty: the best there are."""
    return os.environ.get("OWNLM_KERNELS", "")


def stay_on_loopback() -> None:
    """Let torch.distributed's processes of this machine meet on its loopback address only, where nobody else reaches them."""
    import psutil

    for name, addresses in psutil.net_if_addrs().items():
        if any(one.address == "127.0.0.1" for one in addresses):
            os.environ["GLOO_SOCKET_IFNAME"] = os.environ["NCCL_SOCKET_IFNAME"] = name


def cache_folder() -> Path:
    """Where what can be made again is kept between runs, as the XDG base directories say."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ownlm"


def cores() -> int:
    """How many processors this process may use, at least 1."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def threads(count: int | None = None) -> int:
    """Set torch's number of threads (all cores by default) and return it. Fixed threads make CPU results repeatable."""
    import torch

    chosen = count or int(os.environ.get("OMP_NUM_THREADS") or cores())
    if torch.get_num_threads() != chosen:
        torch.set_num_threads(chosen)
    return chosen


def torch_device(name: str | None = None) -> "torch.device":
    """The device asked for, else the first GPU, else the CPU. Raises UserError when it isn't there."""
    import torch

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as fault:
        raise UserError(
            f"device {name!r} can't be used ({str(fault).splitlines()[0]}).", cure="Try device=cpu."
        ) from None
    return device


def compute_dtype(device: "torch.device") -> "torch.dtype":
    """bfloat16 where the device multiplies it natively (AVX512_BF16, AMX, recent GPUs), else float32.

    float16 is never chosen: on CPUs it runs four times slower than float32.
    """
    import torch

    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    return torch.bfloat16 if cpu_flags() & {"avx512_bf16", "amx_bf16"} else torch.float32


def cpu_flags() -> set[str]:
    """The processor's feature flags where Linux tells them, else none."""
    for line in _read_lines("/proc/cpuinfo"):
        if line.startswith("flags"):
            return set(line.partition(":")[2].split())
    return set()


def machine() -> dict[str, Any]:
    """What a manifest says of the machine that made an artifact. No host name, no user, no path."""
    model = next(
        (line.partition(":")[2].strip() for line in _read_lines("/proc/cpuinfo") if line.startswith("model name")), ""
    )
    return {
        "processor": model or platform.processor() or platform.machine(),
        "cores": cores(),
        "memory_bytes": total_memory_bytes(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }


def total_memory_bytes() -> int:
    """Memory of the machine, or the limit of this process's cgroup where that is smaller."""
    import psutil

    total = int(psutil.virtual_memory().total)
    for line in _read_lines("/sys/fs/cgroup/memory.max"):
        if line.isdigit():
            total = min(total, int(line))
    return total


def free_memory_bytes(device: "torch.device | None" = None) -> int:
    """Memory that can be taken now without swapping; or that is free on a GPU."""
    import psutil

    if device is not None and device.type == "cuda":
        import torch

        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def memory_bytes() -> int:
    """The resident set of this process now."""
    import psutil

    return int(psutil.Process().memory_info().rss)


def peak_memory_bytes() -> int:
    """The largest resident set this process has had so far."""
    for line in _read_lines("/proc/self/status"):
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _read_lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []
