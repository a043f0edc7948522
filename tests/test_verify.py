"""Files are read through ahead of their use; what is wrong with them is told when they are opened, and only then."""

from pathlib import Path

import pytest

from ownlm.artifact import Workspace
from ownlm.errors import ArtifactError
from ownlm.storage import sha256
from ownlm.verify import Check
from test_artifact import make


def test_damage_is_told_when_it_is_opened(tmp_path: Path) -> None:
    made = make(Workspace(tmp_path))
    workspace = Workspace(tmp_path)
    workspace.check_ahead("village")
    assert workspace.open("village").digest == made.digest
    made.file("sub/a.txt").write_text("hellp")
    again = Workspace(tmp_path)
    again.check_ahead("village")
    for _ in range(2):  # the second time from its beginning
        with pytest.raises(ArtifactError, match=r"sub/a\.txt does not match its checksum"):
            again.open("village")


@pytest.mark.parametrize("ref", ["nothing", "village@7", "hf:owner/name", "../x.gguf", "a folder"])
def test_what_cant_be_opened_is_no_business_of_the_check(ref: str, tmp_path: Path) -> None:
    make(Workspace(tmp_path))
    Workspace(tmp_path).check_ahead(ref)


def test_a_file_that_cant_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x").write_bytes(b"1")
    entry = {"sha256": sha256(tmp_path / "x"), "bytes": 1}
    Check(tmp_path, tmp_path, {"x": entry}).wait()

    def fails(path: Path) -> str:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("ownlm.verify.sha256", fails)
    with pytest.raises(OSError, match="Input/output"):
        Check(tmp_path, tmp_path, {"x": entry}).wait()
