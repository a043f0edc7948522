"""A child process that reads what we don't trust, and can do nothing else.

    run("ownlm.formats.torchfile:convert", source, target, limits)
     └─► child: python -I -S, no environment
            1. limits of memory, processor time, file size and open files
            2. imports its function and maps the source: the last things it may open
            3. a seccomp filter: write the file it was given, take memory, end; nothing else
            4. calls the function; its report comes back as one bounded JSON object, or a sentence why there is none

The function and all it imports come from the standard library and from ownlm: site-packages are not there (-S). It
says what is wrong with its input by raising `Refused`. Where the system has no seccomp (macOS, other processors) the limits
hold alone; `Outcome.guards` says what was active.
"""

import ctypes
import json
import mmap
import os
import platform
import resource
import signal
import struct
import subprocess
import sys
import threading
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]  # what the child may import from, beside the standard library
REPORT_BYTES = 10_000_000
START = "import sys; sys.path.insert(0, sys.argv[1]); from ownlm.sandbox import inside; inside(*sys.argv[2:])"


class Refused(ValueError):
    """Raised inside: the input is not what it should be. The parent gets the sentence."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What the child may use at most."""

    memory_bytes: int  # of address space, mapped files included
    cpu_s: int
    wall_s: int
    file_bytes: int  # of any file it writes


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How it went: `report` is what the function returned, or `fault` a sentence; `guards` names what held it."""

    report: dict[str, Any] | None
    fault: str
    guards: tuple[str, ...]


def run(function: str, source: int, target: int, limits: Limits) -> Outcome:
    """Call "module:function" in a confined child with the bytes of the open file `source` and the open file `target`.

    The report, and what was written to `target`, are to be trusted as little as the source.
    """
    files = json.dumps([source, target])
    command = [sys.executable, "-I", "-S", "-B", "-c", START, str(ROOT), function, files, json.dumps(asdict(limits))]
    child = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env={}, cwd="/",
        pass_fds=(source, target), start_new_session=True,
    )  # fmt: skip
    late = threading.Event()

    def stop() -> None:
        late.set()
        child.kill()

    timer = threading.Timer(limits.wall_s, stop)
    timer.start()
    try:
        assert child.stdout is not None
        said = child.stdout.read(REPORT_BYTES + 1)
        if len(said) > REPORT_BYTES:
            child.kill()
        code = child.wait()
    finally:
        timer.cancel()
        child.kill()
        child.wait()
        if child.stdout is not None:
            child.stdout.close()
    return _outcome(said, code, late.is_set(), limits)


def _outcome(said: bytes, code: int, late: bool, limits: Limits) -> Outcome:
    lines = said.splitlines()
    guards: tuple[str, ...] = ()
    try:
        guards = tuple(str(name) for name in json.loads(lines[0])["guards"])
        if code == 0:
            report = json.loads(lines[1])
            if isinstance(report, dict) and isinstance(report.get("fault", ""), str):
                return Outcome(
                    report=None if "fault" in report else report, fault=report.get("fault", ""), guards=guards
                )
    except (IndexError, ValueError, TypeError, KeyError, RecursionError):
        pass
    causes = {
        -signal.SIGXCPU: f"it took more than {limits.cpu_s} s of processor time",
        -signal.SIGXFSZ: f"it wrote more than {limits.file_bytes} bytes",
        -signal.SIGBUS: "a file became shorter while it was read",
        -signal.SIGKILL: "it was killed",
    }
    cause = f"it took more than {limits.wall_s} s" if late else causes.get(code, f"it ended with code {code}")
    return Outcome(report=None, fault=f"the confined process gave no result: {cause}", guards=guards)


def inside(function: str, files: str, limits: str) -> None:
    """What the child does. Never returns."""
    guards = _limit(Limits(**json.loads(limits)))
    module, name = function.split(":")
    call = getattr(import_module(module), name)
    source, target = json.loads(files)
    size = os.fstat(source).st_size
    data = memoryview(mmap.mmap(source, size, access=mmap.ACCESS_READ) if size else b"")
    guards += filter_calls()
    report = {}
    _say({"guards": guards})
    try:
        report = call(data, target)
    except Refused as fault:
        report = {"fault": str(fault)}
    except MemoryError:
        report = {"fault": "reading it takes more memory than a file of this size may need"}
    except Exception as fault:  # noqa: BLE001  (whatever the input provoked is told by the parent, in one sentence)
        report = {"fault": f"it can't be read ({type(fault).__name__}: {fault})"[:500]}
    _say(report)
    os._exit(0)


def _say(value: dict[str, Any]) -> None:
    data = json.dumps(value).encode() + b"\n"
    while data:
        data = data[os.write(1, data) :]


def _limit(limits: Limits) -> list[str]:
    """Bound this process for good."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG: end with the parent
    bounds = {
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_CPU: limits.cpu_s,
        resource.RLIMIT_FSIZE: limits.file_bytes,
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_AS: limits.memory_bytes,
    }
    for kind, bound in bounds.items():
        _, hard = resource.getrlimit(kind)
        hard = sys.maxsize if hard == resource.RLIM_INFINITY else hard
        bound = min(bound, hard)
        # Beyond the hard limit of CPU time comes SIGKILL, which says nothing of its cause.
        resource.setrlimit(kind, (bound, bound + 1 if kind == resource.RLIMIT_CPU and bound < hard else bound))
    return ["limits"]


