from dataclasses import dataclass

import pytest

from ownlm.artifact import Workspace
from ownlm.lineage import lineage, tree


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    name: str = "x"


@pytest.fixture
def chain(tmp_path):
    workspace = Workspace(tmp_path)
    made = []
    for kind in ("documents", "tokenizer", "checkpoint"):
        inputs = {one.kind: one for one in made}
        with workspace.create(kind, f"a-{kind}", inputs=inputs, recipe=Recipe()) as draft:
            (draft.path / "file").write_text(kind)
        made.append(draft.done)
    return workspace, made


def test_back_to_the_documents(chain):
    workspace, made = chain
    found = [(one.depth, one.role, one.ref, one.state) for one in lineage(workspace, made[-1])]
    assert found == [
        (0, "", "a-checkpoint@1", "here"),
        (1, "documents", "a-documents@1", "here"),
        (1, "tokenizer", "a-tokenizer@1", "here"),
        (2, "documents", "a-documents@1", "here"),
    ]
    assert tree(lineage(workspace, made[-1])).splitlines()[1].startswith("  documents: a-documents@1  documents  ")


def test_an_input_that_is_gone_or_damaged_says_so(chain):
    workspace, made = chain
    (made[0].path / "file").write_text("DOCUMENTS")
    (made[1].path / "manifest.json").unlink()
    (made[1].path / "file").unlink()
    made[1].path.rmdir()
    states = {one.ref: one.state for one in lineage(Workspace(workspace.root), made[2])}
    assert states == {"a-checkpoint@1": "here", "a-documents@1": "damaged", "a-tokenizer@1": "gone"}
