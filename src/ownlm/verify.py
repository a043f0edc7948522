"""Whether the files of an artifact are those that its manifest lists: read through in a thread, while something else is done."""

import threading
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from ownlm.errors import ArtifactError
from ownlm.storage import sha256


class Check:
    """Begins when it is made; `wait` ends when every file was read and raises ArtifactError that names each bad one."""

    def __init__(self, artifact: Path, folder: Path, files: Mapping[str, Mapping[str, Any]]) -> None:
        """`artifact` is what is wrong then, `folder` where its files are; path -> {"sha256": …, "bytes": …}."""
        self.artifact, self.folder, self.files = artifact, folder, files
        self._faults: list[str] = []
        self._raised: Exception | None = RuntimeError("the check did not end")
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def wait(self) -> None:
        self._thread.join()
        if self._raised is not None:
            raise self._raised
        if self._faults:
            cure = "Nothing was loaded. Make it again with its stage, or restore the file from a copy."
            raise ArtifactError(f"damaged: {'; '.join(self._faults)}.", where=str(self.artifact), cure=cure)

    def _run(self) -> None:
        try:
            for name, entry in self.files.items():
                if fault := self._fault(self.folder / name, name, entry):
                    self._faults.append(fault)
            self._raised = None
        except OSError as fault:
            self._raised = fault

    def _fault(self, path: Path, name: str, entry: Mapping[str, Any]) -> str:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or path.is_symlink():
            return f"{name} leaves the artifact"
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != entry["bytes"]:
            return f"{name} has {path.stat().st_size} bytes instead of {entry['bytes']}"
        return "" if sha256(path) == entry["sha256"] else f"{name} does not match its checksum"
