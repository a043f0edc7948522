"""Metadata of a GGUF file, read straight from the format's specification; for tests only."""

import struct
from pathlib import Path
from typing import Any

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


def read_metadata(path: Path) -> dict[str, Any]:
    data = path.read_bytes()
    at = 24
    found: dict[str, Any] = {}

    def scalar(code: str) -> Any:
        nonlocal at
        (value,) = struct.unpack_from("<" + code, data, at)
        at += struct.calcsize("<" + code)
        return value

    def value(type: int) -> Any:
        nonlocal at
        if type == 8:
            size = scalar("Q")
            at += size
            return data[at - size : at].decode()
        if type == 9:
            inner, count = scalar("I"), scalar("Q")
            if inner in SCALARS:
                layout = f"<{count}{SCALARS[inner]}"
                at += struct.calcsize(layout)
                return list(struct.unpack_from(layout, data, at - struct.calcsize(layout)))
            return [value(inner) for _ in range(count)]
        return scalar(SCALARS[type])

    assert data[:4] == b"GGUF"
    for _ in range(struct.unpack_from("<Q", data, 16)[0]):
        key = value(8)
        found[key] = value(scalar("I"))
    return found
