"""Models of a hub, against the stand-in of hub.py: what is downloaded, what is refused, what goes on after a break."""

import io
import json
import shlex
import shutil
import threading
import tomllib
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import torch

import ownlm
from hub import Hub
from ownlm import cli, device, hub, lineage, storage, transfer
from ownlm.artifact import Artifact, Workspace
from ownlm.checkpoints.weights import save_model
from ownlm.errors import ArtifactError, Interrupted, NotFound, StorageFull, UserError
from ownlm.formats.tensorfile import INDEX, write_shards
from ownlm.report import Reporter
from ownlm.tokens.codec import Tokenizer
from ownlm.train.stages import FinetuneRecipe, finetune, pretrain
from ownlm.transfer import Away
from tiny import tiny_model
from train.worlds import prepared, recipe

REPO = "village/tiny"
BLOB = "model.safetensors"


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a tiny model, and what else lies in a repository."""
    folder = tmp_path_factory.mktemp("checkpoint")
    model = tiny_model()
    save_model(model.decoder, folder)
    model.tokenizer.save(folder)
    files = {file.name: file.read_bytes() for file in folder.iterdir()}
    others = (
        "pytorch_model.bin",
        "modeling_tiny.py",
        "README.md",
        ".gitattributes",
        "onnx/model.onnx",
        "consolidated.safetensors",
    )
    return files | dict.fromkeys(others, b"not for us")


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return told(tmp_path / "home")


def told(root: Path) -> Workspace:
    """A workspace whose reporter's lines are in `reporter.out`."""
    return Workspace(root, Reporter(out=io.StringIO()))


def said(workspace: Workspace) -> str:
    assert isinstance(workspace.reporter.out, io.StringIO)
    return workspace.reporter.out.getvalue()


def belongs(name: str) -> bool:
    return name in hub.SETTINGS or hub.VOCABULARY.fullmatch(name) is not None


def contents(served: Hub, file: str = BLOB) -> list[Any]:
    """The requests for the content of a file."""
    return [one for one in served.asked(f"/{file}") if one.status in (200, 206, 503)]


# ── References ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("ref", "repo", "revision", "name"),
    [
        ("hf:a/b", "a/b", "main", "a--b"),
        ("hf:Qwen/Qwen3-0.6B@main", "Qwen/Qwen3-0.6B", "main", "Qwen--Qwen3-0.6B"),
        ("hf:a_1/b.c@v1.0", "a_1/b.c", "v1.0", "a_1--b.c"),
        ("hf:a/b@refs/pr/1", "a/b", "refs/pr/1", "a--b"),
        (f"hf:a/b@{'0' * 40}", "a/b", "0" * 40, "a--b"),
    ],
)
def test_references(ref: str, repo: str, revision: str, name: str) -> None:
    source = hub.parse(ref)
    assert source is not None
    assert (source.repo, source.revision, source.name) == (repo, revision, name)
    assert hub.parse(str(source)) == source
    assert source.pinned == (len(revision) == 40)


@pytest.mark.parametrize(
    "ref",
    [
        "hf:", "hf:gpt2", "hf:a/b/c", "hf:../b", "hf:a/..", "hf:/etc/passwd", "hf:a/b@", "hf:a/b@../x", "hf:a/b@a..b", "hf:a/b@/x",
        "hf:a--b/c", "hf:a/b c", "hf:a/b\n", "hf:a/b?x=1", "hf:a/b#x", "hf:a/b@x?y", "hf:a/%2e%2e", "hf:.a/b", f"hf:a/{'b' * 200}",
        "hf:\x1b[2J/b",
    ],
)  # fmt: skip
def test_references_that_are_none(ref: str, workspace: Workspace) -> None:
    with pytest.raises(UserError, match="is not a reference to a model of a hub") as caught:
        workspace.open(ref)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("ref", ["village", "village@1", "/a/b", "./hf:a/b", "HF:a/b", "a/b"])
def test_other_references_are_not_the_hubs(ref: str) -> None:
    assert hub.parse(ref) is None


# ── What is downloaded ───────────────────────────────────────────────────────────────────────────────────────────────


