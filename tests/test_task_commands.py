"""`ownlm classify, embed, answer, translate, summarize` as a user types them: what they read and print, and what they refuse."""

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ownlm.adapters.tuning import init_normal, with_head
from ownlm.checkpoints.weights import save_model
from ownlm.cli import main
from ownlm.generate.model import Model
from ownlm.generate.opening import load
from ownlm.models.families import from_hf
from tiny import tiny_model, tiny_tokenizer

Run = Callable[..., tuple[int, str, str]]
TOKENIZER = tiny_tokenizer()
BERT = {
    "model_type": "bert", "architectures": ["BertModel"], "vocab_size": TOKENIZER.vocab_size, "hidden_size": 32,
    "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "max_position_embeddings": 64,
    "type_vocab_size": 2, "hidden_act": "gelu", "layer_norm_eps": 1e-12,
}  # fmt: skip
T5 = {
    "model_type": "t5", "vocab_size": TOKENIZER.vocab_size, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2,
    "num_heads": 4, "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": TOKENIZER.eos_id,
}  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The folder of a model with each kind of head, of an encoder-decoder and of a decoder, all with loud random weights."""
    root, built = tmp_path_factory.mktemp("models"), {}
    for name, hf in (("bert", BERT), ("t5", T5)):
        config, family = from_hf(hf)
        built[name] = family.build(config, hf)
        init_normal(built[name].named_parameters(), std=0.2)
    built["decoder"] = tiny_model().decoder
    built["topics"] = with_head(built["bert"], "sequence", ("law", "sport"))
    built["names"] = with_head(built["bert"], "token", ("O", "B-name", "I-name"))
    built["span"] = with_head(built["bert"], "span")
    for name, model in built.items():
        (root / name).mkdir()
        save_model(model.eval(), root / name, eos_token_id=[TOKENIZER.eos_id])
        TOKENIZER.save(root / name)
    return {name: str(root / name) for name in built}


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """(exit code, what is printed, the errors) of a command; `stdin` is what it can read."""
    monkeypatch.setenv("OWNLM_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)

    def call(*words: str, stdin: str = "") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        code = main(words)
        return code, *capsys.readouterr()

    return call


def rows(out: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.splitlines()]


def loaded(folder: str) -> Model:
    model = load(folder)
    assert isinstance(model, Model)
    return model


def test_classify_labels_texts_of_every_source(models: dict[str, str], run: Run, tmp_path: Path) -> None:
    (tmp_path / "lines.txt").write_text("second\n\nthird\n", encoding="utf-8")
    code, out, _ = run("classify", models["topics"], "first", "@lines.txt", "-", "--json", stdin="fourth\n")
    found = rows(out)
    assert (code, [row["text"] for row in found]) == (0, ["first", "second", "third", "fourth"])
    expected = loaded(models["topics"]).classify(["first", "second", "third", "fourth"])
    assert [row["labels"] for row in found] == expected
    code, out, _ = run("classify", models["topics"], "first")
    label, probability = next(iter(expected[0].items()))
    assert code == 0
    assert out.splitlines()[0] == "first"
    assert out.splitlines()[1].split()[:2] == [label, f"{probability:.3f}"]


def test_classify_finds_names_with_their_characters(models: dict[str, str], run: Run) -> None:
    text = "Anna lives in Oslo"
    (found,) = rows(run("classify", models["names"], text, "--json")[1])
    assert [text[one["start"] : one["end"]] for one in found["entities"]] == [one["text"] for one in found["entities"]]
    expected = loaded(models["names"]).entities(text)
    assert [(one["start"], one["label"]) for one in found["entities"]] == [(one.start, one.label) for one in expected]
    code, out, _ = run("classify", models["names"], text)
    assert code == 0
    assert text in out
    assert all(f"{one.start}-{one.end}" in out for one in expected)


def test_embed_prints_and_writes_the_same_vectors(models: dict[str, str], run: Run, tmp_path: Path) -> None:
    expected = loaded(models["bert"]).embed(["one", "two"]).numpy()
    _, out, _ = run("embed", models["bert"], "one", "two")
    printed = np.array([json.loads(line) for line in out.splitlines()])
    assert np.abs(printed - expected).max() < 1e-6
    assert [row["text"] for row in rows(run("embed", models["bert"], "one", "two", "--json")[1])] == ["one", "two"]
    assert run("embed", models["bert"], "one", "two", "--out", "v.npy")[0] == 0
    assert np.abs(np.load(tmp_path / "v.npy") - expected).max() < 1e-6
    run("embed", models["bert"], "-", "--out", "v.jsonl", stdin="one\ntwo\n")
    kept = rows((tmp_path / "v.jsonl").read_text(encoding="utf-8"))
    assert [row["text"] for row in kept] == ["one", "two"]


def test_answer_by_a_span_is_a_part_of_the_text(models: dict[str, str], run: Run, tmp_path: Path) -> None:
    text = "The mill was built by Anna in 1823."
    (tmp_path / "history.txt").write_text(text, encoding="utf-8")
    (found,) = rows(run("answer", models["span"], "Who built it?", "--context", "@history.txt", "--json")[1])
    assert text[found["start"] : found["end"]] == found["text"]
    printed = run("answer", models["span"], "Who built it?", "--context", "-", stdin=text)[1]
    assert printed.strip() == found["text"].strip()


@pytest.mark.parametrize("name", ["t5", "decoder"])
def test_models_that_write_translate_summarize_and_answer(name: str, models: dict[str, str], run: Run) -> None:
    model: Any = load(models[name])
    _, out, _ = run("translate", models[name], "Good day.", "--from", "en", "--to", "German", "--json")
    (found,) = rows(out)
    expected = model.translate(["Good day."], source="English", target="de")[0]
    assert (found["source"], found["text"]) == ("Good day.", expected.text.strip())
    assert found["finish_reason"] == expected.finish_reason
    code, out, _ = run("summarize", models[name], "-", stdin="A long text.\nOf two lines.")
    assert (code, out.strip()) == (0, model.summarize(["A long text.\nOf two lines."])[0].text.strip())
    code, out, _ = run("answer", models[name], "Who?", "--context", "Anna did.")
    assert (code, out.strip()) == (0, model.answer("Who?", "Anna did.").text.strip())


def test_how_a_model_writes_can_be_set(models: dict[str, str], run: Run, tmp_path: Path) -> None:
    """Beams and sampling by the names that Python has for them; a task's own settings stay where nothing is said."""
    model: Any = load(models["t5"])
    (tmp_path / "article.txt").write_text("A long text. Of two sentences.", encoding="utf-8")
    words = ("summarize", models["t5"], "@article.txt", "--set", "beams=3", "--set", "length_penalty=0.5")
    expected = model.summarize(["A long text. Of two sentences."], beams=3, length_penalty=0.5)[0]
    assert run(*words, "--set", "max_tokens=7")[1].strip() != expected.text.strip()
    assert run(*words)[1].strip() == expected.text.strip()
    words = ("translate", models["decoder"], "Good day.", "Bye.", "--from", "en", "--to", "de")
    found = rows(run(*words, "--set", "temperature=1.5", "--set", "seed=3", "--set", "max_tokens=9", "--json")[1])
    decoder: Any = load(models["decoder"])
    sampled = decoder.translate(["Good day.", "Bye."], source="en", target="de", temperature=1.5, seed=3, max_tokens=9)
    assert [one["text"] for one in found] == [one.text.strip() for one in sampled]
    context = run("answer", models["t5"], "Who?", "--context", "Anna did.", "--set", "beams=2")[1]
    assert context.strip() == model.answer("Who?", "Anna did.", beams=2).text.strip()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("classify", "bert", "x"), "a head for sequence is needed"),
        (("classify", "decoder", "x"), "a head for sequence is needed"),
        (("classify", "span", "x"), "`ownlm answer` fits it"),
        (("classify", "t5", "x"), "an encoder-decoder has no labels"),
        (("classify", "topics", "x", "--labels", "a,b"), "--labels is for CLIP"),
        (("embed", "t5", "x"), "this model makes no vectors"),
        (("embed", "bert", "x", "--out", "v.csv"), "neither .npy nor .jsonl"),
        (("embed", "bert", "@none.txt"), "none.txt"),
        (("embed", "bert", "@empty.txt"), "there is no text"),
        (("answer", "names", "Who?", "--context", "x y"), "a head for span is needed"),
        (
            ("answer", "span", "Who?", "--context", "none.txt"),
            "'none.txt' is one word, and is it the text? Write @none.txt for the file",
        ),
        (
            ("answer", "span", "Who?", "--context", "empty.txt"),
            "'empty.txt' is a file, and is it the text? Write @empty.txt",
        ),
        (("answer", "span", "Who?", "--context", "@none.txt"), "none.txt: this can't be read as text"),
        (
            ("answer", "span", "Who?", "--context", "x y", "--set", "beams=2"),
            "beams: a span head points and writes nothing",
        ),
        (("summarize", "t5", "none.txt"), "Write @none.txt for the file of that name"),
        (("summarize", "t5", "x y", "--set", "beam=2"), "beam is not a field. Did you mean beams"),
        (("translate", "t5", "x", "--from", "en", "--to", "de", "--set", "beams"), "beams"),
        (("answer", "span", "Who?", "--context", " "), "is empty"),
        (("translate", "names", "x", "--from", "en", "--to", "de"), "reads texts and writes none"),
        (("translate", "t5", " ", "--from", "en", "--to", "de"), "text 1 is empty"),
        (("translate", "t5", "x", "--from", "en", "--to", " "), "a language has no name"),
        (("summarize", "topics", "x y"), "reads texts and writes none"),
    ],
)
def test_what_does_not_fit_is_one_error(
    words: tuple[str, ...], told: str, models: dict[str, str], run: Run, tmp_path: Path
) -> None:
    (tmp_path / "empty.txt").write_text("\n")
    code, out, error = run(words[0], models[words[1]], *words[2:])
    assert (code, out) == (2, "")
    assert told in error
    assert error.startswith(f"ownlm {words[0]}: ")
    assert "Traceback" not in error
