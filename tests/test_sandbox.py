"""The confined child: what it must be able to do, and everything else, tried from inside."""

import json
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from ownlm import sandbox
from ownlm.sandbox import Limits, Outcome, run

LIMITS = Limits(memory_bytes=400_000_000, cpu_s=20, wall_s=60, file_bytes=1_000_000)
needs_seccomp = pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() not in sandbox.MACHINES,
    reason="seccomp is of Linux on x86_64 and arm64",
)
# What runs inside: each function gets the bytes of a file and the number of another.
INSIDE = """
import ctypes, os, signal, socket, sys, threading
from ownlm.sandbox import Refused

MACHINE, HERE = os.uname().machine, os.path.dirname(__file__)

def works(data, target):
    os.write(target, bytes(data).upper())
    return {"bytes": len(data), "environment": dict(os.environ), "modules": "site" in sys.modules}

def refuses(data, target):
    raise Refused("not what it should be")

def breaks(data, target):
    return {}["missing"]

def attempt(call):
    try:
        call()
    except OSError as fault:
        return fault.errno
    return 0

def attacks(data, target):
    libc = ctypes.CDLL(None, use_errno=True)
    def raw(number, *arguments):
        return 0 if libc.syscall(ctypes.c_long(number), *arguments) >= 0 else ctypes.get_errno()
    numbers = {"ptrace": (101, 9999, 0, 0, 0), "limits": (302, 0, 9, 0, 0), "io_uring": (425, 1, 0), "x32": (0x40000000 | 39,)}
    tried = {name: raw(*call) for name, call in numbers.items()} if MACHINE == "x86_64" else {}
    return tried | {
        "open": attempt(lambda: open("/etc/passwd")),
        "create": attempt(lambda: open(HERE + "/made", "w")),
        "list": attempt(lambda: os.listdir("/")),
        "socket": attempt(lambda: socket.socket()),
        "fork": attempt(lambda: os.fork() or os._exit(0)),
        "exec": attempt(lambda: os.execv("/bin/true", ["true"])),
        "system": attempt(lambda: os.posix_spawn("/bin/true", ["true"], {})),
        "kill": attempt(lambda: os.kill(os.getppid(), 0)),
        "rename": attempt(lambda: os.rename(HERE + "/attacker.py", HERE + "/made")),
        "link": attempt(lambda: os.symlink("/tmp", HERE + "/link")),
    }

def import_later(data, target):
    import sqlite3
    return {}

def eats(data, target):
    return {"sum": len(bytearray(2_000_000_000))}

def spins(data, target):
    while True:
        pass

def waits(data, target):
    threading.Event().wait()

def writes(data, target):
    while True:
        os.write(target, bytes(100_000))

def floods(data, target):
    while True:
        os.write(1, bytes(1_000_000))

def crashes(data, target):
    ctypes.string_at(0)

def lies(data, target):
    os.write(1, b'[[[[not a report')
    os._exit(0)

def reads_late(data, target):
    os.write(target, b"ready")
    while True:
        data[-1]
"""


@pytest.fixture
def confined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """run() of a function of INSIDE, and what it wrote."""
    root = tmp_path / "root"
    root.mkdir()
    (root / "ownlm").symlink_to(Path(sandbox.__file__).parent)
    (root / "attacker.py").write_text(INSIDE)
    monkeypatch.setattr(sandbox, "ROOT", root)
    monkeypatch.setenv("OWNLM_SECRET", "key")
    (tmp_path / "in").write_bytes(b"hello")

    def call(name: str, limits: Limits = LIMITS) -> tuple[Outcome, bytes]:
        with (tmp_path / "in").open("rb") as source, (tmp_path / "out").open("wb") as target:
            outcome = run(f"attacker:{name}", source.fileno(), target.fileno(), limits)
        return outcome, (tmp_path / "out").read_bytes()

    return call


def limited(**changes: int) -> Limits:
    return Limits(**{name: changes.get(name, getattr(LIMITS, name)) for name in Limits.__slots__})