def test_load(served: Hub, checkpoint: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OWNLM_HOME", str(tmp_path / "home"))
    served.repo(REPO, checkpoint)
    model = ownlm.load(f"hf:{REPO}")
    ids = torch.arange(20)[None]
    assert torch.equal(model.logits(ids), tiny_model().logits(ids))
    assert model.tokenizer.decode(model.tokenizer.encode("Anna")) == "Anna"
    assert model.name == "village--tiny"
    assert model.ref == "village--tiny@1"
    assert torch.equal(ownlm.load("village--tiny").logits(ids), model.logits(ids))


def test_the_artifact(served: Hub, checkpoint: dict[str, bytes], workspace: Workspace) -> None:
    repo = served.repo(REPO, checkpoint)
    repo.licence = "mit"
    repo.commit(checkpoint | {"modules.json": b"[]", "1_Pooling/config.json": b"{}", "2_Dense/config.json": b"{}"})
    checkpoint = repo.commits[repo.refs["main"]]
    made = workspace.open(f"hf:{REPO}", "checkpoint")
    commit = repo.refs["main"]
    assert (made.kind, made.ref, made.source) == ("checkpoint", "village--tiny@1", f"hf:{REPO}@{commit}")
    assert made.facts == {"source": f"hf:{REPO}@{commit}", "licence": "mit"}
    assert made.manifest.recipe == {
        "name": "village--tiny", "source": f"hf:{REPO}@{commit}", "revision": "main", "endpoint": served.address,
    }  # fmt: skip
    wanted = {name for name in checkpoint if belongs(name) or name == BLOB}
    assert {"config.json", "tokenizer.json", "chat_template.jinja", "1_Pooling/config.json", BLOB} <= wanted
    assert set(made.manifest.files) == wanted
    assert all((made.path / name).read_bytes() == checkpoint[name] for name in wanted)
    assert not list((workspace.root / "hub").iterdir())
    assert "licence: mit" in said(workspace)
    assert f"from {served.address}" in said(workspace)


def test_nothing_else_is_asked_or_told(served: Hub, checkpoint: dict[str, bytes], workspace: Workspace) -> None:
    """No pickle, no code, no other weights; and nothing of this machine goes out."""
    served.repo(REPO, checkpoint)
    made = workspace.open(f"hf:{REPO}")
    names = {urlsplit(one.path).path.rpartition("/")[2] for one in served.requests}
    assert names == {*made.manifest.files, "main"}
    for one in served.requests:
        assert one.headers["user-agent"].startswith(f"ownlm/{ownlm.__version__}; hf_hub/")
        assert "torch" not in one.headers["user-agent"]
        assert "agent/" not in one.headers["user-agent"]
        assert "authorization" not in one.headers


def test_shards(served: Hub, checkpoint: dict[str, bytes], workspace: Workspace, tmp_path: Path) -> None:
    write_shards(tmp_path, dict(tiny_model().decoder.state_dict()), max_bytes=20_000)
    files = {file.name: file.read_bytes() for file in tmp_path.iterdir() if file.is_file()}
    assert len(files) > 3
    others = {name: data for name, data in checkpoint.items() if name != BLOB}
    served.repo(REPO, others | files)
    made = workspace.open(f"hf:{REPO}", "checkpoint")
    assert set(files) < set(made.manifest.files)
    ids = torch.arange(20)[None]
    assert torch.equal(ownlm.load(made.ref, workspace=workspace).logits(ids), tiny_model().logits(ids))


def test_a_tokenizer_without_weights(served: Hub, checkpoint: dict[str, bytes], workspace: Workspace) -> None:
    served.repo(REPO, checkpoint)
    kinds = ("tokenizer", "checkpoint")
    made = workspace.open(f"hf:{REPO}", kinds)
    assert (made.kind, made.ref) == ("tokenizer", "village--tiny--tokenizer@1")
    assert BLOB not in made.manifest.files
    assert Tokenizer.load(made.path).encode("a")
    assert workspace.open(f"hf:{REPO}", "checkpoint").kind == "checkpoint"
    asked = len(served.requests)
    assert workspace.open(f"hf:{REPO}", kinds).ref in ("village--tiny--tokenizer@1", "village--tiny@1")
    assert len(served.requests) == asked


def test_an_adapter(served: Hub, checkpoint: dict[str, bytes], workspace: Workspace) -> None:
    served.repo(
        REPO, {"adapter_config.json": b"{}", "adapter_model.safetensors": checkpoint[BLOB], "adapter_model.bin": b"x"}
    )
    made = workspace.open(f"hf:{REPO}", "adapter")
    assert set(made.manifest.files) == {"adapter_config.json", "adapter_model.safetensors"}


# ── What is here already ─────────────────────────────────────────────────────────────────────────────────────────────


def test_a_pinned_commit_needs_no_network(served: Hub, checkpoint: dict[str, bytes], workspace: Workspace) -> None:
    repo = served.repo(REPO, checkpoint)
    pinned = f"hf:{REPO}@{repo.refs['main']}"
    made = workspace.open(pinned)
    served.requests.clear()
    assert Workspace(workspace.root).open(pinned).ref == made.ref
    assert Workspace(workspace.root).open(made.ref).ref == made.ref
    assert served.requests == []
    assert Workspace(workspace.root).open(f"hf:{REPO}").ref == made.ref  # a branch is asked for, its content is here
    assert [urlsplit(one.path).path for one in served.requests] == [f"/api/models/{REPO}/revision/main"]


def test_a_branch_that_moved(served: Hub, checkpoint: dict[str, bytes], workspace: Workspace) -> None:
    repo = served.repo(REPO, checkpoint)
    first = workspace.open(f"hf:{REPO}")
    repo.commit(checkpoint | {"generation_config.json": b'{"a": 1}'})
    assert workspace.open(f"hf:{REPO}").ref == first.ref  # within one process a reference means one thing
    later = told(workspace.root)
    second = later.open(f"hf:{REPO}")
    assert (first.version, second.version) == (1, 2)
    assert later.open(first.source).ref == first.ref
    repo.commit(checkpoint, "old")
    assert told(workspace.root).open(f"hf:{REPO}@old").ref == first.ref
    assert workspace.remove(second.ref).ref == second.ref


def test_without_a_network(
    served: Hub, checkpoint: dict[str, bytes], workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    served.repo(REPO, checkpoint).commit(checkpoint | {"generation_config.json": b"{}"}, "v2")
    made = workspace.open(f"hf:{REPO}")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    later = told(workspace.root)
    assert later.open(f"hf:{REPO}").ref == made.ref
    assert "can't be reached (ConnectError)" in said(later)
    assert f"is used: {made.source}" in said(later)
    with pytest.raises(Away, match=f"can't be reached.*Here already: {made.source}"):
        told(workspace.root).open(f"hf:{REPO}@v2")
    with pytest.raises(Away, match=r"127\.0\.0\.1:9 can't be reached.*Check the network"):
        told(workspace.root).open("hf:other/model")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(Away, match="HF_HUB_OFFLINE is set"):
        told(workspace.root).open("hf:other/model")


# ── Breaks ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "CHUNK_BYTES", 1000)


@pytest.mark.usefixtures("small_chunks")
def test_a_broken_download_goes_on(served: Hub, checkpoint: dict[str, bytes], workspace: Workspace) -> None:
    repo = served.repo(REPO, checkpoint)
    repo.cut_after = [5000, 7000, 0]
    made = workspace.open(f"hf:{REPO}")
    assert made.file(BLOB).read_bytes() == checkpoint[BLOB]
    starts = [one.headers.get("range") for one in contents(served)]
    assert starts == [None, "bytes=5000-", "bytes=12000-", "bytes=12000-"]


@pytest.mark.usefixtures("small_chunks")
def test_the_next_process_goes_on(served: Hub, checkpoint: dict[str, bytes], workspace: Workspace) -> None:
    repo = served.repo(REPO, checkpoint)
    repo.cut_after = [9000, *[0] * 20]
    with pytest.raises(Away):
        workspace.open(f"hf:{REPO}")
    assert not workspace.all()
    repo.cut_after = []
    served.requests.clear()
    made = told(workspace.root).open(f"hf:{REPO}")
    assert made.file(BLOB).read_bytes() == checkpoint[BLOB]
    assert [one.headers.get("range") for one in contents(served)] == ["bytes=9000-"]
    assert not served.asked("config.json")  # what was whole is kept


@pytest.mark.usefixtures("small_chunks")
def test_what_was_left_of_a_crash_is_not_trusted(
    served: Hub, checkpoint: dict[str, bytes], workspace: Workspace
) -> None:
    """After a power cut a file can hold zeros where its end should be."""
    repo = served.repo(REPO, checkpoint)
    repo.cut_after = [9000, *[0] * 20]
    with pytest.raises(Away):
        workspace.open(f"hf:{REPO}")
    repo.cut_after = []
    (part,) = (workspace.root / "hub").rglob("*.part")
    part.write_bytes(part.read_bytes()[:4000] + bytes(8000))
    (config,) = (workspace.root / "hub").rglob("config.json")
    config.write_bytes(b"{")
    served.requests.clear()
    made = told(workspace.root).open(f"hf:{REPO}")
    assert made.file(BLOB).read_bytes() == checkpoint[BLOB]
    assert made.file("config.json").read_bytes() == checkpoint["config.json"]
    assert [one.headers.get("range") for one in contents(served)] == ["bytes=12000-", None]


@pytest.mark.usefixtures("small_chunks")
def test_a_server_without_ranges(served: Hub, checkpoint: dict[str, bytes], workspace: Workspace) -> None:
    repo = served.repo(REPO, checkpoint)
    repo.cut_after, repo.no_ranges = [5000], True
    assert workspace.open(f"hf:{REPO}").file(BLOB).read_bytes() == checkpoint[BLOB]
    assert [one.status for one in contents(served)] == [200, 200]


def test_a_busy_server(served: Hub, checkpoint: dict[str, bytes], workspace: Workspace) -> None:
    repo = served.repo(REPO, checkpoint)
    repo.busy = 3
    workspace.open(f"hf:{REPO}")
    repo.commit(checkpoint | {"config.json": b"{}"})
    repo.busy = 1000
    with pytest.raises(Away, match=r"answers 503.*what has arrived is kept"):
        told(workspace.root).open(f"hf:{REPO}")


@pytest.mark.usefixtures("small_chunks")
def test_ctrl_c(
    served: Hub, checkpoint: dict[str, bytes], workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    served.repo(REPO, checkpoint)

    def stop(self: hub.Progress, count: int) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(Interrupted, match="The same command goes on"):
        patched.setattr(hub.Progress, "add", stop)
        workspace.open(f"hf:{REPO}")
    assert workspace.open(f"hf:{REPO}").file(BLOB).read_bytes() == checkpoint[BLOB]


def test_two_at_once_download_once(served: Hub, checkpoint: dict[str, bytes], tmp_path: Path) -> None:
    served.repo(REPO, checkpoint)
    made: list[Artifact] = []
    threads = [threading.Thread(target=lambda: made.append(told(tmp_path).open(f"hf:{REPO}"))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [one.ref for one in made] == ["village--tiny@1"] * 3
    assert len(contents(served)) == 1


def test_a_full_disk_is_known_before(
    served: Hub, checkpoint: dict[str, bytes], workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    served.repo(REPO, checkpoint)
    monkeypatch.setattr(storage, "free_bytes", lambda _: 1000)
    with pytest.raises(StorageFull, match="are needed"):
        workspace.open(f"hf:{REPO}")
    assert [urlsplit(one.path).path for one in served.requests] == [f"/api/models/{REPO}/revision/main"]


# ── Refusals ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_what_the_hub_refuses(
    served: Hub, checkpoint: dict[str, bytes], workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    repo = served.repo(REPO, checkpoint)
    with pytest.raises(
        NotFound, match=r"hf:no/such@main: there is no such model, or it is private\. Check the spelling"
    ):
        workspace.open("hf:no/such")
    with pytest.raises(NotFound, match="no branch, tag or commit v9"):
        workspace.open(f"hf:{REPO}@v9")
    repo.private = True
    with pytest.raises(NotFound, match="private"):
        workspace.open(f"hf:{REPO}")
    repo.private, repo.gated = False, True
    with pytest.raises(
        UserError, match=f"accept its terms. Accept its terms on {served.address}/{REPO}, then set HF_TOKEN"
    ):
        workspace.open(f"hf:{REPO}")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(UserError, match=r"the hub refuses \(401\).*HF_TOKEN") as caught:
        workspace.open(f"hf:{REPO}")
    assert "hf_wrong" not in str(caught.value)
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    made = workspace.open(f"hf:{REPO}")
    sent = [one for one in served.requests if one.headers.get("authorization") == "Bearer hf_right"]
    assert {one.origin for one in sent} == {"hub"}
    assert [one for one in served.requests if one.origin == "cdn"]
    assert "hf_right" not in (made.path / "manifest.json").read_text() + said(workspace)


def test_the_token_does_not_go_out_in_the_clear(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("HF_ENDPOINT", "http://mirror.example")
    with pytest.raises(UserError, match="unencrypted") as caught:
        device.hub()
    assert "hf_secret" not in str(caught.value)
    for address in ("ftp://a", "mirror.example", "https://user:pw@mirror.example", "https://", "javascript:x"):
        monkeypatch.setenv("HF_ENDPOINT", address)
        with pytest.raises(UserError, match="HF_ENDPOINT is"):
            device.hub()
    monkeypatch.setenv("HF_ENDPOINT", "https://mirror.example/hf/")
    assert device.hub() == ("https://mirror.example/hf", "hf_secret")


def test_content_that_is_not_what_was_announced(served: Hub, checkpoint: dict[str, bytes], tmp_path: Path) -> None:
    repo = served.repo(REPO, checkpoint)
    for name in (BLOB, "tokenizer.json"):
        workspace = told(tmp_path / name)
        repo.wrong = {name}
        with pytest.raises(ArtifactError, match=f"the content of {name} is not what the hub announced"):
            workspace.open(f"hf:{REPO}")
        assert not workspace.all()
        assert not [path for path in (workspace.root / "hub").rglob(f"{name}*") if path.is_file()]
        repo.wrong = set()
        assert workspace.open(f"hf:{REPO}").file(name).read_bytes() == checkpoint[name]
    repo.too_long = True
    with pytest.raises(ArtifactError, match="longer than"):
        told(tmp_path / "long").open(f"hf:{REPO}")


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"rfilename": BLOB, "size": 10}, "no checksum"),
        ({"rfilename": BLOB, "size": 10, "blobId": "x"}, "no checksum"),
        ({"rfilename": BLOB, "size": -1, "blobId": "0" * 40}, "a size of -1"),
        ({"rfilename": BLOB, "size": None, "blobId": "0" * 40}, "a size of None"),
        ({"rfilename": BLOB, "size": "10", "blobId": "0" * 40}, "a size of 10"),
        ({"rfilename": BLOB, "size": 10**15, "blobId": "0" * 40}, "a size of"),
        ({"rfilename": "config.json", "size": 11_000_000, "blobId": "0" * 40}, "a size of"),
        ({"rfilename": "tokenizer.json", "size": 10**9, "blobId": "0" * 40}, "a size of"),
        ({"rfilename": "qwen.tiktoken", "size": 10**9, "blobId": "0" * 40}, "a size of"),
        ({"rfilename": INDEX, "size": 31_000_000, "blobId": "0" * 40}, "a size of"),
        ({"rfilename": BLOB, "lfs": {"sha256": "../../x", "size": 1, "pointerSize": 1}}, "no checksum"),
        ({"rfilename": BLOB, "lfs": {"size": 1}}, "doesn't speak the hub's API"),
        ({"size": 1}, "doesn't speak the hub's API"),
        ("config.json", "doesn't speak the hub's API"),
    ],
)  # fmt: skip
def test_a_listing_that_lies(
    served: Hub, checkpoint: dict[str, bytes], workspace: Workspace, entry: Any, message: str
) -> None:
    served.repo(REPO, checkpoint).listed = [entry]
    with pytest.raises(UserError, match=message):
        workspace.open(f"hf:{REPO}")
    assert not contents(served)


def test_names_that_climb_are_never_asked_for(served: Hub, checkpoint: dict[str, bytes], workspace: Workspace) -> None:
    climbing = [
        "../config.json",
        "/etc/config.json",
        "a/../../tokenizer.json",
        "..\\x.safetensors",
        "sub/config.json",
        "\x1b[2J.tiktoken",
    ]
    served.repo(REPO, checkpoint).listed = [
        {"rfilename": name, "size": 4, "blobId": "0" * 40, "lfs": {"sha256": "0" * 64, "size": 4, "pointerSize": 1}}
        for name in climbing
    ]
    made = workspace.open(f"hf:{REPO}")
    assert not set(made.manifest.files) & set(climbing)
    assert made.file("config.json").read_bytes() == checkpoint["config.json"]


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"weight_map": {"a": "../evil.safetensors"}}, "is not the name of a safetensors file"),
        ({"weight_map": {"a": "/etc/evil.safetensors"}}, "is not the name of a safetensors file"),
        ({"weight_map": {"a": "sub/evil.safetensors"}}, "is not the name of a safetensors file"),
        ({"weight_map": {"a": "pytorch_model.bin"}}, "is not the name of a safetensors file"),
        ({"weight_map": {"a": 7}}, "is not the name of a safetensors file"),
        ({"weight_map": {"a": "gone.safetensors"}}, "is not in the repository"),
        ({"weight_map": []}, "weight_map must name"),
        ([], "weight_map must name"),
        (b"[" * 100_000, "weight_map must name"),
    ],
)
def test_an_index_that_lies(
    served: Hub, checkpoint: dict[str, bytes], workspace: Workspace, index: Any, message: str
) -> None:
    raw = index if isinstance(index, bytes) else json.dumps(index).encode()
    served.repo(REPO, checkpoint | {INDEX: raw, "sub/evil.safetensors": b"x"})
    with pytest.raises(ArtifactError, match=message):
        workspace.open(f"hf:{REPO}")
    assert not workspace.all()


