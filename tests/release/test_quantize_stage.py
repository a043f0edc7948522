"""The stage and its command: what it writes, where its text comes from, what it refuses."""

import json
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import ownlm
from ownlm.adapters.tuning import init_normal
from ownlm.artifact import Artifact, Workspace
from ownlm.checkpoints.weights import load_model, save_model
from ownlm.cli import main
from ownlm.errors import UserError
from ownlm.kernels import library
from ownlm.models.families import from_hf
from ownlm.pipeline import run_stage
from ownlm.quantization.codes import QuantizedLinear
from ownlm.records import Conversation, Document, Message, write_jsonl
from ownlm.release.quantize import read, rows
from ownlm.report import Reporter
from tiny import tiny_model, tiny_tokenizer

WORDS = "the quick brown fox jumps over lazy dogs while seven wise owls read long books by night".split()


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    name: str = "x"
    task: str = "text"


def text(seed: int, words: int = 150) -> str:
    draw = torch.randint(len(WORDS), (words,), generator=torch.Generator().manual_seed(seed))
    return " ".join(WORDS[index] for index in draw)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OWNLM_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def workspace(home: Path) -> Workspace:
    """A checkpoint "owl" that was made from documents, and "stray", of which nothing is known."""
    return filled(home, "owl", "texts")


def filled(home: Path, made: str, of: str) -> Workspace:
    found, model = Workspace(home), tiny_model()
    with found.create("documents", of, inputs={}, recipe=Recipe()) as draft:
        for split, count in (("train", 40), ("test", 8)):
            documents = [Document(text=text(index + len(split)), source="x") for index in range(count)]
            write_jsonl(draft.path / f"{split}.jsonl", documents)
        talk = Conversation(messages=(Message(role="user", content="hoot"), Message(role="assistant", content="who")))
        write_jsonl(draft.path / "conversations.jsonl", [talk] * 20)
    for name, inputs in ((made, {"documents": draft.done}), ("stray", {})):
        with found.create("checkpoint", name, inputs=inputs, recipe=Recipe(name=name)) as checkpoint:
            save_model(model.decoder, checkpoint.path)
            model.tokenizer.save(checkpoint.path)
    return found


def quantized(workspace: Workspace, ref: str = "owl", **fields: object) -> Artifact:
    return ownlm.quantize(ref, **{"to": "int4", "workspace": workspace, "reporter": Reporter.silent(), **fields})


def test_it_makes_a_checkpoint_that_every_command_opens(
    workspace: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["quantize", "owl", "--to", "int4", "--json"]) == 0
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [event["event"] for event in events] == ["quantized", "artifact"]
    made = workspace.open("owl-int4", "checkpoint")
    assert {role: one["ref"] for role, one in made.manifest.inputs.items()} == {
        "checkpoint": "owl@1",
        "documents": "texts@1",
    }
    assert made.manifest.recipe["method"] == "gptq"
    held = made.facts["held_out"]
    assert 0 < held["kl"] < 0.5
    assert held["perplexity_rise"] == pytest.approx(2.718281828 ** (held["nats_after"] - held["nats_before"]) - 1)
    model = ownlm.load("owl-int4", workspace=workspace)
    whole = ownlm.load("owl", workspace=workspace)
    assert model.num_parameters == whole.num_parameters
    assert isinstance(model.decoder.layers[0].mlp.up_proj, QuantizedLinear) == (library.library() is not None)
    assert (
        model.generate("the quick", max_tokens=5).prompt_tokens
        == whole.generate("the quick", max_tokens=5).prompt_tokens
    )
    assert main(["generate", "owl-int4", "the quick", "max_tokens=3"]) == 0
    assert main(["show", "owl-int4"]) == 0
    assert "quantization.to = int4" in capsys.readouterr().out
    # Again: nothing to do. Of itself: nothing left to do.
    assert quantized(workspace).ref == made.ref
    with pytest.raises(UserError, match="quantised already"):
        quantized(workspace, "owl-int4")


def test_floats_of_eight_bits(workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["quantize", "owl", "--to", "fp8"]) == 0
    made = workspace.open("owl-fp8", "checkpoint")
    assert 0 < made.facts["held_out"]["kl"] < 0.05
    assert 8 < made.facts["quantization"]["bits_per_weight"] < 12  # small rows, whose scales have 32 bits
    assert main(["show", "owl-fp8"]) == 0
    assert "quantization.to = fp8" in capsys.readouterr().out
    assert ownlm.load(made.ref, workspace=workspace).generate("the quick", max_tokens=3).tokens