# ── seccomp ──────────────────────────────────────────────────────────────────────────────────────────────────────────

# What a process needs that has its files open already. No open, no socket, no exec, no fork, no kill of others.
CALLS = (
    "read", "write", "readv", "writev", "pread64", "pwrite64", "lseek", "fstat", "ftruncate", "fsync", "close", "mmap", "munmap",
    "mprotect", "mremap", "madvise", "brk", "rt_sigaction", "rt_sigprocmask", "rt_sigreturn", "futex", "clock_gettime",
    "gettimeofday", "getrandom", "sched_yield", "exit", "exit_group", "restart_syscall",
)  # fmt: skip
# The numbers of CALLS (linux/arch/x86/entry/syscalls/syscall_64.tbl; linux/include/uapi/asm-generic/unistd.h), that of
# seccomp itself, and the machine as the kernel's audit names it.
MACHINES: dict[str, tuple[int, int, tuple[int, ...]]] = {
    "x86_64": (0xC000003E, 317, (
        0, 1, 19, 20, 17, 18, 8, 5, 77, 74, 3, 9, 11,
        10, 25, 28, 12, 13, 14, 15, 202, 228,
        96, 318, 24, 60, 231, 219,
    )),
    "aarch64": (0xC00000B7, 277, (
        63, 64, 65, 66, 67, 68, 62, 80, 46, 82, 57, 222, 215,
        226, 216, 233, 214, 134, 135, 139, 98, 113,
        169, 278, 124, 93, 94, 128,
    )),
}  # fmt: skip
LOAD, EQUAL, AT_LEAST, RETURN = (
    0x20,
    0x15,
    0x35,
    0x06,
)  # BPF: word of the call's record, jump if ==, jump if >=, verdict
ALLOW, KILL, REFUSE = 0x7FFF0000, 0x80000000, 0x00050000 | 1  # the last: "operation not permitted"


def filter_calls() -> list[str]:
    """Let the kernel refuse every call but CALLS, for this process for good. Names the guard, if the system has it."""
    if sys.platform != "linux" or platform.machine() not in MACHINES:
        return []
    machine, seccomp, numbers = MACHINES[platform.machine()]
    program = [
        (LOAD, 0, 0, 4),  # for which kind of machine the call is made
        (EQUAL, 1, 0, machine),
        (RETURN, 0, 0, KILL),
        (LOAD, 0, 0, 0),  # the number of the call
        (AT_LEAST, len(numbers), 0, 0x40000000),  # x32: other numbers for the same calls
        *((EQUAL, len(numbers) - at, 0, number) for at, number in enumerate(numbers)),
        (RETURN, 0, 0, REFUSE),
        (RETURN, 0, 0, ALLOW),
    ]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in program))
    head = ctypes.create_string_buffer(struct.pack("HxxxxxxQ", len(program), ctypes.addressof(code)))
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS, without which only root may set a filter
    # SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_TSYNC: all threads at once.
    done = libc.syscall(ctypes.c_long(seccomp), ctypes.c_long(1), ctypes.c_long(1), ctypes.byref(head))
    return ["seccomp"] if done == 0 else []
