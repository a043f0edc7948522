"""Every instruction set against the plain one, those that this processor lacks too: ARM's under qemu, AVX-VNNI's in AVX-512's encoding.

The driver is against_plain.cpp. It is compiled with the very flags of the package's build.
"""

import platform
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ownlm.kernels import build, library

DRIVER = Path(__file__).with_name("against_plain.cpp")
ARM_COMPILER, QEMU = "aarch64-linux-gnu-g++", "qemu-aarch64"
NAMES = {name.removeprefix("isa_") for name in (*build.ARM, *build.X86, *build.COMMON) if name.startswith("isa_")}
pytestmark = pytest.mark.timeout(600)  # compilers on a busy machine


def driver(compiler: str, machine: str, out: Path, flags: dict[str, tuple[str, ...]] | None = None) -> Path:
    """The driver for a processor, as a program. `flags` stand in for those of some units."""
    units = build.units(machine) | (flags or {})
    shared = ("-std=c++17", "-O2", "-ffp-contract=off", f"-I{build.SOURCES}")  # as FLAGS, in half the time to compile

    def compile_unit(source: Path, own: tuple[str, ...]) -> str:
        target = str(out / f"{source.stem}.o")
        subprocess.run([compiler, *shared, *own, "-c", str(source), "-o", target], check=True)
        return target

    sources = {build.SOURCES / f"{unit}.cpp": own for unit, own in units.items() if unit not in ("step", "lora", "api")}
    sources[DRIVER] = units["pack"]
    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_unit, sources, sources.values()))
    program = out / "against_plain"
    subprocess.run([compiler, "-static", "-o", str(program), *objects, "-lpthread"], check=True)
    return program


def run(*command: str) -> list[str]:
    """What the driver found, after its last line was looked at: the instruction sets of the processor, then a line a check."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, "\n".join(line for line in done.stdout.splitlines() if "FAULT" in line) + done.stderr
    lines = done.stdout.splitlines()
    assert lines[-1] == "0 faults"
    return lines


def tables(lines: list[str]) -> set[str]:
    """The instruction sets that were compared."""
    return {line.split()[0] for line in lines[1:-1]}


@pytest.fixture(scope="module")
def arm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    missing = [name for name in (ARM_COMPILER, QEMU) if shutil.which(name) is None]
    if missing:
        pytest.skip(f"{' and '.join(missing)} not installed (Debian: g++-aarch64-linux-gnu, qemu-user)")
    return driver(ARM_COMPILER, "aarch64", tmp_path_factory.mktemp("arm"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processor", "expected"),
    [
        ("cortex-a53", ["neon", "plain"]),
        ("neoverse-n1", ["neondot", "neon", "plain"]),
        ("max", ["neonbf16", "neondot", "neon", "plain"]),
    ],
)
def test_arm_under_qemu(arm: Path, processor: str, expected: list[str]) -> None:
    """Which sets a processor is said to have, and that it can run those: an instruction that it lacks would end the program."""
    lines = run(QEMU, "-cpu", processor, str(arm))
    assert lines[0].split() == expected
    assert tables(lines) == set(expected)


@pytest.fixture(scope="module")
def x86(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """AVX-VNNI's product and AVX-512 VNNI's of 256 bits are the same, in two encodings; few processors have both."""
    compiler = build.compiler()
    if platform.machine() not in ("x86_64", "AMD64") or compiler is None:
        pytest.skip("no x86 processor or no compiler")
    encoded = ("-D__AVXVNNI__", "-D_mm256_dpbusd_avx_epi32=_mm256_dpbusd_epi32", "-mavx512vnni", "-mavx512vl")
    flags = {"isa_avxvnni": ("-DOWNLM_X86", *build.AVX2, *encoded)}
    return driver(compiler, "x86_64", tmp_path_factory.mktemp("x86"), flags)


@pytest.mark.slow
def test_this_processor(x86: Path) -> None:
    lines = run(str(x86))
    assert lines[0].split() == list(library.instruction_sets())
    assert tables(lines) == set(library.instruction_sets())


@pytest.mark.slow
def test_avx_vnni_in_the_encoding_of_avx512(x86: Path) -> None:
    if "avx512" not in library.instruction_sets():
        pytest.skip("this processor has no AVX-512 VNNI")
    assert tables(run(str(x86), "avxvnni")) == {"avxvnni"}
