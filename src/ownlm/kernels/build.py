"""Compile the kernels: one shared library with a plain C interface, from the C++ beside this file.

The package's own build does it at installation; where that was not possible (a source tree, another processor), `library.py`
does it on first use. Needs nothing but the standard library, so that the package's build can import it alone.
"""

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SOURCES = Path(__file__).parent / "cpu"
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off")
AVX2 = ("-mavx2", "-mfma", "-mf16c")
# One object for each instruction set; which of them runs is decided when the library is loaded.
X86 = {
    "isa_avx512": (*AVX2, *(f"-mavx512{part}" for part in ("f", "bw", "dq", "vl", "vnni", "bf16"))),
    "isa_avxvnni": (*AVX2, "-mavxvnni"),
    "isa_avx2": AVX2,
}
ARM = {
    "isa_neonbf16": ("-march=armv8.2-a+dotprod+bf16",),
    "isa_neondot": ("-march=armv8.2-a+dotprod",),
    "isa_neon": (),
}
COMMON = {"isa_plain": ("-O2", "-Wno-psabi"), "step": (), "lora": (), "pack": (), "api": (), "supported": ()}


def units(machine: str) -> dict[str, tuple[str, ...]]:
    """The sources for a processor, each with its flags. What any processor runs comes first: of a function that several units have
    a copy of, such as a vector's, the linker takes the first, and a newer unit's copy would hold newer instructions."""
    if machine.lower() in ("x86_64", "amd64"):
        return {name: ("-DOWNLM_X86", *flags) for name, flags in (COMMON | X86).items()}
    if machine.lower() in ("aarch64", "arm64"):
        return {name: ("-DOWNLM_ARM", *flags) for name, flags in (COMMON | ARM).items()}
    return dict(COMMON)


def compiler() -> str | None:
    """The C++ compiler's path: `$CXX`, g++, clang++ or c++."""
    return next(
        (found for name in (os.environ.get("CXX"), "g++", "clang++", "c++") if name and (found := shutil.which(name))),
        None,
    )


def file_name() -> str:
    """The library's name holds a hash of all it was made from, so that one of other sources is never taken for it."""
    digest = hashlib.sha256(" ".join((*FLAGS, platform.machine())).encode())
    for path in (Path(__file__), *sorted(SOURCES.iterdir())):
        digest.update(path.name.encode() + path.read_bytes())
    return f"kernels-{digest.hexdigest()[:16]}.so"


def build(folder: Path, extra: tuple[str, ...] = ()) -> Path:
    """Compile into `folder` and return the library's path. Raises OSError or CalledProcessError with the compiler's words."""
    gxx = compiler()
    if gxx is None:
        raise FileNotFoundError("there is no C++ compiler (g++ or clang++)")
    sources = units(platform.machine())
    out = folder / file_name()
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:

        def compile_unit(unit: str) -> str:
            target = f"{scratch}/{unit}.o"
            command = [gxx, *FLAGS, *sources[unit], *extra, "-c", str(SOURCES / f"{unit}.cpp"), "-o", target]
            subprocess.run(command, check=True, capture_output=True, text=True)
            return target

        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            objects = list(pool.map(compile_unit, sources))
        partial = out.with_name(f"{out.name}.{os.getpid()}")
        try:
            subprocess.run(
                [gxx, "-shared", *extra, "-o", str(partial), *objects, "-lpthread"],
                check=True,
                capture_output=True,
                text=True,
            )
            partial.replace(out)
        finally:
            partial.unlink(missing_ok=True)
    return out
