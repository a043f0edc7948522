"""The measurements of generation: what is counted against the model's own numbers, what is written, and what is refused. No times."""

import json
import xml.etree.ElementTree as xml
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from references import CONFIGS, make_loud
from test_plots import parse

from ownlm.artifact import Workspace
from ownlm.checkpoints.weights import save_model
from ownlm.cli import main
from ownlm.evaluate.plots import Measure, roofline
from ownlm.generate.measure import work
from ownlm.kernels import library, limits
from ownlm.kernels.native import NativeDecoder
from ownlm.models.decoder import Decoder
from ownlm.models.families import from_hf
from tiny import tiny_model

FEW = ["--prompts", "9,33", "--batches", "1,3"]


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "READ_BYTES", 1 << 20)
    monkeypatch.setattr(limits, "SHAPE", (32, 64, 64))


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OWNLM_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    model = tiny_model()
    save_model(model.decoder, tmp_path / "tiny")
    model.tokenizer.save(tmp_path / "tiny")
    return tmp_path / "tiny"


@dataclass(frozen=True, slots=True, kw_only=True)
class Stub:
    """A recipe for what no stage made."""

    name: str = "x"


@pytest.mark.parametrize("kind", [None, "int4"])
def test_the_command(checkpoint: Path, tmp_path: Path, kind: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    if kind is not None and library.library() is None:
        pytest.skip(library.missing())
    words = ["bench", "generate", str(checkpoint), *FEW, "--threads", "1", *(["--kind", kind] if kind else [])]
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert "prompt of 33 tokens" in printed
    assert "3 streams" in printed
    told = json.loads((tmp_path / "bench-tiny" / "bench.json").read_text())
    assert told["kind"] == (kind or "f32")
    assert {(row["what"], row["count"], row["side"]) for row in told["rows"]} == {
        (what, count, side)
        for what, counts in (("prompt", (9, 33)), ("streams", (1, 3)))
        for count in counts
        for side in ("step", "engine")
    }
    for row in told["rows"]:
        assert 0 < row["smallest"] <= row["median"] <= row["largest"]
        roof = min(told["limits"]["memory"] * row["intensity"], told["limits"]["products"]["int8" if kind else "f32"])
        assert row["share"] == pytest.approx(row["operations_a_second"] / roof)
    page = (tmp_path / "bench-tiny" / "bench.html").read_text()
    assert page.count("<svg") == 1
    assert "<script" not in page
    assert xml.fromstring((tmp_path / "bench-tiny" / "roofline.svg").read_text()) is not None


def test_without_kernels_pytorch_is_measured(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(library, "library", lambda: None)
    assert main(["bench", "generate", str(checkpoint), *FEW, "--out", "here"]) == 0
    assert json.loads((tmp_path / "here" / "bench.json").read_text())["runs_on"].startswith("PyTorch")
    assert main(["bench", "generate", str(checkpoint), *FEW, "--kind", "int4"]) == 2
    assert "the kernels are needed for int4" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--prompts", "200"], "a prompt of 200 tokens doesn't fit"),
        (["--prompts", "0"], "0 is out of range"),
        (["--batches", "1,-4"], "-4 is out of range"),
        (["--threads", "0"], "0 is out of range"),
        (["--out", "file"], "this is a file"),
    ],
)
def test_what_can_not_be_is_one_sentence(
    words: list[str], sentence: str, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("file").write_text("x")
    assert main(["bench", "generate", str(checkpoint), *words]) == 2
    assert sentence in capsys.readouterr().err


def test_words_that_are_no_numbers(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["bench", "generate", str(checkpoint), "--batches", "many"])
    assert stop.value.code == 2
    assert "whole numbers" in capsys.readouterr().err


@pytest.mark.skipif(library.library() is None, reason=f"no native kernels: {library.missing()}")
def test_a_kept_precision_stays(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = Workspace(tmp_path / "home")
    with found.create("checkpoint", "tiny", inputs={}, recipe=Stub()) as draft:
        for file in checkpoint.iterdir():
            (draft.path / file.name).write_bytes(file.read_bytes())
    assert main(["quantize", "tiny", "--to", "int8", "--method", "rtn"]) == 0
    assert main(["bench", "generate", "tiny-int8", *FEW]) == 0
    assert json.loads((tmp_path / "bench-tiny-int8" / "bench.json").read_text())["kind"] == "int8"
    assert main(["bench", "generate", "tiny-int8", "--kind", "int4"]) == 2
    assert "kept in int8" in capsys.readouterr().err


@pytest.mark.skipif(library.library() is None, reason=f"no native kernels: {library.missing()}")
@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "gpt-oss"])
def test_work_is_counted_as_the_kernels_keep_it(name: str) -> None:
    config, family = from_hf(CONFIGS[name])
    model = family.build(config, CONFIGS[name])
    make_loud(model)
    assert isinstance(model, Decoder)
    counted = work(model, "f32")
    everything = sum(parameter.numel() for parameter in model.parameters() if parameter.ndim > 1)
    lookups = 0 if config.tie_embeddings else model.embed_tokens.weight.numel()
    lookups += 0 if model.embed_positions is None else model.embed_positions.weight.numel()
    routers = sum(p.numel() for n, p in model.named_parameters() if n.endswith("mlp.gate.weight"))
    biases = sum(p.numel() for n, p in model.named_parameters() if n.endswith("proj_bias"))
    assert counted.shared + counted.head + counted.routed == everything - lookups - routers - biases
    # All of it is read when everybody's experts are met, and nothing is kept yet; the kernels pad to whole tiles.
    read = counted.bytes(10_000, 1, 0)
    assert read == pytest.approx(4 * (everything - lookups - routers - biases))
    assert read <= NativeDecoder(model, "f32").memory_bytes
    assert counted.bytes(1, 1, 10) - counted.bytes(1, 1, 0) == 4 * 10 * counted.kept
    # A token meets what is shared, and of the experts its own.
    share = counted.per_token / counted.experts if counted.experts else 0
    assert counted.operations(1, 1, 0) == 2 * (counted.shared + counted.head + share * counted.routed)
    assert counted.operations(1, 0, 7) - counted.operations(1, 0, 0) == 7 * counted.attention