def test_repositories_without_what_is_needed(served: Hub, checkpoint: dict[str, bytes], workspace: Workspace) -> None:
    served.repo("a/pickled", {"config.json": b"{}", "pytorch_model.bin": b"x", "flax_model.msgpack": b"x"})
    with pytest.raises(
        UserError, match=r"no safetensors, but \*\.bin\. Pickled weights are never loaded.*ownlm convert"
    ):
        workspace.open("hf:a/pickled")
    served.repo("a/gguf", {"config.json": b"{}", "model.gguf": b"x"})
    with pytest.raises(UserError, match=r"no safetensors, but \*\.gguf"):
        workspace.open("hf:a/gguf")
    served.repo("a/bare", {BLOB: b"x"})
    with pytest.raises(UserError, match=r"no config\.json"):
        workspace.open("hf:a/bare")
    with pytest.raises(UserError, match="no tokenizer"):
        workspace.open("hf:a/bare", "tokenizer")
    with pytest.raises(UserError, match=r"no adapter_"):
        workspace.open("hf:a/bare", "adapter")
    assert not contents(served)


def test_what_is_no_hub(served: Hub, workspace: Workspace) -> None:
    served.loops = True
    with pytest.raises(UserError, match=r"doesn't speak the hub's API.*Check HF_ENDPOINT"):
        workspace.open(f"hf:{REPO}")