def test_it_reads_and_writes_and_reports(confined: Any) -> None:
    outcome, written = confined("works")
    assert written == b"HELLO"
    assert outcome.fault == ""
    assert outcome.report["bytes"] == 5
    assert "OWNLM_SECRET" not in outcome.report["environment"]
    assert outcome.report["modules"] is False
    assert outcome.guards[0] == "limits"


def test_what_is_wrong_is_told(confined: Any) -> None:
    assert confined("refuses")[0].fault == "not what it should be"
    assert confined("breaks")[0].fault == "it can't be read (KeyError: 'missing')"
    assert confined("refuses")[0].report is None


@needs_seccomp
def test_nothing_else_is_possible(confined: Any, tmp_path: Path) -> None:
    outcome, _ = confined("attacks")
    assert outcome.guards == ("limits", "seccomp")
    assert outcome.report is not None, outcome.fault
    assert {name: code for name, code in outcome.report.items() if code != 1} == {}  # 1: operation not permitted
    assert len(outcome.report) >= 10
    assert sorted(path.name for path in (tmp_path / "root").iterdir()) == ["attacker.py", "ownlm"]
    assert "sqlite3" in confined("import_later")[0].fault


@pytest.mark.parametrize(
    ("name", "limits", "fault"),
    [
        ("eats", LIMITS, "more memory than"),
        ("spins", limited(cpu_s=1), "more than 1 s of processor time"),
        ("waits", limited(wall_s=1), "more than 1 s"),
        ("writes", LIMITS, "File too large"),
        ("floods", LIMITS, "gave no result"),
        ("crashes", LIMITS, "ended with code -11"),
        ("lies", LIMITS, "gave no result"),
    ],
)
def test_limits(confined: Any, name: str, limits: Limits, fault: str) -> None:
    outcome, written = confined(name, limits)
    assert outcome.report is None
    assert fault in outcome.fault
    assert len(written) <= LIMITS.file_bytes


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path, confined: Any) -> None:
    """The child dies of it, the parent says so."""
    import threading

    (tmp_path / "in").write_bytes(bytes(1_000_000))

    def shrink() -> None:
        until = time.monotonic() + 30
        while time.monotonic() < until and (tmp_path / "out").read_bytes() != b"ready":
            time.sleep(0.01)
        os.truncate(tmp_path / "in", 0)

    (tmp_path / "out").touch()
    thread = threading.Thread(target=shrink)
    thread.start()
    outcome, _ = confined("reads_late")
    thread.join()
    assert "a file became shorter" in outcome.fault


def test_no_child_is_left_behind(confined: Any) -> None:
    import psutil

    confined("waits", limited(wall_s=1))
    mine = psutil.Process().children(recursive=True)
    assert not [child for child in mine if "attacker:waits" in " ".join(child.cmdline())]


def test_the_numbers_of_the_calls() -> None:
    """One number for each call, each once; the bound of a BPF jump holds."""
    for _, seccomp, numbers in sandbox.MACHINES.values():
        assert len(numbers) == len(sandbox.CALLS) == len(set(numbers)) < 250
        assert seccomp not in numbers


@needs_seccomp
@pytest.mark.skipif(platform.machine() != "x86_64", reason="the header that is read is of x86_64")
def test_the_numbers_are_the_systems() -> None:
    header = Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h")
    if not header.is_file():
        pytest.skip("no kernel headers are installed")
    lines = [line.split() for line in header.read_text().splitlines() if line.startswith("#define __NR_")]
    known = {name.removeprefix("__NR_"): int(number) for _, name, number in lines}
    _, seccomp, numbers = sandbox.MACHINES["x86_64"]
    assert [known[name] for name in sandbox.CALLS] == list(numbers)
    assert known["seccomp"] == seccomp


def test_the_report_is_data() -> None:
    """A report that is no object, or has a fault that is no text, counts as none."""
    for said in (b"[1]", b'{"fault": {"a": 1}}', b"[" * 100_000, b"\xff", b""):
        outcome = sandbox._outcome(json.dumps({"guards": ["limits"]}).encode() + b"\n" + said + b"\n", 0, False, LIMITS)
        assert outcome.report is None
        assert "gave no result" in outcome.fault
