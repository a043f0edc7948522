import errno
import json
import os
from dataclasses import dataclass

import pytest

from ownlm import artifact as artifacts
from ownlm.artifact import Workspace
from ownlm.errors import ArtifactError, NotFound, StorageFull, UserError


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    name: str = "x"
    size: int = 1


@pytest.fixture
def workspace(tmp_path):
    return Workspace(tmp_path / "ws")


def make(workspace, name="village", text="hello", inputs=None, recipe=None, kind="documents"):
    with workspace.create(kind, name, inputs=inputs or {}, recipe=recipe or Recipe(), seed=3) as draft:
        (draft.path / "sub").mkdir()
        (draft.path / "sub" / "a.txt").write_text(text)
        draft.facts["count"] = 1
    return draft.done


def test_versions_lineage_and_facts(workspace):
    first = make(workspace)
    second = make(workspace, text="other", inputs={"base": first})
    assert (first.ref, second.ref) == ("village@1", "village@2")
    opened = workspace.open("village")
    assert opened.ref == "village@2"
    assert opened.manifest.inputs["base"] == {"ref": "village@1", "kind": "documents", "digest": first.digest}
    assert opened.facts == {"count": 1}
    assert opened.file("sub/a.txt").read_text() == "other"
    assert [one.ref for one in workspace.all()] == ["village@1", "village@2"]


def test_digest_depends_on_content_only(workspace):
    assert make(workspace, name="a").digest == make(workspace, name="b").digest != make(workspace, text="?").digest


def test_find_needs_the_same_inputs_recipe_and_seed(workspace):
    made = make(workspace, recipe=Recipe(size=2))
    find = lambda **change: workspace.find(
        "village", **({"kind": "documents", "inputs": {}, "recipe": Recipe(size=2), "seed": 3} | change)
    )
    assert find().ref == made.ref
    assert find(seed=4) is None
    assert find(recipe=Recipe(size=3)) is None
    assert find(inputs={"documents": made}) is None


def test_nothing_is_left_after_an_error(workspace):
    with (
        pytest.raises(RuntimeError),
        workspace.create("documents", "village", inputs={}, recipe=Recipe()) as draft,
    ):
        (draft.path / "a.txt").write_text("half")
        raise RuntimeError
    assert workspace.all() == []
    assert list(workspace.artifacts.rglob("*")) == []


def test_full_disk_is_one_clear_error_and_leaves_the_old_version(workspace):
    make(workspace)
    with (
        pytest.raises(StorageFull, match="the disk is full"),
        workspace.create("documents", "village", inputs={}, recipe=Recipe()),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert workspace.open("village").ref == "village@1"
    with pytest.raises(StorageFull, match=r"are free and 9000000.0 TB are needed"):
        artifacts.require_space(workspace.root, 9 * 10**18)


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda file: file.write_bytes(b"hellp"), "does not match its checksum"),
        (lambda file: file.write_bytes(b"hell"), "has 4 bytes instead of 5"),
        (lambda file: file.unlink(), "is missing"),
        (lambda file: (file.unlink(), file.symlink_to("/etc/hostname")), "leaves the artifact"),
    ],
)
def test_every_damage_is_found_before_use(workspace, damage, sentence):
    damage(make(workspace).path / "sub" / "a.txt")
    with pytest.raises(ArtifactError, match=sentence):
        Workspace(workspace.root).open("village")


def test_a_changed_manifest_is_refused(workspace):
    path = make(workspace).path / "manifest.json"
    data = json.loads(path.read_text())
    path.write_text(json.dumps(data | {"files": {"../../../../secret": {"sha256": "", "bytes": 0}}}))
    with pytest.raises(ArtifactError, match="changed after it was written"):
        workspace.open("village")
    path.write_text("{")
    with pytest.raises(ArtifactError, match="not a manifest"):
        workspace.open("village")


def test_unknown_names_versions_kinds(workspace):
    make(workspace)
    with pytest.raises(NotFound, match="Did you mean village"):
        workspace.open("vilage")
    with pytest.raises(NotFound, match="Versions of village: 1"):
        workspace.open("village@7")
    with pytest.raises(ArtifactError, match="a checkpoint artifact is needed"):
        workspace.open("village", "checkpoint")
    with pytest.raises(NotFound):
        workspace.open("../ws")


@pytest.mark.parametrize("name", ["", "../up", "a/b", ".hidden", "a" * 101, "trailing.", "a@1"])
def test_names_that_are_no_directory_names(workspace, name):
    with (
        pytest.raises(UserError, match="can't be a name"),
        workspace.create("documents", name, inputs={}, recipe=Recipe()),
    ):
        pass


def test_remove_is_refused_while_in_use(workspace):
    first = make(workspace)
    make(workspace, name="tokens", inputs={"documents": first}, kind="tokens")
    with pytest.raises(UserError, match=r"village@1 is an input of tokens@1"):
        workspace.remove("village")
    workspace.remove("tokens")
    workspace.remove("village")
    assert workspace.all() == []


def test_abandoned_drafts_are_swept(workspace):
    gone = workspace.artifacts / "village" / ".draft-999999999-abc"
    gone.mkdir(parents=True)
    alive = workspace.artifacts / "village" / f".draft-{os.getpid()}-abc"
    alive.mkdir()
    make(workspace)
    assert not gone.exists()
    assert alive.exists()


def test_write_atomic_replaces_and_leaves_no_trace(tmp_path):
    artifacts.write_atomic(tmp_path / "a", "one")
    artifacts.write_atomic(tmp_path / "a", b"two")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_text() == "two"