# ── Code of its own ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_code_that_a_model_names_is_never_run(
    served: Hub, checkpoint: dict[str, bytes], workspace: Workspace, tmp_path: Path
) -> None:
    """`trust_remote_code` does not exist: a model is read as its model_type, or not at all."""
    marker = tmp_path / "marker"
    code = f"open({str(marker)!r}, 'w').close()".encode()
    config = json.loads(checkpoint["config.json"]) | {"auto_map": {"AutoModelForCausalLM": "modeling_tiny.Tiny"}}
    files = checkpoint | {"config.json": json.dumps(config).encode(), "modeling_tiny.py": code}
    served.repo(REPO, files)
    made = workspace.open(f"hf:{REPO}")
    assert made.facts["code_not_run"] == ["modeling_tiny.Tiny"]
    assert "which ownlm never runs: modeling_tiny.Tiny" in said(workspace)
    assert not served.asked("modeling_tiny.py")
    ids = torch.arange(9)[None]
    assert torch.equal(ownlm.load(made.ref, workspace=workspace).logits(ids), tiny_model().logits(ids))
    folder = tmp_path / "folder"
    folder.mkdir()
    for name, data in files.items():
        (folder / Path(name).name).write_bytes(data)
    ownlm.load(folder)
    assert workspace.open(folder).facts["code_not_run"] == ["modeling_tiny.Tiny"]
    unknown = files | {"config.json": json.dumps(config | {"model_type": "tinyown"}).encode()}
    served.repos[REPO].commit(unknown)
    with pytest.raises(UserError, match="tinyown"):
        ownlm.load(f"hf:{REPO}@main", workspace=told(workspace.root))
    assert not marker.exists()


