"""Exports are compared with the original, whole or not there, and refused where the format can't hold them."""

import json
import os
import shlex
import shutil
from pathlib import Path
from typing import Any

import gguf as reference
import pytest
import seq2seq
import torch
from encoder_references import save_encoder
from references import CONFIGS, difference, save
from transformers import AutoModelForCausalLM, AutoTokenizer

import ownlm
from ownlm.adapters.lora import LoRA, add_lora
from ownlm.adapters.peft import save_adapter
from ownlm.checkpoints.weights import load_model, save_model
from ownlm.cli import main
from ownlm.errors import NotFound, UserError
from ownlm.models.decoder import Decoder
from ownlm.models.families import from_hf
from ownlm.release.compare import TEXT
from ownlm.release.export import export
from ownlm.train.fresh import init_weights
from tiny import tiny_model

TOKENIZER = Path(__file__).parents[3] / "shared" / "vectors" / "torchtitan"
pytestmark = pytest.mark.skipif(not TOKENIZER.is_dir(), reason="needs ../shared/vectors/torchtitan")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3 of our own with a tokenizer."""
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    hf = CONFIGS["qwen3"] | {"vocab_size": 2048, "hidden_size": 256, "intermediate_size": 256}
    model = init_weights(Decoder(from_hf(hf)[0], hf), zero_output=False, embedding_std=0.5)
    torch.nn.init.normal_(model.lm_head.weight, std=0.3, generator=torch.Generator().manual_seed(1))
    save_model(model, folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TOKENIZER / name, folder)
    return folder


def test_gguf(checkpoint: Path, tmp_path: Path) -> None:
    done = export(checkpoint, out=tmp_path / "tiny.gguf", quantization="F32")
    assert (done.kind, done.architecture, done.notes, done.comparison.chooses) == ("gguf", "qwen3", (), True)
    assert done.bytes == (tmp_path / "tiny.gguf").stat().st_size
    assert (done.comparison.max_difference, done.comparison.agreement, done.compared_tokens) == (0.0, 1.0, 256)
    assert done.comparison.max_value > 5
    fields = reference.GGUFReader(done.path).fields
    assert fields["general.name"].contents() == "tiny"
    assert fields["general.file_type"].contents() == 0
    ours, theirs = ownlm.load(checkpoint), ownlm.load(tmp_path / "tiny.gguf")
    assert theirs.name == "tiny"
    assert theirs.tokenizer.encode(TEXT) == ours.tokenizer.encode(TEXT)
    for prompt in ("Once", "def f(", "1 2 3"):
        assert theirs.generate(prompt, max_tokens=30) == ours.generate(prompt, max_tokens=30)


def test_coarser_types_differ_more(checkpoint: Path, tmp_path: Path) -> None:
    found = {
        q: export(checkpoint, out=tmp_path / f"{q}.gguf", quantization=q)
        for q in ("F16", "Q8_0", "Q6_K", "Q4_K", "Q4_0")
    }
    differences = [each.comparison.max_difference for each in found.values()]
    assert 0 < differences[0] < 0.1
    assert differences == sorted(differences)
    sizes = [each.bytes for each in found.values()]
    assert sizes == sorted(sizes, reverse=True)
    assert found["F16"].comparison.agreement > found["Q4_0"].comparison.agreement > 0.3


def test_a_hugging_face_folder(checkpoint: Path, tmp_path: Path) -> None:
    """Also of a GGUF file, whose config and tokenizer transformers then reads."""
    export(checkpoint, out=tmp_path / "tiny.gguf", quantization="F16")
    done = export(tmp_path / "tiny.gguf", to="hf", out=tmp_path / "again")
    assert (done.kind, done.architecture, done.comparison.max_difference, done.comparison.agreement) == (
        "hf",
        "qwen3",
        0.0,
        1.0,
    )
    assert json.loads((tmp_path / "again" / "config.json").read_text())["dtype"] == "float16"
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float32)
    tokenizer, ours = AutoTokenizer.from_pretrained(tmp_path / "again"), ownlm.load(tmp_path / "tiny.gguf")
    ids = ours.tokenizer.encode(TEXT)
    assert tokenizer(TEXT, add_special_tokens=False)["input_ids"] == ids
    with torch.inference_mode():
        assert difference(ours.logits([ids]), theirs(torch.tensor([ids])).logits) <= 1e-5
    with pytest.raises(UserError, match=r"there is something of that name already. Name a new folder"):
        export(checkpoint, to="hf", out=tmp_path / "again")
    assert sorted(os.listdir(tmp_path)) == ["again", "tiny.gguf"]


def test_an_encoder(tmp_path: Path) -> None:
    save_encoder("bert", "Model", tmp_path / "hf")
    done = export(tmp_path / "hf", out=tmp_path / "bert.gguf", quantization="F16")
    assert not done.comparison.chooses
    assert done.comparison.agreement > 0.9999
    assert 0 < done.comparison.max_difference < 0.05
    assert "cosine of vectors 1.0" in done.told or "0.9999" in done.told
    assert "There is no tokenizer with the model: the file takes token ids only." in done.notes


def test_an_encoder_decoder_and_its_vocabulary(tmp_path: Path) -> None:
    """T5 with SentencePiece's Unigram: the file writes what the checkpoint writes, in both directions."""
    folder = tmp_path / "hf"
    seq2seq.save("t5-1.0", folder, vocab_size=1100, relative_attention_max_distance=128)
    shutil.copy(TOKENIZER.parent / "sentencepiece" / "test_model.model", folder / "spiece.model")
    names = {"tokenizer_class": "T5Tokenizer", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    done = export(folder, out=tmp_path / "t5.gguf", quantization="F32")
    assert (done.architecture, done.notes, done.comparison.agreement) == ("t5", (), 1.0)
    fields = reference.GGUFReader(done.path).fields
    assert fields["tokenizer.ggml.model"].contents() == "t5"
    assert fields["tokenizer.ggml.add_eos_token"].contents() is True
    assert fields["t5.decoder_start_token_id"].contents() == 0
    export(done.path, to="hf", out=tmp_path / "again")
    ours = ownlm.load(folder)
    for path in (done.path, tmp_path / "again"):
        theirs = ownlm.load(path)
        for text in ("I saw a girl with a telescope.", "summarize: Botchan"):
            assert theirs.prompt_ids(text) == ours.prompt_ids(text)
            assert theirs.generate(text, max_tokens=20).tokens == ours.generate(text, max_tokens=20).tokens


def test_without_a_tokenizer(tmp_path: Path) -> None:
    save(CONFIGS["mistral"], tmp_path / "hf")
    done = export(tmp_path / "hf", out=tmp_path / "a.gguf", quantization="F32")
    assert done.compared_tokens == 24  # where llama.cpp ends its context
    assert done.comparison.max_difference < 1e-4
    assert [note.split(":")[0] for note in done.notes] == [
        "llama.cpp has no windows in llama models", "There is no tokenizer with the model",
    ]  # fmt: skip
    again = export(tmp_path / "a.gguf", to="hf", out=tmp_path / "again")
    assert again.notes == ("There is no tokenizer with the model.",)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"to": "onnx"}, "to: 'onnx' is no format. There are: gguf, hf"),
        ({"quantization": "Q3_K"}, "quantization: 'Q3_K' is none. There are: F32, F16"),
        ({"out": "model.bin"}, "this isn't the name of a GGUF file. Let it end in .gguf"),
        ({"out": "nowhere/model.gguf"}, "nowhere: there is no such folder"),
    ],
)
def test_arguments(arguments: dict[str, Any], told: str, checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / arguments.pop("out", "model.gguf")
    with pytest.raises(UserError) as raised:
        export(checkpoint, out=out, **arguments)
    assert told in str(raised.value)
    assert not os.listdir(tmp_path)


def test_what_the_format_cant_hold_leaves_nothing(tmp_path: Path) -> None:
    save(CONFIGS["gpt-neo"], tmp_path / "hf")
    with pytest.raises(UserError, match=r"llama.cpp has no architecture that computes this model"):
        export(tmp_path / "hf", out=tmp_path / "a.gguf")
    assert os.listdir(tmp_path) == ["hf"]
    with pytest.raises(NotFound):
        export(tmp_path / "none.gguf", out=tmp_path / "a.gguf")


def test_a_number_that_the_type_cant_hold(tmp_path: Path) -> None:
    save(CONFIGS["llama"], tmp_path / "hf")
    model = load_model(tmp_path / "hf")
    model.layers[1].mlp.down_proj.weight.data[0, 0] = 1e5
    save_model(model, tmp_path / "large")
    with pytest.raises(UserError, match=r"blk.1.ffn_down.weight: it holds a number that F16 can't. Take BF16 or F32"):
        export(tmp_path / "large", out=tmp_path / "a.gguf", quantization="F16")
    assert sorted(os.listdir(tmp_path)) == ["hf", "large"]
    assert export(tmp_path / "large", out=tmp_path / "a.gguf", quantization="BF16").comparison.agreement > 0.9


def test_the_command(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "tiny.gguf")
    assert main(["export", str(checkpoint), "--to", "gguf", "--quantization", "Q4_K", "--out", out]) == 0
    told = capsys.readouterr().out
    assert told.startswith(f"{out}: ")
    assert "architecture qwen3. Loaded back, over 256 tokens: largest difference" in told
    assert main(["export", out, "--to", "hf", "--out", str(tmp_path / "again"), "--json"]) == 0
    event = json.loads(capsys.readouterr().out)
    assert (event["event"], event["kind"], event["architecture"]) == ("exported", "hf", "qwen3")
    assert main(["export", str(checkpoint), "--out", str(tmp_path / "nowhere" / "a.gguf")]) == 2
    assert main(["generate", out, "Once", "max_tokens=5"]) == 0


def test_the_how_to_page_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every command and the Python of docs/how-to/export-to-gguf.md, in their order, with another model of that name."""
    page = (Path(__file__).parents[2] / "docs" / "how-to" / "export-to-gguf.md").read_text()
    monkeypatch.chdir(tmp_path)
    tiny = tiny_model()
    save_model(tiny.decoder, tmp_path / "demo")
    tiny.tokenizer.save(tmp_path / "demo")
    commands = [line.strip() for line in page.splitlines() if line.startswith("    ownlm ")]
    assert len(commands) == 3
    for command in commands:
        assert main(shlex.split(command)[1:]) == 0, command
    assert "demo.gguf: " in capsys.readouterr().out
    python = [block.removeprefix("python") for block in page.split("```") if block.startswith("python")]
    ran: dict[str, Any] = {}
    exec("\n".join(python), ran)  # noqa: S102
    assert ran["model"].name == "demo-q4"
    assert ran["model"].tokenizer.template is not None
    chat = [{"role": "user", "content": "hi"}]
    ours, theirs = (each.tokenizer.chat(chat, add_generation_prompt=True) for each in (tiny, ran["model"]))
    assert ours == theirs


def test_the_page_for_other_tools_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every command and the Python of docs/how-to/use-elsewhere.md, in their order, with another model of that name."""
    page = (Path(__file__).parents[2] / "docs" / "how-to" / "use-elsewhere.md").read_text()
    monkeypatch.chdir(tmp_path)
    tiny = tiny_model()
    save_model(tiny.decoder, tmp_path / "demo", eos_token_id=sorted(tiny.tokenizer.stop_ids), pad_token_id=0)
    tiny.tokenizer.save(tmp_path / "demo")
    add_lora(tiny.decoder, LoRA(rank=2), seed=0)
    with torch.no_grad():
        for parameter in tiny.decoder.parameters():
            parameter += 0.1 * parameter.requires_grad
    save_adapter(tiny.decoder, tmp_path / "my-adapter")
    commands = [line.strip() for line in page.splitlines() if line.startswith("    ownlm ")]
    assert len(commands) == 2
    for command in commands:
        assert main(shlex.split(command)[1:]) == 0, command
    told = capsys.readouterr().out
    assert "demo-hf: " in told
    assert "largest difference 0 (of" in told
    ran: dict[str, Any] = {}
    exec("\n".join(block.removeprefix("python") for block in page.split("```") if block.startswith("python")), ran)  # noqa: S102
    assert ran["done"].comparison.agreement == 1.0
    ids, mine = ran["ids"]["input_ids"], ownlm.load("demo-tuned")
    assert ids.tolist() == [ownlm.load("demo").tokenizer.encode("The village")]
    with torch.inference_mode():
        assert difference(ownlm.load("demo").logits(ids), ran["model"](ids).logits) <= 1e-5
        assert difference(mine.logits(ids), ownlm.load("demo", adapter="my-adapter").logits(ids)) <= 1e-5
        assert difference(mine.logits(ids), ran["model"](ids).logits) > 1e-3