def test_without_kernels_it_opens_as_numbers(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    made = quantized(workspace, to="int8", method="rtn")
    monkeypatch.setattr(library, "library", lambda: None)
    model = ownlm.load(made.ref, workspace=workspace)
    assert type(model.decoder.layers[0].mlp.up_proj) is torch.nn.Linear
    original = load_model(workspace.open("owl").path, dtype=torch.float32)
    weight = original.layers[0].mlp.up_proj.weight
    assert (model.decoder.layers[0].mlp.up_proj.weight - weight).abs().max() < weight.abs().max() / 200


def test_text_comes_from_the_lineage_or_is_named(workspace: Workspace, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--method rtn"):
        quantized(workspace, "stray")
    rounded = quantized(workspace, "stray", method="rtn", name="rounded")
    assert "held_out" not in rounded.facts
    assert quantized(workspace, "stray", documents="texts").manifest.inputs["documents"]["ref"] == "texts@1"
    file = tmp_path / "book.txt"
    file.write_text("\n".join(text(index) for index in range(30)))
    of_file = quantized(workspace, "stray", documents=file, name="of-file")
    assert of_file.manifest.recipe["sha256"]
    assert of_file.facts["held_out"]["tokens"] > 100
    file.write_text("other " * 3000)
    assert quantized(workspace, "stray", documents=file, name="of-file").version == 2
    file.write_bytes(b"\xff" * 5000)
    with pytest.raises(UserError, match="can't be read as text"):
        quantized(workspace, "stray", documents=file)
    file.write_text("short")
    with pytest.raises(UserError, match="less text than one context"):
        quantized(workspace, "stray", documents=file)


def test_conversations_count_where_the_model_was_tuned_on_them(workspace: Workspace) -> None:
    documents = workspace.open("texts", "documents")
    kinds = [{type(one) for one in read(documents, 64, chat=chat, held_out=False)} for chat in (True, False)]
    assert kinds == [{str, Conversation}, {str}]


def test_rows_are_whole_and_as_many_as_asked() -> None:
    tokenizer = tiny_tokenizer()
    texts = [text(index) for index in range(20)]
    found = rows(texts, tokenizer, 64, 640, 0)
    assert found is not None
    assert found.shape == (10, 64)
    again = rows(iter(texts), tokenizer, 64, 640, 0)
    assert again is not None
    assert torch.equal(found, again)
    assert rows(["hi"], tokenizer, 64, 640, 0) is None


def test_what_is_no_decoder_is_refused(workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["quantize", "texts", "--to", "int8"]) == 2
    assert "checkpoint or adapter" in capsys.readouterr().err


BERT = {
    "model_type": "bert", "architectures": ["BertModel"], "vocab_size": tiny_tokenizer().vocab_size, "hidden_size": 32,
    "max_position_embeddings": 64, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
}  # fmt: skip
T5 = {
    "model_type": "t5", "vocab_size": tiny_tokenizer().vocab_size, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2,
    "num_heads": 4, "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1, "n_positions": 64,
}  # fmt: skip


def written_encoder(folder: Path, hf: dict[str, object] = BERT) -> None:
    config, family = from_hf(hf)
    model = family.build(config, hf)
    init_normal(model.named_parameters(), std=0.3)
    save_model(model, folder)
    tiny_tokenizer().save(folder)


def test_encoders_and_encoder_decoders_are_rounded(
    workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "book.txt").write_text("\n".join(text(index) for index in range(30)))
    for name, hf in (("reader", BERT), ("rewriter", T5)):
        with workspace.create("checkpoint", name, inputs={}, recipe=Recipe(name=name)) as draft:
            written_encoder(draft.path, hf)
        made = quantized(workspace, name, to="int8", documents=tmp_path / "book.txt")
        assert made.manifest.recipe["method"] == "rtn"
        held = made.facts["held_out"]
        assert 0.95 < held["lowest"] <= held["cosine"] < 1
        with pytest.raises(UserError, match="only decoders are calibrated"):
            quantized(workspace, name, method="gptq")
    small = ownlm.load("reader-int8", workspace=workspace)
    whole = ownlm.load("reader", workspace=workspace)
    assert small.num_parameters == whole.num_parameters
    assert (small.embed(WORDS) * whole.embed(WORDS)).sum(-1).min() > 0.99
    assert ownlm.load("rewriter-int8", workspace=workspace).generate("a", max_tokens=3).tokens
    assert main(["quantize", "reader", "--to", "int4"]) == 0  # no text: nothing is compared
    assert "held_out" not in workspace.open("reader-int4").facts
    assert main(["quantize", "reader", "--to", "int8", "--documents", str(tmp_path / "book.txt"), "--name", "b"]) == 0
    assert "cosine" in capsys.readouterr().out


def test_the_how_to_page_runs(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every command, the Python and the recipe of docs/how-to/quantise-a-model.md, in their order."""
    page = (Path(__file__).parents[2] / "docs" / "how-to" / "quantise-a-model.md").read_text()
    workspace = filled(home, "demo", "demo-documents")
    monkeypatch.chdir(tmp_path)
    shutil.copytree(workspace.open("stray").path, tmp_path / "gpt2", ignore=lambda *_: ["manifest.json"])
    (tmp_path / "book.txt").write_text("\n".join(text(index) for index in range(30)))
    written_encoder(tmp_path / "minilm")
    commands = [line.strip() for line in page.splitlines() if line.startswith("    ownlm ")]
    assert len(commands) >= 6
    for command in commands:
        assert main(shlex.split(command)[1:]) == 0, command
    python, toml = (
        next(block.removeprefix(kind) for block in page.split("```") if block.startswith(kind))
        for kind in ("python", "toml")
    )
    exec(python, {})  # noqa: S102
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(f'name = "demo"\n{toml}')
    assert run_stage("quantize", recipe, (), workspace, Reporter.silent()).ref == "demo-quantized@1"
