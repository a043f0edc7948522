"""The parent's side of the child that renders strangers' templates (`rendering.py`): started when first needed, one per template,
killed and started anew when it exceeds a limit, gone with its template or with this process."""

import os
import select
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
import markupsafe

from ownlm.errors import UserError
from ownlm.sandbox import ROOT
from ownlm.tokens import rendering

START_S = 60  # importing Jinja takes 0.1 s, on a busy machine with a cold disk much longer
ANSWER_S = 10  # the limit of CPU time ends a template first, unless the machine is busy
MAX_REPLY_BYTES = 6 * rendering.MAX_CHARACTERS + 2**20
CURE = "Use another chat_template.jinja; this one can't be rendered."
# Of site-packages the child sees no more than where Jinja is.
BOOT = "import sys; sys.path += sys.argv[1:]; from ownlm.tokens.rendering import serve; serve(sys.stdin.buffer, sys.stdout.buffer)"
FAULTS = (OSError, ValueError, TypeError, KeyError, AttributeError)  # what an answer that isn't one leads to


class Child:
    """A template in a process of its own. `reply` may be called from any thread."""

    def __init__(self, source: str) -> None:
        self._source = source
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = os.getpid()
        self._stop: weakref.finalize[Any, Child] | None = None
        self._used_s: float | None = None  # processor time of a child that can't limit itself

    def reply(self, request: Mapping[str, Any]) -> rendering.Reply:
        """The template's answer to a request. Raises UserError when it takes too long, too much memory, or breaks down."""
        if self._owner != os.getpid():  # after a fork the pipes are the other process's, and its lock may be held
            self._lock, self._process, self._owner = threading.Lock(), None, os.getpid()
        with self._lock:
            process = self._process or self._start()
            try:
                if self._used_s is not None:
                    rendering.limit_time(process.pid, self._used_s)
                answer: rendering.Reply = rendering.unpack(_exchange(process, rendering.pack(request), ANSWER_S))
                used_s = float(answer.pop("used_s"))
            except FAULTS as fault:
                self.close()
                raise UserError(f"the chat template {_ending(process, fault)}.", cure=CURE) from None
            if answer.get("fault") == "memory":
                self.close()
                raise UserError(
                    f"the chat template takes more than {rendering.MEMORY_BYTES >> 20} MB of memory.", cure=CURE
                )
            self._used_s = None if self._used_s is None else max(self._used_s, used_s)
            return answer

    def close(self) -> None:
        """End the process, if there is one."""
        if self._stop is not None:
            self._stop()
        self._process = self._stop = None

    def _start(self) -> subprocess.Popen[bytes]:
        folders = dict.fromkeys(str(Path(str(module.__file__)).parents[1]) for module in (jinja2, markupsafe))
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", BOOT, str(ROOT), *folders],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={name: os.environ[name] for name in ("TZ", "LD_LIBRARY_PATH") if name in os.environ},
            cwd="/",
            start_new_session=True,  # Ctrl-C in the terminal is for the parent
        )
        os.set_blocking(_pipes(process)[0], False)
        self._process = process
        self._stop = weakref.finalize(self, _end, process, os.getpid())
        try:
            answer = rendering.unpack(_exchange(process, rendering.pack(self._source), START_S))
            self._used_s = float(answer["used_s"]) if answer["filtered"] else None
        except FAULTS as fault:
            self.close()
            raise UserError(
                f"the process that renders chat templates doesn't start: it {_ending(process, fault)}.",
                cure="Try again when the machine is less busy; `ownlm doctor` tells what is in the way.",
            ) from None
        return process


def _end(process: "subprocess.Popen[bytes]", owner: int) -> None:
    if os.getpid() != owner:
        return
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        assert pipe is not None
        try:
            pipe.close()
        except OSError:  # what was still to be written
            continue


def _pipes(process: "subprocess.Popen[bytes]") -> tuple[int, int]:
    assert process.stdin is not None
    assert process.stdout is not None
    return process.stdin.fileno(), process.stdout.fileno()


def _exchange(process: "subprocess.Popen[bytes]", data: bytes, limit_s: float) -> bytes:
    """Send a line and return the line that comes back, within `limit_s`. Raises TimeoutError, OSError or ValueError."""
    into, out = _pipes(process)
    poll = select.poll()
    poll.register(into, select.POLLOUT)
    poll.register(out, select.POLLIN)
    deadline = time.monotonic() + limit_s
    rest, parts, got, size = memoryview(data), [], 0, None
    while size is None or got < size:
        wait_s = deadline - time.monotonic()
        if wait_s <= 0:
            raise TimeoutError
        for file, _ in poll.poll(wait_s * 1000):
            if file == into and rest:
                rest = rest[os.write(into, rest[:65536]) :]
                if not rest:
                    poll.unregister(into)
            elif file == out:
                part = os.read(out, 1 << 20)
                if not part:
                    raise OSError("closed")
                parts.append(part)
                got += len(part)
                if size is None and got >= 8:
                    size = 8 + int.from_bytes(b"".join(parts)[:8], "little")
                    if size > MAX_REPLY_BYTES:
                        raise ValueError("a reply without end")
    return b"".join(parts)[8:size]


def _ending(process: "subprocess.Popen[bytes]", fault: Exception) -> str:
    """Why there is no answer, as the rest of a sentence."""
    if isinstance(fault, TimeoutError):
        return f"takes longer than {ANSWER_S} s"
    if process.returncode == -signal.SIGXCPU:
        return f"takes {rendering.CPU_S} s of processor time and more"
    return f"breaks down (exit code {process.returncode})"
