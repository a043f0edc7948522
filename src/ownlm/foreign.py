"""Folders and files that ownlm didn't make: what they are, and which of their files count."""

import json
from contextlib import suppress
from pathlib import Path

from ownlm import hub


def files(path: Path) -> tuple[Path, Path, list[str]]:
    """(where it lies, the folder of its files, their names) of a folder of Hugging Face's layout or a GGUF file."""
    if path.is_file():
        from ownlm import gguf  # brings numpy, which `ownlm --help` does without

        path = path.parent.resolve() / path.name  # not where a link leads: a cache has other names for its files
        return path, path.parent, [part.name for part in gguf.parts(path) if part.is_file()]
    path = path.resolve()
    return path, path, sorted([*hub.beside(path), *(file.name for file in path.glob("*.safetensors"))])


def kind_of(folder: Path) -> str | None:
    """What a folder of Hugging Face's layout is, by its files, or a GGUF file; None when it is none of these."""
    if folder.suffix == ".gguf" and folder.is_file():
        return "checkpoint"
    if (folder / "config.json").is_file() and any(folder.glob("*.safetensors")):
        return "checkpoint"
    if (folder / hub.ADAPTER[0]).is_file():
        return "adapter"
    return "tokenizer" if folder.is_dir() and set(hub.beside(folder)) - set(hub.SETTINGS) else None


def own_code(folder: Path) -> list[str]:
    """The code that a folder's settings name (auto_map), which is never fetched or run."""
    found: set[str] = set()
    for name in ("config.json", "tokenizer_config.json"):
        with suppress(OSError, ValueError, AttributeError, RecursionError):
            if (folder / name).stat().st_size > hub.SETTINGS_BYTES:
                continue
            named = json.loads((folder / name).read_bytes()).get("auto_map") or {}
            found |= {ascii(str(value)[:80])[1:-1] for value in named.values()}
    return sorted(found)[:10]
