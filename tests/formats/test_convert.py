"""Directories of pickled weights through the confined child: what comes out loads, what is hostile leaves nothing."""

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from references import CONFIGS, save
from safetensors.torch import load_file
from test_torchfile import archive
from transformers import AutoModelForCausalLM

import ownlm
from ownlm import sandbox
from ownlm.checkpoints.weights import load_model
from ownlm.errors import ArtifactError, NotFound, UserError
from ownlm.formats.convert import convert
from ownlm.report import Reporter


@pytest.fixture
def pickled(tmp_path: Path) -> Path:
    """A GPT-2 directory as the hub had them before safetensors, with what else lies in such a directory."""
    model = save(CONFIGS["gpt2"], tmp_path / "safe")
    (tmp_path / "pickled").mkdir()
    torch.save(model.state_dict(), tmp_path / "pickled" / "pytorch_model.bin")
    shutil.copy(tmp_path / "safe" / "config.json", tmp_path / "pickled")
    (tmp_path / "pickled" / "modeling_own.py").write_text("raise SystemExit")
    (tmp_path / "pickled" / "tokenizer_config.json").write_text("{}")
    return tmp_path / "pickled"


class Lines:
    """What a reporter was told, as text."""

    def __init__(self) -> None:
        self.text = ""

    def write(self, text: str) -> None:
        self.text += text

    def flush(self) -> None: ...

    def isatty(self) -> bool:
        return False


def test_a_directory(pickled: Path, tmp_path: Path) -> None:
    lines = Lines()
    out = convert(pickled, out=tmp_path / "out", reporter=Reporter(out=lines))  # type: ignore[arg-type]
    assert sorted(file.name for file in out.iterdir()) == ["config.json", "model.safetensors", "tokenizer_config.json"]
    theirs = torch.load(pickled / "pytorch_model.bin", weights_only=True)
    ours = load_file(out / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    assert "confined by limits" in lines.text
    ids = torch.arange(20)[None]
    reference = AutoModelForCausalLM.from_pretrained(tmp_path / "safe")
    with torch.inference_mode():
        model = load_model(out)
        assert torch.allclose(model.logits(model(ids)), reference(ids).logits, atol=1e-5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "pickled", "safe"]


def test_shards(pickled: Path, tmp_path: Path) -> None:
    state = torch.load(pickled / "pytorch_model.bin", weights_only=True)
    names = list(state)
    shards = {"pytorch_model-00001-of-00002.bin": names[:5], "pytorch_model-00002-of-00002.bin": names[5:]}
    for file, held in shards.items():
        torch.save({name: state[name] for name in held}, pickled / file)
    where = {name: file for file, held in shards.items() for name in held}
    (pickled / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": where}))
    out = convert(pickled, out=tmp_path / "out")
    index = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    assert index == {
        name: file.replace("pytorch_model", "model").replace(".bin", ".safetensors") for name, file in where.items()
    }
    whole = convert(pickled / "pytorch_model.bin", out=tmp_path / "whole")
    for name, tensor in load_model(whole).state_dict().items():
        assert torch.equal(load_model(out).state_dict()[name], tensor)


def test_a_file_of_any_name(pickled: Path, tmp_path: Path) -> None:
    (pickled / "pytorch_model.bin").rename(pickled / "best.ckpt")
    out = ownlm.convert(str(pickled / "best.ckpt"), out=str(tmp_path / "deep" / "out"))
    assert (out / "model.safetensors").is_file()
    with pytest.raises(NotFound, match=r"no pytorch_model\.bin.*Name the file itself"):
        convert(pickled, out=tmp_path / "other")


def test_an_adapter(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    torch.save({"a.lora_A.weight": torch.ones(2, 3)}, tmp_path / "in" / "adapter_model.bin")
    (tmp_path / "in" / "adapter_config.json").write_text("{}")
    out = convert(tmp_path / "in", out=tmp_path / "out")
    assert sorted(file.name for file in out.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]


class Attack:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, (f"touch {self.marker}",)


def test_a_hostile_pickle_does_nothing(pickled: Path, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    torch.save({"weight": torch.ones(2), "x": Attack(marker)}, pickled / "pytorch_model.bin")
    with pytest.raises(
        ArtifactError, match=r"pytorch_model\.bin: its pickle asks for posix\.system.*Nothing was written"
    ):
        convert(pickled, out=tmp_path / "out")
    assert not marker.exists()
    assert not (tmp_path / "out").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pickled", "safe"]
    pickle.loads(pickle.dumps(Attack(marker)))  # noqa: S301  (it is a live one)
    assert marker.exists()


def test_memory_and_size_are_bounded(tmp_path: Path) -> None:
    """32 MB of empty lists would be two gigabytes of objects."""
    (tmp_path / "x.bin").write_bytes(archive(b"\x80\x02" + b"]" * 31_000_000 + b"."))
    with pytest.raises(ArtifactError, match="takes more memory"):
        convert(tmp_path / "x.bin", out=tmp_path / "out")


@pytest.mark.parametrize(
    ("index", "kind", "message"),
    [
        ({"weight_map": {"a": "../pytorch_model.bin"}}, ArtifactError, "not the name of a .bin file"),
        ({"weight_map": {"a": "/etc/passwd.bin"}}, ArtifactError, "not the name of a .bin file"),
        ({"weight_map": {"a": "modeling_own.py"}}, ArtifactError, "not the name of a .bin file"),
        ({"weight_map": []}, ArtifactError, "weight_map"),
        ({"weight_map": {"a": "other.bin"}}, NotFound, "which the index names"),
    ],
)
def test_an_index_that_lies(pickled: Path, tmp_path: Path, index: object, kind: type[UserError], message: str) -> None:
    (pickled / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with pytest.raises(kind, match=message):
        convert(pickled, out=tmp_path / "out")


def test_what_is_there_is_left_alone(pickled: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(UserError, match="there already"):
        convert(pickled, out=tmp_path / "out")
    with pytest.raises(UserError, match="nothing to convert"):
        convert(tmp_path / "safe", out=tmp_path / "other")
    with pytest.raises(NotFound, match="no such file or folder"):
        convert(tmp_path / "none", out=tmp_path / "other")
    (tmp_path / "out" / "mine").unlink()
    convert(pickled, out=tmp_path / "out")


def test_a_child_that_lies_is_caught(pickled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the child wrote is read as strictly as any file from outside."""
    monkeypatch.setattr(
        "ownlm.formats.convert.run", lambda *_: sandbox.Outcome(report={"tensors": 1}, fault="", guards=("limits",))
    )
    with pytest.raises(ArtifactError, match="cut short"):
        convert(pickled, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