# ── Stages ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_model_made_from_it_leads_back_to_it(
    served: Hub, checkpoint: dict[str, bytes], tmp_path: Path, capsys: Any
) -> None:
    repo = served.repo(REPO, checkpoint)
    source = f"hf:{REPO}@{repo.refs['main']}"
    workspace = prepared(tmp_path)
    tuned = finetune(
        FinetuneRecipe(
            name="tuned", checkpoint=f"hf:{REPO}", documents="farm", batch_tokens=256, steps=2, document_share=0.5
        ),
        workspace,
        Reporter.silent(),
    )
    assert tuned.manifest.inputs["checkpoint"]["source"] == source
    assert tuned.manifest.inputs["checkpoint"]["ref"] == "village--tiny@1"
    lineage.describe(workspace, tuned.ref, Reporter())
    assert (
        f"checkpoint: village--tiny@1  checkpoint  {workspace.open('village--tiny').digest[:12]}  from {source}"
        in capsys.readouterr().out
    )
    with pytest.raises(UserError, match="is an input of tuned@1"):
        workspace.remove("village--tiny@1")
    shutil.rmtree(workspace.artifacts / "village--tiny")
    lineage.describe(workspace, tuned.ref, Reporter())
    assert f"from {source}  (gone)" in capsys.readouterr().out
    assert len(contents(served)) == 1