def test_limits_are_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    found = limits.limits(2)
    assert found.memory > 1e6
    assert all(speed > 1e6 for speed in found.products.values())
    monkeypatch.setattr(library, "library", lambda: None)
    assert limits.memory_speed(2) > 1e6
    twice = found.best(limits.Limits(threads=2, memory=0, products=dict.fromkeys(found.products, 1e30)))
    assert twice.memory == found.memory
    assert set(twice.products.values()) == {1e30}


@pytest.mark.skipif(library.library() is None, reason=f"no native kernels: {library.missing()}")
@pytest.mark.parametrize("count", [0, 5, 4096, 10_007])
def test_all_words_are_read(count: int) -> None:
    words = torch.arange(count, dtype=torch.int64)
    found = library.library()
    assert found is not None
    assert found.ownlm_read(2, words.data_ptr(), count) == int(words.sum())


def test_points_stand_under_their_roofs() -> None:
    points = [
        Measure(label="1 <stream>", intensity=2.0, speed=5e10),
        Measure(label="1 <stream>", intensity=2.0, speed=4e10, faint=True),
        Measure(label="prompt of 512 tokens", intensity=900.0, speed=4e11),
    ]
    root = parse(roofline(points, memory=5e10, products=7e11, kind="int8"))
    roof = next(line for line in root.iter() if line.get("class") == "one")
    slope, corner, end = (tuple(map(float, pair.split(","))) for pair in (roof.get("points") or "").split())
    assert slope[1] > corner[1] == end[1]
    circles = [circle for circle in root.iter() if circle.tag.endswith("circle")][2:]  # after those of the legend
    assert [circle.get("class") for circle in circles] == ["ring", "dot", "ring"]
    assert all(float(circle.get("cy") or 0) > corner[1] for circle in circles)
    assert "400 GOP/s" in "".join(root.itertext())
