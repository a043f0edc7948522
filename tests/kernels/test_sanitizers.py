"""The kernels under AddressSanitizer and UndefinedBehaviorSanitizer: nothing is read or written beyond its end."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ownlm.kernels import build, library

CHILD = Path(__file__).with_name("sanitized_child.py")
FLAGS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-O1", "-g")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),  # the processes of a sanitizer are slow to begin
    pytest.mark.skipif(library.library() is None, reason=f"no native kernels: {library.missing()}"),
]


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a process that runs the sanitized library."""
    compiler = build.compiler()
    runtime = compiler and subprocess.run([compiler, "-print-file-name=libasan.so"], capture_output=True, text=True)
    if not runtime or not Path(path := runtime.stdout.strip()).is_absolute():
        pytest.skip("the compiler has no AddressSanitizer")
    home = tmp_path_factory.mktemp("sanitized")
    build.build(home / "ownlm", extra=FLAGS).rename(home / "ownlm" / "sanitized.so")
    # Python keeps what it allocated until it ends, which is no leak of ours.
    options = {
        "LD_PRELOAD": path,
        "ASAN_OPTIONS": "detect_leaks=0",
        "PYTHONMALLOC": "malloc",
        "XDG_CACHE_HOME": str(home),
    }
    return os.environ | options | {"UBSAN_OPTIONS": "print_stacktrace=1", "OWNLM_KERNELS": ""}


def run(environment: dict[str, str], *arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, str(CHILD), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)


@pytest.mark.parametrize("instruction_set", library.instruction_sets())
def test_steps_are_clean(instruction_set: str, sanitized: dict[str, str]) -> None:
    done = run(sanitized, instruction_set)
    assert done.stdout == "clean\n", done.stderr[-4000:]


def test_the_sanitizers_watch(sanitized: dict[str, str]) -> None:
    done = run(sanitized, library.instruction_sets()[0], "overrun")
    assert done.returncode != 0
    assert "ERROR: AddressSanitizer" in done.stderr