def test_a_tokenizer_of_a_hub_in_a_recipe(served: Hub, checkpoint: dict[str, bytes], tmp_path: Path) -> None:
    served.repo(REPO, checkpoint)
    made = pretrain(recipe(tokenizer=f"hf:{REPO}", steps=2), prepared(tmp_path), Reporter.silent())
    assert made.manifest.inputs["tokenizer"]["ref"] == "village--tiny--tokenizer@1"
    assert not contents(served)


def test_show_and_generate(
    served: Hub, checkpoint: dict[str, bytes], tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OWNLM_HOME", str(tmp_path / "home"))
    commit = served.repo(REPO, checkpoint).refs["main"]
    assert cli.main(["show", f"hf:{REPO}"]) == 0
    out = capsys.readouterr().out
    assert f"on the hub, not downloaded; commit {commit}, licence: apache-2.0" in out
    assert BLOB in out
    assert not contents(served)
    assert cli.main(["generate", f"hf:{REPO}", "Anna", "max_tokens=3", "temperature=0"]) == 0
    answer = capsys.readouterr()
    assert "downloaded in" in answer.err
    assert answer.out == tiny_model().generate("Anna", max_tokens=3, temperature=0).text + "\n"
    for ref in (f"hf:{REPO}", f"hf:{REPO}@{commit}", "village--tiny"):
        assert cli.main(["show", ref]) == 0
        assert f"  from hf:{REPO}@{commit}" in capsys.readouterr().out
    assert cli.main(["generate", "hf:../x", "Anna"]) == 2
    assert "is not a reference" in capsys.readouterr().err


def test_the_how_to_page_runs(
    served: Hub, checkpoint: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every command and the Python of docs/how-to/use-a-checkpoint.md, in their order."""
    page = (Path(__file__).parents[1] / "docs" / "how-to" / "use-a-checkpoint.md").read_text()
    monkeypatch.chdir(tmp_path)
    served.repo("openai-community/gpt2", checkpoint)
    for name in ("gpt2", "old"):
        (tmp_path / name).mkdir()
        for file, data in checkpoint.items():
            if belongs(file) or (file == BLOB and name == "gpt2"):
                (tmp_path / name / file).write_bytes(data)
    torch.save(tiny_model().decoder.state_dict(), tmp_path / "old" / "pytorch_model.bin")
    commands = [line.strip() for line in page.splitlines() if line.startswith("    ownlm ")]
    assert len(commands) >= 8
    for command in commands:
        assert cli.main(shlex.split(command)[1:]) == 0, command
    (python,) = [block.removeprefix("python") for block in page.split("```") if block.startswith("python")]
    ran: dict[str, Any] = {}
    exec(python, ran)  # noqa: S102
    ids = torch.arange(9)[None]
    assert torch.equal(ran["again"].logits(ids), ran["model"].logits(ids))
    tables = [block.removeprefix("toml") for block in page.split("```") if block.startswith("toml")]
    assert all(
        hub.parse(value) or value in ("./gpt2", "./model.gguf")
        for block in tables
        for table in tomllib.loads(block).values()
        for value in table.values()
    )


# ── Folders ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def folder(checkpoint: dict[str, bytes], tmp_path: Path) -> Path:
    """A Hugging Face directory as its cache holds them: links to blobs elsewhere."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "a model").mkdir()
    for number, (name, data) in enumerate(checkpoint.items()):
        if "/" not in name:
            (tmp_path / "blobs" / str(number)).write_bytes(data)
            (tmp_path / "a model" / name).symlink_to(tmp_path / "blobs" / str(number))
    return tmp_path / "a model"


def test_a_folder_is_an_input_too(folder: Path, tmp_path: Path, capsys: Any) -> None:
    workspace = prepared(tmp_path / "home")
    found = workspace.open(folder, "checkpoint")
    assert (found.kind, found.version, found.ref, found.name) == ("checkpoint", 0, str(folder), "a-model")
    assert "modeling_tiny.py" not in found.manifest.files
    assert workspace.open(str(folder)) is found
    tuned = finetune(
        FinetuneRecipe(name="tuned", checkpoint=str(folder), documents="farm", batch_tokens=256, steps=2),
        workspace,
        Reporter.silent(),
    )
    assert tuned.manifest.inputs["checkpoint"] == {"ref": str(folder), "kind": "checkpoint", "digest": found.digest}
    states = lambda: {one.ref: one.state for one in lineage.lineage(Workspace(workspace.root), tuned)}
    assert states()[str(folder)] == "here"
    lineage.describe(workspace, str(folder), Reporter())
    assert "a folder with a checkpoint, not made by ownlm" in capsys.readouterr().out
    (folder / "generation_config.json").unlink()
    (folder / "generation_config.json").write_text("{}")
    assert states()[str(folder)] == "changed"
    shutil.rmtree(folder)
    assert states()[str(folder)] == "gone"


def test_folders_of_other_kinds(folder: Path, tmp_path: Path) -> None:
    workspace = Workspace(tmp_path / "home")
    (folder / BLOB).unlink()
    (folder / "consolidated.safetensors").unlink()
    assert workspace.open(folder).kind == "tokenizer"
    with pytest.raises(ArtifactError, match="a tokenizer artifact, but a checkpoint artifact is needed"):
        workspace.open(folder, "checkpoint")
    (folder / "adapter_config.json").write_text("{}")
    assert workspace.open(folder).kind == "adapter"
    (tmp_path / "empty").mkdir()
    with pytest.raises(NotFound):
        workspace.open(tmp_path / "empty")


def test_an_artifact_without_its_manifest_is_not_a_folder(
    served: Hub, checkpoint: dict[str, bytes], workspace: Workspace
) -> None:
    served.repo(REPO, checkpoint)
    made = workspace.open(f"hf:{REPO}")
    (made.path / "manifest.json").unlink()
    for ref in (made.ref, made.path):
        with pytest.raises(ArtifactError, match="not a manifest"):
            Workspace(workspace.root).open(ref)
